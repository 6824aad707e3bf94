"""The batcher: each text gets exactly one answer, its own, whatever goes wrong around it."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batcher import Batcher, Limits
from service.confidence import confidence, temperature_after
from service.engine_thread import EngineThread
from service.errors import (
    DeadlineExceeded,
    Draining,
    EngineDown,
    InferenceFailed,
    QueueFull,
    RefrainError,
)
from service.jobs import CALL_TOKENS, Answer, Drop, Exit, Job, Pace, Pool, Text, Waiting
from service.scheduling import ALIKE, choose_batch
from tests.service.fakes import FakeEngine, FloatArray, wait_until

SECONDS = 30.0


ROWS = st.tuples(
    st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=3), st.floats(0.5, 5, allow_subnormal=False)
)


@given(st.lists(ROWS, min_size=1, max_size=5))
def test_confidence_is_the_largest_probability_at_each_row_s_temperature(rows: list[tuple[list[float], float]]) -> None:
    powers = np.exp([np.array(logits) / temperature for logits, temperature in rows])
    expected = (powers / powers.sum(axis=1, keepdims=True)).max(axis=1)
    logits_BC = np.array([logits for logits, _ in rows], dtype=np.float32)
    found_B = confidence(logits_BC, [temperature for _, temperature in rows])
    np.testing.assert_allclose(found_B, expected, rtol=1e-4)


def test_beyond_the_fitted_iterations_the_last_temperature_holds() -> None:
    assert [temperature_after([1.5, 2.0], iterations) for iterations in (1, 2, 3, 16)] == [1.5, 2.0, 2.0, 2.0]


@dataclass
class Recorder:
    """An observer that keeps what it is told."""

    batches: list[tuple[int, int, int]] = field(default_factory=list)
    exits: list[tuple[str, int]] = field(default_factory=list)
    depth: int = 0
    drops: Counter[str] = field(default_factory=Counter)

    def batch(self, texts: int, real_tokens: int, padding_tokens: int) -> None:
        self.batches.append((texts, real_tokens, padding_tokens))

    def exit(self, reason: Exit, iterations: int) -> None:
        self.exits.append((reason, iterations))

    def dropped(self, reason: Drop, texts: int) -> None:
        self.drops[reason] += texts

    def queued(self, texts: int) -> None:
        self.depth = texts


@dataclass
class Setup:
    """A batcher at work, and all that it touches."""

    batcher: Batcher
    thread: EngineThread
    engine: FakeEngine
    seen: Recorder

    def submit(self, *texts: Text, seconds: float = SECONDS) -> Job:
        return self.batcher.submit(texts, time.monotonic() + seconds)

    def hold(self) -> Job:
        """Closes the gate with one text in the engine, so that what follows waits."""
        self.engine.gate.clear()
        self.engine.entered.clear()
        job = self.submit(text(1))
        assert self.engine.entered.wait(SECONDS)
        return job

    def release(self) -> None:
        self.engine.gate.set()


@contextmanager
def running(
    engine: FakeEngine | None = None,
    *,
    stuck_seconds: float = 60.0,
    batch_tokens: int = 2048,
    queue_texts: int = 100,
    queue_tokens: int = 100_000,
    queue_seconds: float = 1000.0,
    brown_out_seconds: float = math.inf,
    temperatures: Sequence[float] = (1.0,),
    pace: Pace | None = None,
) -> Iterator[Setup]:
    engine, seen, thread = engine or FakeEngine(), Recorder(), EngineThread(stuck_seconds=stuck_seconds)
    limits = Limits(batch_tokens, queue_texts, queue_tokens, queue_seconds, brown_out_seconds)
    batcher = Batcher(engine, thread, limits=limits, observer=seen, temperatures=temperatures, pace=pace)
    thread.start()
    batcher.start()
    try:
        yield Setup(batcher, thread, engine, seen)
    finally:
        engine.gate.set()
        batcher.stop(timeout=SECONDS)
        thread.end(timeout=SECONDS)


@contextmanager
def switching_often() -> Iterator[None]:
    """Have threads take turns within a few steps of the interpreter."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def text(*ids: int, iterations: int = 1, threshold: float = 1.0, may_be_cut: bool = False) -> Text:
    return Text(list(ids), iterations, threshold, may_be_cut)


def results(job: Job) -> list[Answer | RefrainError]:
    return job.future.result(timeout=SECONDS)


def answers(job: Job) -> list[Answer]:
    found = [result for result in results(job) if isinstance(result, Answer)]
    assert len(found) == len(results(job)), results(job)
    return found


def expected_logits(ids: Sequence[int], iterations: int) -> FloatArray:
    """What a fake engine of its own says of a text that is alone in it."""
    engine = FakeEngine()
    hidden = engine.embed([ids])
    for _ in range(iterations):
        hidden, logits_BC = engine.step(hidden)
    return logits_BC[0]


@settings(max_examples=30)
@given(
    st.lists(
        st.lists(st.tuples(st.lists(st.integers(0, 255), min_size=1, max_size=40), st.integers(1, 4)), min_size=1),
        min_size=1,
        max_size=8,
    )
)
def test_every_text_gets_its_own_answer_in_its_place(jobs: list[list[tuple[list[int], int]]]) -> None:
    with running(batch_tokens=100, queue_texts=10_000) as setup:
        submitted = [setup.submit(*(text(*ids, iterations=deep) for ids, deep in job)) for job in jobs]
        for job, asked in zip(submitted, jobs, strict=True):
            for answer, (ids, deep) in zip(answers(job), asked, strict=True):
                np.testing.assert_array_equal(answer.logits, expected_logits(ids, deep))
                assert answer.iterations == deep
                assert answer.queue_seconds >= 0
                assert answer.inference_seconds >= 0
    assert sorted(setup.seen.exits) == sorted(("depth", deep) for job in jobs for _, deep in job)
    assert sum(tokens for _, tokens, _ in setup.seen.batches) == sum(len(ids) * n for job in jobs for ids, n in job)
    assert setup.batcher.queue_depth == 0


def test_what_gathers_while_the_engine_runs_goes_together() -> None:
    with running() as setup:
        setup.hold()
        waiting = [setup.submit(text(number, number)) for number in range(5)]
        setup.release()
        for job in waiting:
            answers(job)
    assert setup.seen.batches == [(1, 1, 0), (5, 10, 0)]


def test_texts_at_different_iterations_share_a_turn_and_leave_when_done() -> None:
    with running() as setup:
        setup.engine.gate.clear()
        deep = setup.submit(text(1, 2, iterations=3))
        assert setup.engine.entered.wait(SECONDS)
        quick = setup.submit(text(3), text(4, 5, 6, iterations=2))
        setup.release()
        assert [answer.iterations for answer in answers(deep) + answers(quick)] == [3, 1, 2]
    assert setup.seen.batches == [(1, 2, 0), (3, 6, 3), (2, 5, 1)]


def test_a_confident_text_leaves_early() -> None:
    sure = max(range(50), key=lambda token: sureness(token, 2))
    at_one, at_two = (sureness(sure, n) for n in (1, 2))
    assert at_one < at_two
    with running() as setup:
        job = setup.submit(
            text(sure, iterations=4, threshold=at_one),
            text(sure, iterations=4, threshold=at_two),
            text(sure, iterations=4, threshold=1.0),
            text(sure, iterations=2, threshold=at_two),
        )
        assert [answer.iterations for answer in answers(job)] == [1, 2, 4, 2]
    assert sorted(setup.seen.exits) == [("confidence", 1), ("confidence", 2), ("depth", 2), ("depth", 4)]


def sureness(token: int, iterations: int) -> float:
    return float(confidence(expected_logits([token], iterations)[None], [1.0])[0])


def test_how_sure_a_text_is_follows_from_its_own_iteration_s_temperature() -> None:
    sure = max(range(50), key=lambda token: sureness(token, 2))
    needed = sureness(sure, 2) - 1e-6  # at the temperature 1; at 100 nobody is sure of anything
    with running(temperatures=[100.0, 1.0]) as setup:
        early = setup.submit(text(sure, iterations=4, threshold=sureness(sure, 1)))
        mixed = setup.submit(text(sure, 1, iterations=4), text(sure, iterations=4, threshold=needed))
        assert [answer.iterations for answer in answers(early) + answers(mixed)] == [2, 4, 2]
    with running(temperatures=[1.0, 100.0]) as setup:
        job = setup.submit(text(sure, iterations=3, threshold=needed))
        assert [answer.iterations for answer in answers(job)] == [3]


def test_a_list_is_taken_whole_or_not_at_all() -> None:
    with running(queue_texts=4) as setup:
        setup.hold()
        setup.submit(text(1), text(2))
        with pytest.raises(QueueFull):
            setup.submit(text(3), text(4))
        assert setup.batcher.queue_depth == 3
        last = setup.submit(text(5))
        with pytest.raises(QueueFull):
            setup.batcher.check_room(1, 1, 1, SECONDS)
        setup.release()
        answers(last)
        answers(setup.submit(*(text(n) for n in range(4))))


def test_retry_after_grows_with_the_excess_and_shrinks_with_the_pace() -> None:
    def hints(pause: float) -> tuple[float, float]:
        engine = Slow()
        engine.pause = pause
        with running(engine, queue_texts=2) as setup:
            learn(setup)
            found = []
            for texts in (3, 12):
                with pytest.raises(QueueFull) as caught:
                    setup.submit(*[text(1)] * texts)
                assert caught.value.retry_after is not None
                found.append(caught.value.retry_after)
            return found[0], found[1]

    slow, fast = hints(0.05), hints(0.0)
    assert slow[1] == pytest.approx(10 * slow[0])  # 10 texts over, not 1
    assert slow[0] > 0.05  # the measured pace is at most one text in each pause
    assert fast[0] < slow[0]


def test_retry_after_ends_with_the_deadlines_of_what_waits() -> None:
    with running(Slow(), queue_seconds=0.2, queue_texts=10_000) as setup:
        learn(setup)
        setup.hold()
        setup.submit(*[text(1)] * 4_000)  # would take minutes, but nobody waits for them so long
        with pytest.raises(QueueFull) as caught:
            setup.submit(text(2))
        assert caught.value.retry_after is not None
        assert 0 < caught.value.retry_after <= SECONDS
        setup.release()


def test_a_deadline_that_passes_in_the_queue() -> None:
    with running() as setup:
        setup.hold()
        late, timely = setup.submit(text(2), text(3), seconds=0.0), setup.submit(text(4))
        setup.release()
        assert [type(result) for result in results(late)] == [DeadlineExceeded] * 2
        answers(timely)
    assert setup.seen.drops == {"deadline": 2}
    assert setup.seen.batches == [(1, 1, 0), (1, 1, 0)]


def test_a_deadline_that_passes_between_iterations() -> None:
    class Clock(FakeEngine):
        deadline = 0.0

        def step(self, hidden: Sequence[FloatArray]) -> tuple[list[FloatArray], FloatArray]:
            while self.steps == 1 and time.monotonic() < self.deadline:
                time.sleep(0.005)
            return super().step(hidden)

    engine = Clock()
    engine.deadline = time.monotonic() + 0.2
    with running(engine) as setup:
        job = setup.batcher.submit([text(1, iterations=9)], engine.deadline)
        assert [type(result) for result in results(job)] == [DeadlineExceeded]
    assert engine.steps == 2
    assert setup.seen.drops == {"deadline": 1}


def test_what_is_abandoned_is_dropped_counted_and_never_run() -> None:
    with running() as setup:
        setup.hold()
        left, stays = setup.submit(text(2), text(3)), setup.submit(text(4))
        left.abandon("client")
        left.abandon("client")
        assert left.future.cancelled()
        assert setup.batcher.queue_depth == 2
        setup.release()
        answers(stays)
    assert setup.seen.drops == {"client": 2}
    assert setup.seen.batches == [(1, 1, 0), (1, 1, 0)]


def test_what_is_abandoned_while_it_runs_is_counted_once() -> None:
    with running() as setup:
        job = setup.hold()
        job.abandon("client")
        setup.release()
        answers(setup.submit(text(2)))
    assert setup.seen.drops == {"client": 1}
    assert setup.seen.exits == [("depth", 1)]


def test_abandoning_what_is_done_does_nothing() -> None:
    with running() as setup:
        job = setup.submit(text(1))
        answers(job)
        job.abandon("client")
        assert len(answers(job)) == 1
    assert not setup.seen.drops


def test_who_gives_up_just_as_the_answers_come_gets_all_of_them_or_none() -> None:
    with running() as setup:
        job = setup.hold()
        hand_over = job.complete

        def between_the_last_answer_and_its_handing_over() -> None:
            with patch.object(job.future, "cancel"):  # which the other thread has not come to
                job.abandon("client")
            hand_over()

        with patch.object(job, "complete", between_the_last_answer_and_its_handing_over):
            setup.release()
            assert len(answers(job)) == 1
    assert not setup.seen.drops


def test_a_poisoned_text_fails_alone() -> None:
    with running() as setup:
        setup.engine.poison.add((66, 6))
        setup.hold()
        job, other = setup.submit(text(1), text(66, 6, iterations=2), text(2)), setup.submit(text(3, 3, iterations=2))
        setup.release()
        before, failed, after = results(job)
        assert isinstance(failed, InferenceFailed)
        assert isinstance(before, Answer)
        assert isinstance(after, Answer)
        np.testing.assert_array_equal(after.logits, expected_logits([2], 1))
        np.testing.assert_array_equal(answers(other)[0].logits, expected_logits([3, 3], 2))
        assert setup.thread.alive()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_a_failure_of_their_text_alone(wrong: float) -> None:
    class Wrong(FakeEngine):
        def logits(self, state_LD: FloatArray) -> list[float]:
            return [wrong, 0.0] if state_LD[0, 0] == 66 else super().logits(state_LD)

    with running(Wrong()) as setup:
        good, bad = results(setup.submit(text(1), text(66)))
        assert isinstance(good, Answer)
        assert isinstance(bad, InferenceFailed)


class Raises(FakeEngine):
    def step(self, hidden: Sequence[FloatArray]) -> tuple[list[FloatArray], FloatArray]:
        raise RuntimeError("out of memory")


class SaysNothing(FakeEngine):
    def logits(self, state_LD: FloatArray) -> list[float]:
        return [np.nan, np.nan]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # dying is what is tested
@pytest.mark.parametrize("engine", [Raises, SaysNothing])
def test_an_engine_that_fails_for_any_text_ends_its_thread(engine: type[FakeEngine]) -> None:
    with running(engine()) as setup:
        assert {type(result) for result in results(setup.submit(text(1), text(2)))} == {InferenceFailed}
        wait_until(lambda: not setup.thread.alive())
        with pytest.raises(EngineDown):
            setup.submit(text(1))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # dying is what is tested
def test_when_the_thread_dies_everybody_hears_it_and_health_turns_red() -> None:
    with running() as setup:
        assert setup.thread.alive()
        running_job = setup.hold()
        waiting = setup.submit(text(2), text(3))
        setup.engine.die = True
        setup.release()
        for job in (running_job, waiting):
            assert {type(result) for result in results(job)} == {EngineDown}
        assert not setup.thread.alive()
        assert setup.batcher.queue_depth == 0
        with pytest.raises(EngineDown):
            setup.submit(text(4))


def test_a_turn_that_takes_too_long_turns_health_red_until_it_ends() -> None:
    with running(stuck_seconds=0.1) as setup:
        time.sleep(0.15)
        assert setup.thread.alive()  # an idle engine is not a stuck one
        job = setup.hold()
        wait_until(lambda: not setup.thread.alive())
        setup.release()
        answers(job)
        wait_until(setup.thread.alive)


def test_stopping_answers_what_waits_and_takes_nothing_new() -> None:
    with running(batch_tokens=1) as setup:
        jobs = [setup.hold(), *(setup.submit(text(number, iterations=2)) for number in range(5))]
        stopping = threading.Thread(target=setup.batcher.stop, args=(SECONDS,))
        stopping.start()
        wait_until(lambda: refuses(setup))
        setup.release()
        stopping.join(SECONDS)
        assert not stopping.is_alive()
        for job in jobs:
            assert job.future.done()
            answers(job)


def refuses(setup: Setup) -> bool:
    try:
        setup.submit(text(0)).abandon("client")
    except Draining:
        return True
    return False


def test_stopping_has_an_end_and_each_text_still_one_answer() -> None:
    with running(batch_tokens=1) as setup:
        setup.engine.gate.clear()
        job = setup.submit(text(1), text(2), text(3))
        assert setup.engine.entered.wait(SECONDS)
        setup.batcher.stop(timeout=0.05)
        assert [type(result) for result in results(job)] == [Draining] * 3
        setup.release()


def test_a_batcher_that_was_never_started_stops() -> None:
    thread = EngineThread(stuck_seconds=1.0)
    batcher = Batcher(FakeEngine(), thread, limits=Limits(1, 1, 1), observer=Recorder())
    job = batcher.submit([text(1)], time.monotonic() + SECONDS)
    assert not thread.alive()
    batcher.stop(timeout=1.0)
    thread.end(timeout=1.0)
    assert [type(result) for result in results(job)] == [Draining]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no niceness of its own")
def test_the_engine_gives_way_to_the_event_loop() -> None:
    class Noting(FakeEngine):
        def embed(self, ids: Sequence[Sequence[int]]) -> list[FloatArray]:
            seen.append(os.getpriority(os.PRIO_PROCESS, 0))  # of the thread that asks
            return super().embed(ids)

    seen: list[int] = []
    with running(Noting()) as setup:
        results(setup.submit(text(1)))
    assert min(seen) > os.getpriority(os.PRIO_PROCESS, 0)


def test_the_queue_is_bounded_in_tokens_too() -> None:
    with running(queue_tokens=10) as setup:
        setup.hold()
        setup.submit(text(*range(6)))
        with pytest.raises(QueueFull):
            setup.submit(text(*range(4)))
        last = setup.submit(text(*range(3)))
        setup.release()
        answers(last)
        answers(setup.submit(text(*range(10))))


def test_who_finds_too_many_tokens_learns_how_long_their_work_takes() -> None:
    with running(queue_tokens=100, pace=Pace(1.0, 1000, 1000)) as setup:  # a millisecond for a token, or for a text
        setup.hold()
        setup.submit(text(*[1] * 90, iterations=10))  # a second nearly, of which a ninth must go
        with pytest.raises(QueueFull) as caught:
            setup.submit(text(*[2] * 20))
        assert caught.value.retry_after == pytest.approx(0.11, rel=0.2)


class Slow(FakeEngine):
    """An engine that takes its time."""

    pause = 0.05

    def step(self, hidden: Sequence[FloatArray]) -> tuple[list[FloatArray], FloatArray]:
        time.sleep(self.pause)
        return super().step(hidden)


def learn(setup: Setup) -> None:
    """Lets the batcher measure how long a text takes."""
    for _ in range(8):
        answers(setup.submit(text(1)))


def test_the_queue_is_bounded_in_measured_time_too() -> None:
    with running(Slow(), queue_seconds=0.2, queue_texts=10_000) as setup:
        learn(setup)
        setup.hold()
        setup.submit(*[text(1)] * 20)  # a second and more
        with pytest.raises(QueueFull) as caught:
            setup.submit(text(2))
        assert caught.value.retry_after is not None
        assert caught.value.retry_after > 0.5
        setup.release()
        wait_until(lambda: setup.batcher.queue_depth == 0)
        answers(setup.submit(*[text(1)] * 20))  # whatever a list takes by itself, an empty queue takes it


LONG = text(*[7] * 200, iterations=4)


def test_a_short_text_runs_before_any_number_of_long_ones_that_came_first() -> None:
    with running(batch_tokens=400, queue_texts=10_000, queue_tokens=10**6) as setup:
        setup.hold()
        long_ones, short = setup.submit(*[LONG] * 300), setup.submit(text(2))
        left = Future[int]()
        short.future.add_done_callback(lambda _: left.set_result(setup.batcher.queue_depth))
        setup.release()
        assert left.result(SECONDS) > 290
        answers(long_ones)


def test_long_texts_leave_room_for_short_ones_but_not_for_their_like() -> None:
    with running(Slow(), queue_seconds=0.5, queue_texts=10_000, queue_tokens=10**6) as setup:
        learn(setup)
        setup.hold()
        setup.submit(*[LONG] * 50)
        assert setup.batcher.backlog_seconds > 10
        short = setup.submit(text(2))
        with pytest.raises(QueueFull):
            setup.submit(text(*[7] * 60, iterations=4))
        setup.release()
        answers(short)
        setup.batcher.stop(timeout=0)


ASKED = st.tuples(st.sampled_from([1, 9, 10, 300]), st.sampled_from([1, 16]), st.booleans())


def pool_of(asked: Sequence[tuple[int, int, bool]]) -> Pool:
    batcher = Batcher(FakeEngine(), EngineThread(stuck_seconds=1), limits=Limits(1, 1, 1), observer=Recorder())
    pool = Pool()
    for number, (length, iterations, may_be_cut) in enumerate(asked):
        one = text(*[1] * length, iterations=iterations, may_be_cut=may_be_cut)
        pool.add(Waiting(number, one, batcher, pool, Job(lambda *_: None), float(number), math.inf))
    return pool


@given(st.lists(ASKED, min_size=1, max_size=60), st.sampled_from([1, 40, 400]), st.randoms(use_true_random=False))
def test_the_most_urgent_is_among_the_first_of_each_kind(
    asked: list[tuple[int, int, bool]], batch_tokens: int, random: Random
) -> None:
    pool, clock = pool_of(asked), float(len(asked))

    def urgency(waiting: Waiting) -> float:
        return (clock - waiting.arrived) / (waiting.wanted + ALIKE)

    while pool.texts:
        leader = max(pool.first(), key=urgency)
        assert urgency(leader) == max(map(urgency, pool.texts.values()))
        near = [leader, *(waiting for waiting in pool.near(leader.length, CALL_TOKENS) if waiting is not leader)]
        assert {waiting.number for waiting in near} == {
            waiting.number for waiting in pool.texts.values() if abs(waiting.length - leader.length) <= CALL_TOKENS
        }
        apart = [abs(waiting.length - leader.length) for waiting in near]
        assert apart == sorted(apart)
        for place in choose_batch([waiting.length for waiting in near], batch_tokens, CALL_TOKENS):
            waiting = near[place]
            waiting.iterations += 1
            pool.begun(waiting)
            if waiting.iterations == waiting.text.max_iterations or random.random() < 0.1:  # it was sure, or has left
                pool.remove(waiting)
        clock += 1


@given(st.lists(ASKED, min_size=1, max_size=60))
def test_a_pool_knows_how_much_it_holds(asked: list[tuple[int, int, bool]]) -> None:
    pool = pool_of(asked)
    works = [waiting.admitted for waiting in pool.texts.values()]
    for waiting in list(pool.texts.values()):
        before = pool.admitted_before(waiting.admitted)
        assert sum(work for work in works if work <= 4 * waiting.admitted) <= before
        assert before <= sum(work for work in works if work < 8 * waiting.admitted)
        assert pool.remove(waiting)
        assert not pool.remove(waiting)
        works.remove(waiting.admitted)
        assert pool.admitted == sum(works)
    assert not pool.first()
    assert not list(pool.near(1, 300))


def test_any_thread_may_ask_a_pool_how_much_it_holds_while_texts_of_new_sizes_come() -> None:
    batcher = Batcher(FakeEngine(), EngineThread(stuck_seconds=1), limits=Limits(1, 1, 1), observer=Recorder())
    pools = [Pool() for _ in range(300)]
    texts = [text(1, iterations=2**size) for size in range(20)]

    def fill() -> None:
        for pool in pools:
            for number, one in enumerate(texts):
                pool.add(Waiting(number, one, batcher, pool, Job(lambda *_: None), 0.0, 0.0))

    with ThreadPoolExecutor(1) as other, switching_often():
        filling = other.submit(fill)
        for pool in pools:
            while len(pool.texts) < len(texts):
                assert pool.admitted >= 0 and pool.admitted_before(2**30) >= 0
        filling.result(timeout=SECONDS)


def test_who_would_hardly_be_answered_in_time_is_refused_at_once() -> None:
    with running(Slow(), queue_texts=10_000) as setup:
        learn(setup)
        setup.hold()
        setup.submit(*[text(1)] * 20)
        wait = setup.batcher.backlog_seconds  # as measured, on however slow a machine
        with pytest.raises(QueueFull):
            setup.submit(text(2), seconds=wait / 2)
        with pytest.raises(QueueFull):
            setup.submit(text(2), seconds=1.5 * wait)
        setup.submit(text(2, may_be_cut=True), seconds=1.5 * wait)  # its first iteration will be in time
        setup.submit(text(2), seconds=600)


@pytest.mark.parametrize("early", [text(1, iterations=4, threshold=0.01), text(1, iterations=4, may_be_cut=True)])
def test_early_exits_show_in_the_pace(early: Text) -> None:
    def backlog(asked: Text) -> float:
        with running(Slow(), brown_out_seconds=0.0) as setup:
            for _ in range(8):
                answers(setup.submit(asked))
            setup.hold()
            setup.submit(*[asked] * 10)
            return setup.batcher.backlog_seconds

    assert backlog(early) < backlog(text(1, iterations=4)) / 2


def test_the_observer_always_knows_the_depth() -> None:
    with running() as setup:
        setup.hold()
        job = setup.submit(text(1), text(2))
        assert setup.seen.depth == 3
        job.abandon("client")
        assert setup.seen.depth == 1
        setup.release()
        wait_until(lambda: setup.seen.depth == 0)


def test_a_long_queue_cuts_those_who_allow_it_and_nobody_else() -> None:
    with running(brown_out_seconds=0.0) as setup:
        willing, not_willing = setup.submit(text(1, iterations=3, may_be_cut=True)), setup.submit(text(2, iterations=3))
        (cut,), (whole,) = answers(willing), answers(not_willing)
    assert (cut.iterations, cut.exit, cut.degraded) == (1, "overload", True)
    assert (whole.iterations, whole.exit, whole.degraded) == (3, "depth", False)
    np.testing.assert_array_equal(cut.logits, expected_logits([1], 1))


def test_a_short_queue_cuts_nobody() -> None:
    with running() as setup:
        (answer,) = answers(setup.submit(text(1, iterations=3, may_be_cut=True)))
    assert (answer.iterations, answer.degraded) == (3, False)


def test_who_allows_it_is_answered_before_its_deadline_with_what_there_is() -> None:
    with running(Slow()) as setup:
        for _ in range(30):  # the time of an iteration is learnt
            answers(setup.submit(text(1)))
        started = time.monotonic()
        (answer,) = answers(setup.submit(text(1, iterations=1000, may_be_cut=True), seconds=2.0))
        assert time.monotonic() < started + 2.0
    assert answer.exit == "deadline"
    assert answer.degraded
    assert 1 <= answer.iterations < 1000


def test_who_allows_it_is_answered_before_its_deadline_though_it_waits_for_its_next_turn() -> None:
    with running(Slow(), batch_tokens=1) as setup:
        started = time.monotonic()
        willing = setup.submit(text(1, iterations=50, may_be_cut=True), seconds=2.0)
        others = setup.submit(*[text(2)] * 60)  # each a turn of its own, more urgent than what is left of the first
        (answer,) = answers(willing)
        assert time.monotonic() < started + 2.0
        others.abandon("client")
    assert (answer.iterations, answer.exit) == (1, "deadline")
    np.testing.assert_array_equal(answer.logits, expected_logits([1], 1))


def test_one_iteration_of_who_allows_fewer_is_as_urgent_as_a_text_of_one() -> None:
    engine = Slow()
    engine.pause = 0.005
    with running(engine, batch_tokens=8) as setup:  # so that only one of the two fits, and both are looked at
        setup.hold()
        deep, began = setup.submit(text(*[1] * 5, iterations=20)), time.monotonic()
        time.sleep(0.1)
        willing, came = setup.submit(text(*[2] * 5, iterations=20, may_be_cut=True)), time.monotonic()
        time.sleep(0.1)
        setup.release()
        (first,), (second,) = answers(willing), answers(deep)
    assert came + first.queue_seconds < began + second.queue_seconds
    assert first.iterations == second.iterations == 20


def test_background_texts_run_when_no_other_waits_in_any_model() -> None:
    with running() as setup, other_model(setup) as other:
        order: list[str] = []
        first = setup.hold()
        deadline = time.monotonic() + SECONDS
        jobs = {
            "background": setup.batcher.submit([text(2)], deadline, background=True),
            "other model": other.submit([text(3, 3, iterations=3)], deadline),
            "same model": setup.submit(text(4, iterations=2)),
        }
        for name, job in jobs.items():
            job.future.add_done_callback(lambda _, name=name: order.append(name))  # type: ignore[misc]
        assert setup.batcher.queue_depth == 2  # the background counts for nobody
        setup.release()
        for job in (first, *jobs.values()):
            answers(job)
        wait_until(lambda: len(order) == 3)
        assert order[-1] == "background"


def test_background_texts_are_few() -> None:
    with running(queue_texts=1) as setup:
        setup.hold()
        deadline = time.monotonic() + SECONDS
        kept = setup.batcher.submit([text(1)] * 300, deadline, background=True)  # a request of any size, if it is alone
        with pytest.raises(QueueFull):
            setup.batcher.submit([text(1)], deadline, background=True)
        with pytest.raises(QueueFull):  # one is held in the engine: the background neither takes nor makes room
            setup.submit(text(2))
        kept.abandon("client")


@contextmanager
def other_model(setup: Setup, pace: Pace | None = None) -> Iterator[Batcher]:
    batcher = Batcher(FakeEngine(), setup.thread, limits=Limits(2048, 100, 10_000), observer=Recorder(), pace=pace)
    batcher.start()
    try:
        yield batcher
    finally:
        batcher.stop(timeout=SECONDS)


@pytest.mark.parametrize(("cheap_seconds", "first"), [(1.0, "dear"), (0.1, "cheap")])
def test_models_are_compared_by_what_their_tokens_cost(cheap_seconds: float, first: str) -> None:
    dear_pace, cheap_pace = Pace(1.0, 1000, 1000), Pace(cheap_seconds, 1000, 1000)
    with running(pace=dear_pace) as setup, other_model(setup, cheap_pace) as cheap:
        order: list[str] = []
        setup.hold()
        deadline = time.monotonic() + 10 * SECONDS
        one_turn = setup.batcher.submit([text(*[1] * 60)], deadline)
        time.sleep(0.1)
        two_turns = cheap.submit([text(*[2] * 60, iterations=2)], deadline)  # twice as many tokens
        time.sleep(0.3)
        for name, job in (("dear", one_turn), ("cheap", two_turns)):
            job.future.add_done_callback(lambda _, name=name: order.append(name))  # type: ignore[misc]
        setup.release()
        answers(one_turn)
        answers(two_turns)
        wait_until(lambda: len(order) == 2)
    assert order[0] == first


def test_a_model_can_go_while_others_stay() -> None:
    with running() as setup:
        with other_model(setup) as other:
            last = other.submit([text(5, iterations=2)], time.monotonic() + SECONDS)
        assert answers(last)[0].iterations == 2
        with pytest.raises(Draining):
            other.submit([text(5)], time.monotonic() + SECONDS)
        answers(setup.submit(text(1)))


def test_who_comes_within_the_turn_of_one_that_left_makes_it_look_no_shorter() -> None:
    asked = text(*range(1, 21))
    with running(pace=Pace(0.05, asked.work, 1)) as setup:
        for _ in range(10):
            setup.engine.gate.clear()
            setup.engine.entered.clear()
            left = setup.submit(asked)
            assert setup.engine.entered.wait(SECONDS)
            time.sleep(0.05)
            left.abandon("client")
            stays = setup.submit(asked)
            setup.engine.gate.set()
            answers(stays)
        assert setup.batcher._pace.seconds(texts=1) > 0.015  # every other turn takes next to no time
