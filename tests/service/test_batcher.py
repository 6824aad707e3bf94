"""The batcher: which texts run next, and that each gets exactly one answer, its own, whatever goes wrong."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batcher import CALL_TOKENS, Answer, Batcher, Job, Text, choose_batch, confidence
from service.errors import (
    DeadlineExceeded,
    Draining,
    EngineDown,
    InferenceFailed,
    QueueFull,
    RefrainError,
)
from tests.service.fakes import FakeEngine, FloatArray, wait_until

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)
BUDGETS = st.integers(1, 2048)
SECONDS = 10.0


@given(LENGTHS, BUDGETS)
def test_the_oldest_always_runs_and_nobody_twice(lengths: list[int], budget: int) -> None:
    chosen = choose_batch(lengths, budget, CALL_TOKENS)
    assert chosen[0] == 0
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= set(range(len(lengths)))


@given(LENGTHS, BUDGETS)
def test_a_padded_batch_stays_within_the_budget_unless_one_text_alone_does_not(lengths: list[int], budget: int) -> None:
    chosen = choose_batch(lengths, budget, CALL_TOKENS)
    assert len(chosen) == 1 or len(chosen) * max(lengths[place] for place in chosen) <= budget


@given(LENGTHS, BUDGETS, st.integers(0, 40))
def test_the_padding_is_never_dearer_than_the_calls_that_it_saves(
    lengths: list[int], budget: int, call_tokens: int
) -> None:
    batch = [lengths[place] for place in choose_batch(lengths, budget, call_tokens)]
    assert len(batch) * max(batch) - sum(batch) <= call_tokens * (len(batch) - 1)


@given(st.integers(1, 50), st.integers(1, 60))
def test_texts_of_one_length_all_go_as_far_as_the_budget_allows(length: int, count: int) -> None:
    assert choose_batch([length] * count, 400, CALL_TOKENS) == list(range(max(1, min(count, 400 // length))))


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "chosen"),
    [
        ([10], 5, [0]),  # too long for the budget: alone
        ([10, 10, 10], 20, [0, 1]),
        ([10, 26], 1000, [0, 1]),  # 16 tokens of padding are what a call costs
        ([10, 27], 1000, [0]),
        ([27, 10], 1000, [0]),
        ([26, 10], 1000, [0, 1]),
        ([20, 50, 21, 19], 1000, [0, 2, 3]),
        ([20, 30, 10, 20], 60, [0, 3, 2]),  # the nearest in length first
    ],
)
def test_the_edges_of_choosing(lengths: list[int], max_tokens: int, chosen: list[int]) -> None:
    assert choose_batch(lengths, max_tokens, 16) == chosen


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 4)), min_size=1, max_size=40), st.integers(1, 600))
def test_a_text_waits_at_most_for_the_iterations_of_those_before_it(texts: list[tuple[int, int]], budget: int) -> None:
    pool = {number: [length, iterations] for number, (length, iterations) in enumerate(texts)}
    turn = 0
    while pool:
        turn += 1
        waiting = list(pool)
        for place in choose_batch([pool[number][0] for number in waiting], budget, CALL_TOKENS):
            number = waiting[place]
            pool[number][1] -= 1
            if pool[number][1] == 0:
                del pool[number]
                assert turn <= sum(iterations for _, iterations in texts[: number + 1])


@given(st.lists(st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=3), min_size=1, max_size=5))
def test_confidence_is_the_largest_probability(logits: list[list[float]]) -> None:
    powers = np.exp(np.array(logits, dtype=np.float64))
    expected = (powers / powers.sum(axis=1, keepdims=True)).max(axis=1)
    np.testing.assert_allclose(confidence(np.array(logits, dtype=np.float32)), expected, rtol=1e-4)


@dataclass
class Recorder:
    """An observer that keeps what it is told."""

    batches: list[tuple[int, int, int]] = field(default_factory=list)
    exits: list[tuple[str, int]] = field(default_factory=list)
    drops: Counter[str] = field(default_factory=Counter)

    def batch(self, texts: int, real_tokens: int, padding_tokens: int) -> None:
        self.batches.append((texts, real_tokens, padding_tokens))

    def exit(self, reason: Literal["depth", "confidence"], iterations: int) -> None:
        self.exits.append((reason, iterations))

    def dropped(self, reason: Literal["deadline", "client"], texts: int) -> None:
        self.drops[reason] += texts


@dataclass
class Setup:
    """A batcher at work, and all that it touches."""

    batcher: Batcher
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
    engine: FakeEngine | None = None, *, max_batch_tokens: int = 2048, max_queue: int = 100, stuck_seconds: float = 60.0
) -> Iterator[Setup]:
    engine, seen = engine or FakeEngine(), Recorder()
    batcher = Batcher(
        engine, max_batch_tokens=max_batch_tokens, max_queue=max_queue, stuck_seconds=stuck_seconds, observer=seen
    )
    batcher.start()
    try:
        yield Setup(batcher, engine, seen)
    finally:
        engine.gate.set()
        batcher.stop(timeout=SECONDS)


def text(*ids: int, iterations: int = 1, threshold: float | None = None) -> Text:
    return Text(list(ids), iterations, threshold)


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


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.lists(st.tuples(st.lists(st.integers(0, 255), min_size=1, max_size=40), st.integers(1, 4)), min_size=1),
        min_size=1,
        max_size=8,
    )
)
def test_every_text_gets_its_own_answer_in_its_place(jobs: list[list[tuple[list[int], int]]]) -> None:
    with running(max_batch_tokens=100, max_queue=10_000) as setup:
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
    sure = max(range(50), key=lambda token: float(confidence(expected_logits([token], 2)[None])[0]))
    at_one, at_two = (float(confidence(expected_logits([sure], n)[None])[0]) for n in (1, 2))
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


def test_a_list_is_taken_whole_or_not_at_all() -> None:
    with running(max_queue=4) as setup:
        setup.hold()
        setup.submit(text(1), text(2))
        with pytest.raises(QueueFull):
            setup.submit(text(3), text(4))
        assert setup.batcher.queue_depth == 3
        last = setup.submit(text(5))
        with pytest.raises(QueueFull):
            setup.batcher.check_room(1)
        setup.release()
        answers(last)
        answers(setup.submit(*(text(n) for n in range(4))))


def test_retry_after_grows_with_the_excess_and_shrinks_with_the_pace() -> None:
    class Slow(FakeEngine):
        pause = 0.0

        def step(self, hidden: Sequence[FloatArray]) -> tuple[list[FloatArray], FloatArray]:
            time.sleep(self.pause)
            return super().step(hidden)

    def hints(pause: float) -> tuple[float, float]:
        engine = Slow()
        engine.pause = pause
        with running(engine, max_queue=2) as setup:
            for _ in range(8):
                answers(setup.submit(text(1)))
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
        left.abandon()
        left.abandon()
        assert left.future.cancelled()
        assert setup.batcher.queue_depth == 2
        setup.release()
        answers(stays)
    assert setup.seen.drops == {"client": 2}
    assert setup.seen.batches == [(1, 1, 0), (1, 1, 0)]


def test_what_is_abandoned_while_it_runs_is_counted_once() -> None:
    with running() as setup:
        job = setup.hold()
        job.abandon()
        setup.release()
        answers(setup.submit(text(2)))
    assert setup.seen.drops == {"client": 1}
    assert setup.seen.exits == [("depth", 1)]


def test_abandoning_what_is_done_does_nothing() -> None:
    with running() as setup:
        job = setup.submit(text(1))
        answers(job)
        job.abandon()
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
        assert setup.batcher.healthy()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_a_failure_of_their_text_alone(wrong: float) -> None:
    class Wrong(FakeEngine):
        def logits(self, state_LD: FloatArray) -> list[float]:
            return [wrong, 0.0] if state_LD[0, 0] == 66 else super().logits(state_LD)

    with running(Wrong()) as setup:
        good, bad = results(setup.submit(text(1), text(66)))
        assert isinstance(good, Answer)
        assert isinstance(bad, InferenceFailed)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # dying is what is tested
def test_when_the_thread_dies_everybody_hears_it_and_health_turns_red() -> None:
    with running() as setup:
        assert setup.batcher.healthy()
        running_job = setup.hold()
        waiting = setup.submit(text(2), text(3))
        setup.engine.die = True
        setup.release()
        for job in (running_job, waiting):
            assert {type(result) for result in results(job)} == {EngineDown}
        assert not setup.batcher.healthy()
        assert setup.batcher.queue_depth == 0
        with pytest.raises(EngineDown):
            setup.submit(text(4))


def test_a_turn_that_takes_too_long_turns_health_red_until_it_ends() -> None:
    with running(stuck_seconds=0.1) as setup:
        time.sleep(0.15)
        assert setup.batcher.healthy()  # an idle engine is not a stuck one
        job = setup.hold()
        wait_until(lambda: not setup.batcher.healthy())
        setup.release()
        answers(job)
        wait_until(setup.batcher.healthy)


def test_stopping_answers_what_waits_and_takes_nothing_new() -> None:
    with running(max_batch_tokens=1) as setup:
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
        setup.submit(text(0)).abandon()
    except Draining:
        return True
    return False


def test_stopping_has_an_end_and_each_text_still_one_answer() -> None:
    with running(max_batch_tokens=1) as setup:
        setup.engine.gate.clear()
        job = setup.submit(text(1), text(2), text(3))
        assert setup.engine.entered.wait(SECONDS)
        setup.batcher.stop(timeout=0.05)
        assert [type(result) for result in results(job)] == [Draining] * 3
        setup.release()


def test_a_batcher_that_was_never_started_stops_and_is_not_healthy() -> None:
    batcher = Batcher(FakeEngine(), max_batch_tokens=1, max_queue=1, stuck_seconds=1.0, observer=Recorder())
    job = batcher.submit([text(1)], time.monotonic() + SECONDS)
    assert not batcher.healthy()
    batcher.stop(timeout=1.0)
    assert [type(result) for result in results(job)] == [Draining]
