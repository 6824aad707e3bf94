"""Lines of the log on their way out: whoever writes one neither waits for the reader nor fails with it."""

from __future__ import annotations

import io
import json
import os
import select
import threading
import time
from collections import deque
from collections.abc import Iterator

MOST_LINES = 10_000
"""That wait at the same time; those beyond it are lost, and counted."""
PAUSE = 0.05
"""Seconds in which lines come together: a call of the system for each would take time from requests."""
ATOMIC_BYTES = select.PIPE_BUF
"""So much goes into a pipe at once, and so never into the middle of another process's line."""


class LogLines(io.TextIOBase):
    """A text stream into a file descriptor, as the logging libraries want one.

    A thread writes. What cannot be written (no reader any more, a full disk) is lost, and so is what finds too many
    lines waiting for a reader that stands still; the first line that can be written again says how many.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lines: deque[str] = deque()
        self._lost = 0
        self._changed = threading.Condition()
        self._busy = self._draining = self._torn = False
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    def write(self, text: str) -> int:
        """Take a line, with its end."""
        with self._changed:
            if len(self._lines) < MOST_LINES:
                self._lines.append(text)
            else:
                self._lost += 1
            if not self._busy:
                self._busy = True
                self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """Nothing: it is called after each line, and to wait then is what this is here to avoid. See `drain`."""

    def drain(self, timeout: float) -> None:
        """Wait until everything is written, for `timeout` seconds at most; lines that come later are still taken."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._busy, timeout)

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._busy)
                self._changed.wait_for(lambda: self._draining, PAUSE)
            while lines := self._take():
                for chunk in _chunks(lines):
                    self._write_chunk(chunk)

    def _take(self) -> list[str]:
        with self._changed:
            lines = list(self._lines)
            self._lines.clear()
            if not lines:
                self._busy = False
                self._changed.notify_all()
        return lines

    def _write_chunk(self, lines: list[bytes]) -> None:
        with self._changed:
            lost, self._lost = self._lost, 0
        try:
            if lost:
                self._write_whole(_report(lost))
                lost = 0
            self._write_whole(b"".join(lines))
        except OSError:
            with self._changed:
                self._lost += lost + len(lines)

    def _write_whole(self, data: bytes) -> None:
        if self._torn:
            data = b"\n" + data  # what a full disk has cut is one line, and this another
        while data:
            data = data[os.write(self._descriptor, data) :]
            self._torn = bool(data)


def _chunks(lines: list[str]) -> Iterator[list[bytes]]:
    chunk: list[bytes] = []
    size = 0
    for line in lines:
        data = line.encode(errors="backslashreplace")
        if chunk and size + len(data) > ATOMIC_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(data)
        size += len(data)
    yield chunk


def _report(lost: int) -> bytes:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    line = {"event": "lines of the log were lost", "lines": lost, "level": "warning", "timestamp": now}
    return (json.dumps(line) + "\n").encode()
