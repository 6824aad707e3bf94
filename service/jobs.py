"""What waits in a batcher: texts, the jobs that they belong to, the pool that holds them, and the pace they go at."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from service.engine import FloatArray
from service.errors import RefrainError

if TYPE_CHECKING:
    from service.batcher import Batcher

CALL_TOKENS = 6
"""What a call of the engine costs besides its tokens, in tokens: padding below that is cheaper than a second call."""
MEMORY = 0.95
"""How much of what was measured before a turn still counts after it."""

Exit = Literal["depth", "confidence", "overload", "deadline"]


@dataclass(frozen=True, slots=True)
class Text:
    """What is asked of one text.

    Without an exit threshold, or at 1, it takes all its iterations. One that `may_be_cut` may get fewer when the queue
    is long or its deadline near.
    """

    ids: list[int]
    max_iterations: int
    exit_threshold: float | None = None
    may_be_cut: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """One text's result, and why it left. `queue_seconds` ends when its first iteration begins."""

    logits: FloatArray
    iterations: int
    exit: Exit
    queue_seconds: float
    inference_seconds: float

    @property
    def degraded(self) -> bool:
        """Whether it got fewer iterations than it would have had at rest."""
        return self.exit in ("overload", "deadline")


Result = Answer | RefrainError


class Job:
    """The texts of one request. `future` holds their results in order, an error in the place of a text that failed."""

    def __init__(self, drop: Callable[[Job], None]) -> None:
        self.future: Future[list[Result]] = Future()
        self.texts: list[Waiting] = []
        self._drop = drop
        self._answered = 0

    def abandon(self) -> None:
        """Nobody waits any more: what is not yet done is dropped. May be called at any time, more than once."""
        self._drop(self)

    def answered(self) -> bool:
        """Counts a text whose result is there; True for the last one. For one thread at a time."""
        self._answered += 1
        return self._answered == len(self.texts)

    def complete(self) -> None:
        """Hands the results over to whoever waits."""
        results = [text.result for text in self.texts if text.result is not None]
        self.texts = []  # states are large, and somebody may keep the job
        with suppress(InvalidStateError):  # cancelled by whoever waited
            self.future.set_result(results)


@dataclass(eq=False, slots=True)
class Waiting:
    """A text in the pool, between its arrival and its answer. Times are those of `time.monotonic`."""

    number: int
    text: Text
    batcher: Batcher
    pool: Pool
    job: Job
    arrived: float
    deadline: float
    started: float | None = None
    stepped: float = 0.0
    iterations: int = 0
    hidden: Any = None
    result: Result | None = None

    @property
    def length(self) -> int:
        """In tokens."""
        return len(self.text.ids)

    @property
    def turn(self) -> int:
        """What one iteration asks of the engine, in tokens."""
        return len(self.text.ids) + CALL_TOKENS

    @property
    def work(self) -> int:
        """What it may still ask of the engine, in tokens."""
        return (self.text.max_iterations - self.iterations) * self.turn


class Pool:
    """Texts in order of arrival, and how much they are."""

    def __init__(self) -> None:
        self.texts: dict[int, Waiting] = {}
        self.tokens = 0
        self.work = 0

    def add(self, waiting: Waiting) -> None:
        """Takes a text in."""
        self.texts[waiting.number] = waiting
        self.tokens += waiting.length
        self.work += waiting.work

    def remove(self, waiting: Waiting) -> bool:
        """Lets a text go; False if it has gone already."""
        if self.texts.pop(waiting.number, None) is None:
            return False
        self.tokens -= waiting.length
        self.work -= waiting.work
        return True

    def iterated(self, waiting: Waiting) -> None:
        """Counts one iteration of a text, whether it is still here or not."""
        if waiting.number in self.texts:
            self.work -= waiting.turn
        waiting.iterations += 1


class Pace:
    """How fast an engine has run lately."""

    def __init__(self) -> None:
        self._seconds = self._work = self._texts = 0.0

    def saw(self, seconds: float, work: int, texts: int) -> None:
        """Counts a turn, in which that many texts were done, more than those before it."""
        self._seconds = MEMORY * self._seconds + seconds
        self._work = MEMORY * self._work + work
        self._texts = MEMORY * self._texts + texts

    def of_work(self, work: int) -> float:
        """Seconds that so much work takes; 0 as long as nothing was measured."""
        return work * self._seconds / self._work if self._work > 0 else 0.0

    def of_texts(self, texts: int) -> float:
        """Seconds in which so many texts are done; 0 as long as none was."""
        return texts * self._seconds / self._texts if self._texts > 0 else 0.0
