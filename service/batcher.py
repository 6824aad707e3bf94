"""Depth-wise continuous batching: which waiting texts run next, and the thread that runs them.

There is no timer. While the engine runs, texts gather; when it is free, the oldest text goes, with those that fit it.
Texts at different iterations share one call of `step`, finished ones leave at once, new ones join.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol

import numpy as np
import structlog

from service.engine import FloatArray
from service.errors import DeadlineExceeded, Draining, EngineDown, InferenceFailed, QueueFull, RefrainError

LOOKAHEAD = 256
"""How many of the oldest texts may be considered for a batch."""
CALL_TOKENS = 16
"""What a call of the engine costs besides its tokens, in tokens: padding below that is cheaper than a second call."""
PACE_SMOOTHING = 0.2
WAIT_SECONDS = 1.0


@dataclass(frozen=True)
class Text:
    """What is asked of one text; without a threshold it takes all its iterations."""

    ids: list[int]
    max_iterations: int
    exit_threshold: float | None


@dataclass(frozen=True)
class Answer:
    """One text's result. `queue_seconds` ends when its first iteration begins; the rest is `inference_seconds`."""

    logits: FloatArray
    iterations: int
    queue_seconds: float
    inference_seconds: float


class Observer(Protocol):
    """Is told what happens, on the engine's thread or, of texts that their client dropped, on the client's."""

    def batch(self, texts: int, real_tokens: int, padding_tokens: int) -> None: ...
    def exit(self, reason: Literal["depth", "confidence"], iterations: int) -> None: ...
    def dropped(self, reason: Literal["deadline", "client"], texts: int) -> None: ...


class RunsBatches(Protocol):
    """What the batcher needs of an engine."""

    def embed(self, ids: Sequence[Sequence[int]]) -> list[FloatArray]: ...
    def step(self, hidden: Sequence[FloatArray]) -> tuple[list[FloatArray], FloatArray]: ...


@dataclass(frozen=True)
class _Stepped:
    """What one iteration made of a text."""

    hidden: FloatArray
    logits: FloatArray
    confidence: float


@dataclass(eq=False)
class _Waiting:
    """A text in the pool, between its arrival and its answer."""

    number: int
    text: Text
    job: Job
    place: int
    arrived: float
    deadline: float
    started: float | None = None
    iterations: int = 0
    hidden: FloatArray | None = None

    @property
    def length(self) -> int:
        return len(self.text.ids)


def choose_batch(lengths: Sequence[int], max_tokens: int, call_tokens: int) -> list[int]:
    """Which of the waiting texts run next: places in `lengths`, which is in order of arrival.

    The oldest always runs, so a text waits at most for as many turns as those before it have iterations left. The
    others join it nearest in length first, while the padded batch stays within `max_tokens` and the padding that a text
    brings costs no more than the call of its own that it saves.
    """
    leader = lengths[0]
    chosen, shortest_allowed, longest = [0], leader - call_tokens, leader
    for place in sorted(range(1, len(lengths)), key=lambda place: abs(lengths[place] - leader)):
        length = lengths[place]
        grown = max(longest, length)
        if (len(chosen) + 1) * grown > max_tokens:
            continue
        brought = longest - length if length <= longest else len(chosen) * (length - longest)
        if brought > call_tokens or length < shortest_allowed:
            continue
        chosen.append(place)
        longest = grown
    return chosen


def confidence(logits_BC: FloatArray) -> FloatArray:
    """The largest softmax probability of each row; not a number where a logit is none."""
    with np.errstate(invalid="ignore"):
        shifted_BC = logits_BC - logits_BC.max(axis=1, keepdims=True)
        largest_B: FloatArray = 1.0 / np.exp(shifted_BC).sum(axis=1)
    return largest_B


class Job:
    """The texts of one request. `future` holds their answers in order, an error in the place of a text that failed."""

    def __init__(self, size: int, drop: Callable[[Job], None]) -> None:
        self.future: Future[list[Answer | RefrainError]] = Future()
        self._results: list[Answer | RefrainError | None] = [None] * size
        self._missing = size
        self._drop = drop

    def abandon(self) -> None:
        """Nobody waits any more: what is not yet done is dropped. May be called at any time, more than once."""
        self._drop(self)

    def resolve(self, place: int, result: Answer | RefrainError) -> None:
        """Puts one text's result in its place; the last one completes the job. For one thread at a time."""
        self._results[place] = result
        self._missing -= 1
        if self._missing == 0:
            with suppress(InvalidStateError):  # cancelled by whoever waited
                self.future.set_result([result for result in self._results if result is not None])


class Batcher:
    """A pool of texts and the one thread that runs an engine over it."""

    def __init__(
        self,
        engine: RunsBatches,
        *,
        max_batch_tokens: int,
        max_queue: int,
        stuck_seconds: float,
        observer: Observer,
    ) -> None:
        self._engine, self._observer = engine, observer
        self._max_batch_tokens, self._max_queue, self._stuck_seconds = max_batch_tokens, max_queue, stuck_seconds
        self._pool: dict[int, _Waiting] = {}  # in order of arrival
        self._arrivals = 0
        self._changed = threading.Condition()  # guards the pool and the flags below
        self._stopping = False
        self._dead = False
        self._turn_began: float | None = None
        self._texts_per_second = 0.0
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)

    @property
    def queue_depth(self) -> int:
        """Texts waiting or between iterations."""
        return len(self._pool)

    def start(self) -> None:
        """Begins to run what is submitted."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Takes nothing new, answers what waits for up to `timeout` seconds, then refuses the rest."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        self._refuse_all(Draining)

    def healthy(self) -> bool:
        """False once the thread has died, or has been in one turn for longer than `stuck_seconds`."""
        began = self._turn_began
        stuck = began is not None and time.monotonic() - began > self._stuck_seconds
        return self._thread.is_alive() and not self._dead and not stuck

    def check_room(self, texts: int) -> None:
        """QueueFull where that many texts do not fit now, with the seconds after which they should."""
        excess = len(self._pool) + texts - self._max_queue
        if excess > 0:
            raise QueueFull(excess / self._texts_per_second if self._texts_per_second > 0 else 1.0)

    def submit(self, texts: Sequence[Text], deadline: float) -> Job:
        """Queues all the texts or none; `deadline` is on the clock of `time.monotonic`.

        Raises QueueFull, EngineDown, Draining.
        """
        now = time.monotonic()
        job = Job(len(texts), self._drop)
        with self._changed:
            if self._dead:
                raise EngineDown
            if self._stopping:
                raise Draining
            self.check_room(len(texts))
            for place, text in enumerate(texts):
                self._pool[self._arrivals] = _Waiting(self._arrivals, text, job, place, now, deadline)
                self._arrivals += 1
            self._changed.notify()
        return job

    def _drop(self, job: Job) -> None:
        with self._changed:
            dropped = [waiting for waiting in self._pool.values() if waiting.job is job]
            for waiting in dropped:
                del self._pool[waiting.number]
        job.future.cancel()
        if dropped:
            late = time.monotonic() >= dropped[0].deadline
            self._observer.dropped("deadline" if late else "client", len(dropped))

    def _run(self) -> None:
        try:
            while batch := self._next_batch():
                self._take_turn(batch)
        except BaseException:
            structlog.get_logger().exception("the batcher's thread died")
            self._dead = True
            self._refuse_all(EngineDown)
            raise

    def _next_batch(self) -> list[_Waiting]:
        """Waits for texts; those that it returns stay in the pool. Empty: it is time to end."""
        with self._changed:
            self._turn_began = None
            while not self._pool and not self._stopping:
                self._changed.wait(WAIT_SECONDS)
            if not self._pool:
                return []
            self._turn_began = time.monotonic()
            oldest = list(islice(self._pool.values(), LOOKAHEAD))
        places = choose_batch([waiting.length for waiting in oldest], self._max_batch_tokens, CALL_TOKENS)
        return [oldest[place] for place in places]

    def _take_turn(self, batch: list[_Waiting]) -> None:
        began = time.monotonic()
        batch = self._without_late(batch, began)
        if not batch:
            return
        for waiting in batch:
            waiting.started = waiting.started or began
        outcomes = self._advance(batch)
        lengths = [waiting.length for waiting in batch]
        self._observer.batch(len(batch), sum(lengths), len(batch) * max(lengths) - sum(lengths))
        ended = time.monotonic()
        finished = [
            (waiting, result)
            for waiting, outcome in zip(batch, outcomes, strict=True)
            if (result := self._judge(waiting, outcome, ended)) is not None
        ]
        self._finish(finished)
        pace = len(finished) / (ended - began) if ended > began else self._texts_per_second
        self._texts_per_second += PACE_SMOOTHING * (pace - self._texts_per_second)

    def _without_late(self, batch: list[_Waiting], now: float) -> list[_Waiting]:
        """Those whose deadline has not passed; the others get their error instead of a place in the batch."""
        self._finish([(waiting, DeadlineExceeded()) for waiting in batch if now >= waiting.deadline])
        return [waiting for waiting in batch if now < waiting.deadline]

    def _advance(self, batch: list[_Waiting]) -> list[_Stepped | InferenceFailed]:
        """One iteration of each. When the engine fails, each text runs alone, so that a bad one fails alone."""
        try:
            return self._step(batch)
        except Exception as error:  # noqa: BLE001  # the batch boundary: one text must not take the others along
            if len(batch) > 1:
                return [outcome for waiting in batch for outcome in self._advance([waiting])]
            structlog.get_logger().error("inference failed", error=repr(error), tokens=batch[0].length)
            return [InferenceFailed()]

    def _step(self, batch: list[_Waiting]) -> list[_Stepped | InferenceFailed]:
        fresh = [waiting for waiting in batch if waiting.hidden is None]
        if fresh:
            for waiting, hidden in zip(fresh, self._engine.embed([w.text.ids for w in fresh]), strict=True):
                waiting.hidden = hidden
        states, logits_BC = self._engine.step([waiting.hidden for waiting in batch if waiting.hidden is not None])
        confidence_B = confidence(logits_BC)
        return [
            _Stepped(states[row], logits_C, float(confidence_B[row]))
            if np.isfinite(logits_C).all()
            else InferenceFailed()
            for row, logits_C in enumerate(logits_BC)
        ]

    def _judge(
        self, waiting: _Waiting, outcome: _Stepped | InferenceFailed, now: float
    ) -> Answer | RefrainError | None:
        """The text's result, or None when it goes on to another iteration."""
        if isinstance(outcome, InferenceFailed):
            return outcome
        text, started = waiting.text, waiting.started or now
        waiting.hidden, waiting.iterations = outcome.hidden, waiting.iterations + 1
        deep_enough = waiting.iterations >= text.max_iterations
        confident = text.exit_threshold is not None and outcome.confidence >= text.exit_threshold
        if not deep_enough and not confident:
            return None
        return Answer(outcome.logits, waiting.iterations, started - waiting.arrived, now - started)

    def _finish(self, results: Sequence[tuple[_Waiting, Answer | RefrainError]]) -> None:
        """Takes texts out of the pool and answers them; one that is gone already was abandoned or refused."""
        with self._changed:
            for waiting, result in results:
                if self._pool.pop(waiting.number, None) is not None:
                    self._tell(waiting, result)
                    waiting.job.resolve(waiting.place, result)

    def _tell(self, waiting: _Waiting, result: Answer | RefrainError) -> None:
        if isinstance(result, Answer):
            reason: Literal["depth", "confidence"]
            reason = "depth" if result.iterations >= waiting.text.max_iterations else "confidence"
            self._observer.exit(reason, result.iterations)
        elif isinstance(result, DeadlineExceeded):
            self._observer.dropped("deadline", 1)

    def _refuse_all(self, error: Callable[[], RefrainError]) -> None:
        with self._changed:
            self._finish([(waiting, error()) for waiting in self._pool.values()])
