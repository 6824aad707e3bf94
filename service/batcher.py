"""Depth-wise continuous batching: one model's waiting texts, and what a turn of the engine makes of them.

Texts at different iterations share one call of `step`, finished ones leave at once, new ones join.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import structlog

from service.confidence import confidence, temperature_after
from service.engine import FloatArray
from service.engine_thread import EngineThread
from service.errors import DeadlineExceeded, Draining, EngineDown, InferenceFailed, QueueFull, RefrainError
from service.jobs import CALL_TOKENS, Answer, Drop, Exit, Job, Pace, Pool, Result, Text, Waiting
from service.scheduling import choose_batch, cut_short, patience

CONSIDERED = 2
"""So many times as many texts are considered for a turn as fit it if each is as long as the most urgent one."""

BACKGROUND_TEXTS = 64
"""So many may wait in the background, or those of one request."""

BACKGROUND_PART = 4
"""A batch in the background is that many times smaller."""


@dataclass(frozen=True)
class Limits:
    """What a batcher may take on: `batch_tokens` in one batch, padding counted; the others are of what waits."""

    batch_tokens: int
    queue_texts: int
    queue_tokens: int
    queue_seconds: float = math.inf
    brown_out_seconds: float = math.inf
    """Texts that may be cut are, once the queue takes this long."""


class Observer(Protocol):
    """Is told what happens; of texts that come or that their client drops, on the client's thread."""

    def batch(self, texts: int, real_tokens: int, padding_tokens: int) -> None: ...
    def exit(self, reason: Exit, iterations: int) -> None: ...
    def dropped(self, reason: Drop, texts: int) -> None: ...
    def queued(self, texts: int) -> None: ...


class RunsBatches(Protocol):
    """What the batcher needs of an engine; of what form a hidden state is, the engine alone knows."""

    def embed(self, ids: Sequence[Sequence[int]]) -> list[Any]: ...
    def step(self, hidden: Sequence[Any]) -> tuple[list[Any], FloatArray]: ...


class Batcher:
    """The waiting texts of one model. Its thread is shared with other models."""

    def __init__(
        self,
        engine: RunsBatches,
        thread: EngineThread,
        *,
        limits: Limits,
        observer: Observer,
        temperatures: Sequence[float] = (1.0,),
        pace: Pace | None = None,
    ) -> None:
        """`temperatures` of the iterations, as a bundle's calibration has them: a text's confidence rests on them.

        `pace` is what is known of it before the first text; without, a queue is not bounded in time until then, and a
        token counts as much as one of any model.
        """
        self._engine, self._thread, self._limits, self._observer = engine, thread, limits, observer
        self._temperatures = temperatures
        self._changed = thread.changed  # guards the pools and the flags below
        self._foreground, self._background = Pool(), Pool()
        self._arrivals = 0
        self._stopping = self._dead = False
        self._pace = Pace() if pace is None else pace
        self.token_seconds = self._pace.seconds(admitted=1) or 1.0  # as when it was loaded

    @property
    def queue_depth(self) -> int:
        """Texts waiting or between iterations."""
        return len(self._foreground.texts)

    @property
    def backlog_seconds(self) -> float:
        """How long the engine needs for what waits, at its measured pace."""
        return self._pace.seconds(admitted=self._foreground.admitted)

    def start(self) -> None:
        """Begins to run what is submitted."""
        self._thread.add(self)

    def stop(self, timeout: float) -> None:
        """Takes nothing new, answers what waits for up to `timeout` seconds, then refuses the rest."""
        with self._changed:
            self._stopping = True
            if self._thread.runs(self):
                self._changed.wait_for(lambda: not self._foreground.texts or self._dead, timeout)
            self._refuse(Draining)
        self._thread.remove(self)

    def check_room(self, texts: int, tokens: int, work: int, longest: float) -> None:
        """QueueFull where that many do not fit now, with the seconds after which they should; see seconds_to_room."""
        if (seconds := self.seconds_to_room(texts, tokens, work, longest)) is not None:
            raise QueueFull(seconds)

    def seconds_to_room(self, texts: int, tokens: int, work: int, longest: float, ahead: int = 0) -> float | None:
        """In how many seconds there should be room for so many texts, the largest of which has so much `work`.

        None: there is. There is none where what they would wait for takes longer than the queue may, or than the
        `longest` that they may wait, in seconds; texts that are `ahead`, and will be submitted first, count as waiting.
        """
        limits, now = self._limits, time.monotonic()
        excess_texts = len(self._foreground.texts) + ahead + texts - limits.queue_texts
        excess_tokens = self._foreground.tokens + tokens - limits.queue_tokens
        waits = self._pace.seconds(admitted=self._foreground.admitted_before(work)) + self._pace.seconds(texts=ahead)
        excess_seconds = waits - max(0.0, min(limits.queue_seconds, longest))
        if excess_texts <= 0 and excess_tokens <= 0 and excess_seconds <= 0:
            return None
        tokens_there = max(1, self._foreground.tokens)  # asked without a lock: it may be empty by now
        work_of_token = self._foreground.admitted / tokens_there
        seconds = max(excess_seconds, self._pace.seconds(admitted=excess_tokens * work_of_token, texts=excess_texts))
        # However slow it is, what waits is gone by its deadline.
        return min(seconds, self._foreground.until - now) if self._foreground.texts else seconds

    def submit(self, texts: Sequence[Text], deadline: float, *, background: bool = False) -> Job:
        """Queues all the texts or none; `deadline` is on the clock of `time.monotonic`.

        Background texts are run only when none waits in the foreground, of any model on the thread, and are taken only
        while there are few, or none yet. Raises QueueFull, EngineDown, Draining.
        """
        now = time.monotonic()
        job = Job(self._drop)
        pool = self._background if background else self._foreground
        with self._changed:
            if self._dead:
                raise EngineDown
            if self._stopping:
                raise Draining
            if not background:
                largest = max(text.work for text in texts)
                longest = patience(deadline - now, may_be_cut=all(text.may_be_cut for text in texts))
                self.check_room(len(texts), sum(len(text.ids) for text in texts), largest, longest)
            elif pool.texts and len(pool.texts) + len(texts) > BACKGROUND_TEXTS:
                raise QueueFull(self.backlog_seconds)
            if not self._foreground.texts:
                self._pace.starts(now)
            for text in texts:
                waiting = Waiting(self._arrivals, text, self, pool, job, now, deadline)
                job.texts.append(waiting)
                pool.add(waiting)
                self._arrivals += 1
            self._observer.queued(self.queue_depth)
            self._changed.notify_all()
        return job

    def first(self, *, background: bool) -> Sequence[Waiting]:
        """The texts of which one is the most urgent; who may be cut and should be is answered, and not among them."""
        if not background:
            self._let_go(time.monotonic())
        return (self._background if background else self._foreground).first()

    def run(self, leader: Waiting) -> None:
        """Takes one iteration of the leader and of those that fit it; answers those who are done."""
        began = time.monotonic()
        in_background = leader.pool is self._background  # whose turns are short: somebody may come meanwhile
        tokens = self._limits.batch_tokens // (BACKGROUND_PART if in_background else 1)
        with self._changed:
            near = islice(leader.pool.near(leader.length, CALL_TOKENS), CONSIDERED * tokens // leader.length)
            candidates = [leader, *(waiting for waiting in near if waiting is not leader)]
        places = choose_batch([waiting.length for waiting in candidates], tokens, CALL_TOKENS)
        batch = self._without_late([candidates[place] for place in places], began)
        if not batch:
            return
        outcomes = self._advance(batch)
        lengths = [waiting.length for waiting in batch]
        self._observer.batch(len(batch), sum(lengths), len(batch) * max(lengths) - sum(lengths))
        ended = time.monotonic()
        for waiting in batch:
            waiting.started = began if waiting.started is None else waiting.started
            waiting.iterations += 1
        done = self._judge_all(batch, outcomes, ended)
        if begun := [waiting for waiting in batch if waiting.text.may_be_cut]:
            with self._changed:
                for waiting in begun:
                    waiting.pool.begun(waiting)
        if leader.pool is self._foreground:
            self._pace.saw(batch, [waiting for waiting, _ in done], began, ended)
        self._finish(done)
        if any(isinstance(result, InferenceFailed) for _, result in done):
            self._check_engine()

    def give_up(self) -> None:
        """Refuses everything from now on: the thread has died."""
        self._dead = True
        self._refuse(EngineDown)
        self._changed.notify_all()

    def _drop(self, job: Job, reason: Drop) -> None:
        with self._changed:
            if dropped := [waiting for waiting in job.texts if waiting.pool.remove(waiting)]:
                job.texts = []  # else all are done, and the engine's thread is about to hand them over
            self._observer.queued(self.queue_depth)
            self._changed.notify_all()
        job.future.cancel()
        if dropped:
            self._observer.dropped(reason, len(dropped))

    def _without_late(self, batch: list[Waiting], now: float) -> list[Waiting]:
        """Those whose deadline has not passed; the others get their error instead of a place in the batch."""
        self._finish([(waiting, DeadlineExceeded()) for waiting in batch if now >= waiting.deadline])
        return [waiting for waiting in batch if now < waiting.deadline]

    def _advance(self, batch: list[Waiting]) -> list[FloatArray | InferenceFailed]:
        """One iteration of each: logits. When the engine fails each text runs alone, so that a bad one fails alone."""
        try:
            return self._step(batch)
        except Exception as error:  # noqa: BLE001  # the batch boundary: one text must not take the others along
            if len(batch) > 1:
                return [outcome for waiting in batch for outcome in self._advance([waiting])]
            structlog.get_logger().error("inference failed", error=repr(error), tokens=batch[0].length)
            return [InferenceFailed()]

    def _step(self, batch: list[Waiting]) -> list[FloatArray | InferenceFailed]:
        fresh = [waiting for waiting in batch if waiting.hidden is None]
        if fresh:
            for waiting, hidden in zip(fresh, self._engine.embed([w.text.ids for w in fresh]), strict=True):
                waiting.hidden = hidden
        states, logits_BC = self._engine.step([waiting.hidden for waiting in batch])
        for waiting, state in zip(batch, states, strict=True):
            waiting.hidden = state
        good_B = np.logical_and.reduce(np.isfinite(logits_BC), axis=1).tolist()
        return [logits_C if good else InferenceFailed() for logits_C, good in zip(logits_BC, good_B, strict=True)]

    def _check_engine(self) -> None:
        """Raises where not only a text failed but the engine has: on the token that every warm-up begins with."""
        _states, logits_BC = self._engine.step(self._engine.embed([[0]]))
        if not np.isfinite(logits_BC).all():
            raise ArithmeticError("the engine gives no numbers any more")

    def _judge_all(
        self, batch: Sequence[Waiting], outcomes: Sequence[FloatArray | InferenceFailed], now: float
    ) -> list[tuple[Waiting, Result]]:
        """The results of those who are done; the others go on to another iteration."""
        done: list[tuple[Waiting, Result]] = []
        unsure: list[tuple[Waiting, FloatArray]] = []
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, InferenceFailed):
                done.append((waiting, outcome))
            elif waiting.iterations >= waiting.text.max_iterations:
                done.append((waiting, _answer(waiting, outcome, "depth", now)))
            else:
                waiting.logits = outcome
                if waiting.text.exit_threshold < 1:
                    unsure.append((waiting, outcome))
        if unsure:
            temperatures = [temperature_after(self._temperatures, waiting.iterations) for waiting, _ in unsure]
            confident = confidence(np.array([logits_C for _, logits_C in unsure]), temperatures).tolist()
            sure = [one for one, found in zip(unsure, confident, strict=True) if found >= one[0].text.exit_threshold]
            done += [(waiting, _answer(waiting, logits_C, "confidence", now)) for waiting, logits_C in sure]
        return done

    def _let_go(self, now: float) -> None:
        """Answers those who rather have fewer iterations than wait: before each turn, which may be one too many."""
        backlog, brown_out, turn = self.backlog_seconds, self._limits.brown_out_seconds, self._thread.turn_seconds
        cut: list[tuple[Waiting, Result]] = []
        for waiting in self._foreground.willing.values():
            if waiting.logits is not None:
                left = waiting.deadline - now
                if reason := cut_short(backlog=backlog, brown_out=brown_out, time_left=left, turn=turn):
                    cut.append((waiting, _answer(waiting, waiting.logits, reason, now)))
        if cut:
            self._pace.saw([], [waiting for waiting, _ in cut], now, now)
            self._finish(cut)

    def _finish(self, results: Sequence[tuple[Waiting, Result]]) -> None:
        """Takes texts out of the pool and answers them; one that is gone already was abandoned or refused."""
        if not results:
            return
        completed = []
        with self._changed:
            for waiting, result in results:
                if waiting.pool.remove(waiting):
                    waiting.result = result
                    self._tell(result)
                    if waiting.job.answered():
                        completed.append(waiting.job)
            self._observer.queued(self.queue_depth)
            self._changed.notify_all()
        for job in completed:
            job.complete()

    def _tell(self, result: Result) -> None:
        if isinstance(result, Answer):
            self._observer.exit(result.exit, result.iterations)
        elif isinstance(result, DeadlineExceeded):
            self._observer.dropped("deadline", 1)

    def _refuse(self, error: Callable[[], RefrainError]) -> None:
        waiting = [*self._foreground.texts.values(), *self._background.texts.values()]
        self._finish([(text, error()) for text in waiting])


def _answer(waiting: Waiting, logits_C: FloatArray, reason: Exit, now: float) -> Answer:
    started = waiting.started or now
    return Answer(logits_C, waiting.iterations, reason, started - waiting.arrived, now - started)
