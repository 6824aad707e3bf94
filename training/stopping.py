"""Ctrl-C and SIGTERM end a training at the next step, with a checkpoint, instead of in the middle of one."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Set by the first SIGINT or SIGTERM; the loop ends at the next step. A later one ends at once.

    Within a second it is taken for the same: launchers pass on what the terminal has sent to every process already.
    """

    asked_at: float | None = None

    @property
    def asked(self) -> bool:
        return self.asked_at is not None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
        elif now - self.asked_at > 1:
            raise KeyboardInterrupt


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    request = StopRequest()
    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
