"""What waits in a batcher: texts, the jobs that they belong to, the pool that holds them, and the pace they go at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from service.errors import RefrainError

if TYPE_CHECKING:
    from service.batcher import Batcher
    from service.engine import FloatArray

CALL_TOKENS = 6
"""What a call of the engine costs besides its tokens, in tokens: padding below that is cheaper than a second call."""
MEMORY = 0.95
"""How much of what was measured before a turn still counts after it."""

LARGER = 4
"""So many times larger, and a text does not delay one that comes later."""
SIZES = 64
"""A text's work has fewer binary digits."""

Shortage = Literal["overload", "deadline"]
Exit = Literal["depth", "confidence", Shortage]
Drop = Literal["deadline", "client"]
Kind = tuple[int, int, int]
"""Length, how many iterations are asked, and whether fewer will do: 0 no, 1 yes, 2 yes, and it has had one."""


@dataclass(frozen=True, slots=True)
class Text:
    """What is asked of one text.

    At an exit threshold of 1 it takes all its iterations. One that `may_be_cut` may get fewer when the queue is long or
    its deadline near.
    """

    ids: list[int]
    max_iterations: int
    exit_threshold: float = 1.0
    may_be_cut: bool = False

    @property
    def work(self) -> int:
        """What it may ask of the engine in all, in tokens."""
        return self.max_iterations * (len(self.ids) + CALL_TOKENS)


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
        """Whether it got fewer iterations than it would have had at rest, or no second model."""
        return self.exit in ("overload", "deadline")


Result = Answer | RefrainError


class Job:
    """The texts of one request. `future` holds their results in order, an error in the place of a text that failed."""

    def __init__(self, drop: Callable[[Job, Drop], None]) -> None:
        self.future: Future[list[Result]] = Future()
        self.texts: list[Waiting] = []
        self._drop = drop
        self._answered = 0

    def abandon(self, reason: Drop) -> None:
        """Nobody waits any more: what is not yet done is dropped. May be called at any time, more than once."""
        self._drop(self, reason)

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
    iterations: int = 0
    hidden: Any = None
    logits: FloatArray | None = None  # of the last iteration
    result: Result | None = None
    kind: Kind = (0, 0, 0)  # as its pool has it
    # Each is read for every text in each turn.
    length: int = field(init=False)  # in tokens
    turn: int = field(init=False)  # what one iteration asks of the engine, in tokens
    admitted: int = field(init=False)  # what it might have asked when it came

    def __post_init__(self) -> None:
        self.length = len(self.text.ids)
        self.turn = self.length + CALL_TOKENS
        self.admitted = self.text.work

    @property
    def work(self) -> int:
        """What it may still ask of the engine, in tokens."""
        return (self.text.max_iterations - self.iterations) * self.turn

    @property
    def wanted(self) -> int:
        """What it asks until there is an answer to it, in tokens: where fewer iterations will do, one is enough."""
        return self.turn if self.text.may_be_cut and not self.iterations else self.work


class Pool:
    """Texts by their kind, and how much they are, which any thread may ask.

    Of one kind the first is the most urgent: it came first, and as the first run first, none of the others
    has fewer iterations before it. So nobody need look at more than the first ones to find the most urgent of all.
    """

    def __init__(self) -> None:
        self.texts: dict[int, Waiting] = {}  # in order of arrival
        self.willing: dict[int, Waiting] = {}  # those that may be cut
        self.tokens = 0
        self.admitted = 0  # what all of them might have asked when they came
        self.until = -math.inf  # the latest deadline that came: by then it is empty
        self._queues: dict[Kind, dict[int, Waiting]] = {}  # none is empty
        self._sizes = [0] * SIZES  # what texts might have asked, by the binary digits of that

    def admitted_before(self, work: int) -> int:
        """What those might have asked that a newcomer with so much work does not overtake: up to LARGER times its size.

        A size is everything up to twice as much work. One that is larger still is overtaken within a small part of the
        time that it has waited.
        """
        largest = work.bit_length() + LARGER.bit_length() - 1
        return sum(self._sizes[: largest + 1])

    def first(self) -> list[Waiting]:
        """The first of each kind."""
        return [next(iter(queue.values())) for queue in self._queues.values()]

    def near(self, length: int, reach: int) -> Iterator[Waiting]:
        """Those that are at most so many tokens longer or shorter, the nearest in length first."""
        distances = {kind: abs(kind[0] - length) for kind in self._queues}
        for kind in sorted((kind for kind in distances if distances[kind] <= reach), key=distances.__getitem__):
            yield from self._queues[kind].values()

    def add(self, waiting: Waiting) -> None:
        """Takes a text in."""
        self.texts[waiting.number] = waiting
        if waiting.text.may_be_cut:
            self.willing[waiting.number] = waiting
        self.tokens += waiting.length
        self.admitted += waiting.admitted
        self.until = max(self.until, waiting.deadline)
        self._sizes[waiting.admitted.bit_length()] += waiting.admitted
        self._enqueue(waiting)

    def begun(self, waiting: Waiting) -> None:
        """Takes note that a text has had iterations: the first makes who may be cut less urgent."""
        if waiting.number in self.texts and waiting.kind != _kind(waiting):
            self._dequeue(waiting)
            self._enqueue(waiting)

    def remove(self, waiting: Waiting) -> bool:
        """Lets a text go; False if it has gone already."""
        if self.texts.pop(waiting.number, None) is None:
            return False
        self.willing.pop(waiting.number, None)
        self.tokens -= waiting.length
        self.admitted -= waiting.admitted
        self._sizes[waiting.admitted.bit_length()] -= waiting.admitted
        self._dequeue(waiting)
        return True

    def _enqueue(self, waiting: Waiting) -> None:
        waiting.kind = _kind(waiting)
        self._queues.setdefault(waiting.kind, {})[waiting.number] = waiting

    def _dequeue(self, waiting: Waiting) -> None:
        queue = self._queues[waiting.kind]
        del queue[waiting.number]
        if not queue:
            del self._queues[waiting.kind]


def _kind(waiting: Waiting) -> Kind:
    fewer_will_do = 1 + (waiting.iterations > 0) if waiting.text.may_be_cut else 0
    return waiting.length, waiting.text.max_iterations, fewer_will_do


class Pace:
    """How fast texts have lately been done, whatever else took the thread meanwhile.

    What counts of a text is what it was admitted with, so that early exits, too, show as a faster pace.
    """

    def __init__(self, seconds: float = 0.0, admitted: int = 0, texts: int = 0) -> None:
        """Begin with so many texts that took so long together, or with nothing."""
        self._seconds, self._admitted, self._texts = seconds, float(admitted), float(texts)
        self._since = 0.0

    def starts(self, now: float) -> None:
        """There is something to do again."""
        self._since = now

    def saw(self, batch: Sequence[Waiting], done: Sequence[Waiting], began: float, now: float) -> None:
        """Count a turn of these texts that ends now, and counts more than those before it; and some that are done."""
        # What a text that is done has not asked for, counts as if it were done too.
        got_on = [(waiting, waiting.turn) for waiting in batch] + [(waiting, waiting.work) for waiting in done]
        before = self._seconds / self._admitted if self._admitted else math.inf  # for a token
        self._admitted = MEMORY * self._admitted + sum(tokens for _, tokens in got_on)
        self._texts = MEMORY * self._texts + sum(tokens / waiting.admitted for waiting, tokens in got_on)
        # Where all that waited left within the turn, and another came, `_since` is later than its beginning.
        seconds = MEMORY * self._seconds + now - min(self._since, began)
        # A turn doubles it at the most: of seconds in which the process stood still, no pace follows.
        self._seconds = min(seconds, 2 * before * self._admitted)
        self._since = now

    def seconds(self, *, admitted: float = 0, texts: int = 0) -> float:
        """How long so much takes, the longer of both; 0 as long as nothing was done."""
        if not self._texts:
            return 0.0
        return self._seconds * max(admitted / self._admitted, texts / self._texts)
