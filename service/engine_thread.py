"""The one thread on which engines run: it takes turns, each for one batch of one model, whichever is most urgent."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import structlog

from service.scheduling import most_urgent

if TYPE_CHECKING:
    from service.jobs import Waiting

WAIT_SECONDS = 1.0
NICENESS = 5  # the event loop goes first: it needs little, and probes wait for it
MEMORY = 0.95
"""How much of the longest turn still counts after a shorter one."""


class HasTexts(Protocol):
    """What the thread needs of a model's batcher; all but `run` are called with the lock held.

    `token_seconds`: how long a token of its texts takes, for the models to be compared by.
    """

    token_seconds: float

    def first(self, *, background: bool) -> Sequence[Waiting]: ...
    def run(self, leader: Waiting) -> None: ...
    def give_up(self) -> None: ...


class EngineThread:
    """Runs the batches of all models of a process, so that they don't contend for its core and for the interpreter.

    There is no timer. While an engine runs, texts gather; when the thread is free, the most urgent text goes, with
    those of its model that fit it. Background texts run when no other waits, whatever their model.
    """

    def __init__(self, *, stuck_seconds: float) -> None:
        self.changed = threading.Condition()  # guards the batchers' pools, and everything below
        self._stuck_seconds = stuck_seconds
        self._batchers: list[HasTexts] = []
        self._ended = False
        self._dead = False
        self._turn_began: float | None = None
        self.turn_seconds = 0.0  # how long turns take, the longest of late
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begins to take turns."""
        self._thread.start()

    def add(self, batcher: HasTexts) -> None:
        """Lets a model's texts take turns."""
        with self.changed:
            self._batchers.append(batcher)
            self.changed.notify_all()

    def remove(self, batcher: HasTexts) -> None:
        """Forgets a model; it may be gone already."""
        with self.changed:
            self._batchers = [other for other in self._batchers if other is not batcher]

    def runs(self, batcher: HasTexts) -> bool:
        """Whether a model's texts get their turns: not once the thread has died or hangs in one turn."""
        return batcher in self._batchers and self.alive()

    def alive(self) -> bool:
        """False once the thread has died, or has been in one turn for longer than `stuck_seconds`."""
        began = self._turn_began
        stuck = began is not None and time.monotonic() - began > self._stuck_seconds
        return self._thread.is_alive() and not self._dead and not stuck

    def give_up(self) -> None:
        """Refuses what waits and what is in the present turn, for good: the thread has died or hangs."""
        with self.changed:
            self._dead = True
            for batcher in self._batchers:
                batcher.give_up()

    def end(self, timeout: float) -> None:
        """Ends the thread after its turn, waiting for up to `timeout` seconds."""
        with self.changed:
            self._ended = True
            self.changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        os.nice(NICENESS)  # on Linux a thread's own
        try:
            while (leader := self._next_turn()) is not None:
                leader.batcher.run(leader)
                del leader  # an idle thread must not keep the last texts and their engine alive
        except BaseException:
            structlog.get_logger().exception("the engine thread died")
            self.give_up()
            raise

    def _next_turn(self) -> Waiting | None:
        """Waits for texts: the most urgent one. None: it is time to end."""
        with self.changed:
            if self._turn_began is not None:
                self.turn_seconds = max(MEMORY * self.turn_seconds, time.monotonic() - self._turn_began)
            self._turn_began = None
            while not self._ended:
                for background in (False, True):
                    if leader := self._most_urgent(background=background):
                        self._turn_began = time.monotonic()
                        return leader
                self.changed.wait(WAIT_SECONDS)
            return None

    def _most_urgent(self, *, background: bool) -> Waiting | None:
        groups = [(batcher.token_seconds, batcher.first(background=background)) for batcher in self._batchers]
        texts = [text for _, group in groups for text in group]
        if not texts:
            return None
        now, dearest = time.monotonic(), max(token_seconds for token_seconds, _ in groups)
        work = [text.wanted * token_seconds / dearest for token_seconds, group in groups for text in group]
        return texts[most_urgent([now - text.arrived for text in texts], work)]
