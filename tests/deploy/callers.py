"""Clients that send as fast as they are answered, and know beforehand what the answers must be."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException

from tests.service.fakes import wait_until

ANSWER_SECONDS = 60.0  # until a client gives up on an answer
FAULT_SECONDS = 0.02  # until one tries again that got no answer
LOAD_SECONDS = 120.0  # until clients stop by themselves, whatever the test does

Known = Mapping[str, Mapping[str, float]]
"""text -> its scores"""


@dataclass(frozen=True)
class Call:
    """One request, seen from outside; times as time.monotonic() has them."""

    name: str
    sent: float
    ended: float
    fault: str  # empty: the answer was the one that was known


@dataclass
class Load:
    """Some clients on connections of their own, which they keep as long as they may."""

    port: int
    known: Known
    calls: list[Call] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    stop: threading.Event = field(default_factory=threading.Event)

    def faults(self) -> list[Call]:
        """The requests that were not answered as they should have been."""
        return [call for call in self.calls if call.fault]

    def await_calls(self, count: int, seconds: float = LOAD_SECONDS) -> None:
        """Wait for so many more answers, good or bad."""
        target = len(self.calls) + count
        wait_until(lambda: len(self.calls) >= target, seconds)

    def client(self, offset: int) -> None:
        """Send one text after the other, beginning somewhere else than the other clients."""
        until = time.monotonic() + LOAD_SECONDS
        texts = itertools.islice(itertools.cycle(self.known), offset, None)
        while not self.stop.is_set() and time.monotonic() < until:
            with closing(HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)) as connection:
                while not self.stop.is_set() and self._send(connection, next(texts)):
                    pass
            if self.calls[-1].fault:
                self.stop.wait(FAULT_SECONDS)

    def _send(self, connection: HTTPConnection, text: str) -> bool:
        """Whether the connection is good for another request."""
        name = f"call-{next(self._numbers)}"
        sent = time.monotonic()
        more = False
        try:
            connection.request("POST", "/classify", json.dumps({"inputs": text}), {"x-request-id": name})
            answer = connection.getresponse()
            body = answer.read()
            more = not answer.will_close
            fault = self._judge(text, answer.status, body)
        except (OSError, HTTPException) as error:
            fault = f"{type(error).__name__}: {error}"
        self.calls.append(Call(name, sent, time.monotonic(), fault))
        return more

    def _judge(self, text: str, status: int, body: bytes) -> str:
        if status != 200:
            return f"HTTP {status} {body[:200]!r}"
        scores = json.loads(body)["results"][0]["scores"]
        return "" if scores == self.known[text] else f"another answer: {scores}"


@contextmanager
def loading(port: int, known: Known, clients: int) -> Iterator[Load]:
    """Load a port for the length of the block; the clients have ended when it is left."""
    load = Load(port, known)
    threads = [threading.Thread(target=load.client, args=(number,), daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        load.stop.set()
        for thread in threads:
            thread.join(ANSWER_SECONDS)
    assert not any(thread.is_alive() for thread in threads), "a client still waits for its answer"
