"""Requests on the wire: encoded beforehand, sent over kept-alive connections, every answer checked and counted."""

import asyncio
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import httptools

from loadtest.recording import Recording
from loadtest.target import request_headers

SCORE_TOLERANCE = 1.1e-5
"""What is promised of the same text in any company, and what rounding to six places adds."""
GIVE_UP_SECONDS = 15.0
"""After the last request; longer than the service's own deadline, so that its 504 is heard."""
_RESULT = re.compile(rb'"label":\s*"([^"]*)",\s*"score":\s*([-+.\deE]+)')
_CODE = re.compile(rb'"code":\s*"([a-z_]+)"')

Answers = Sequence[tuple[bytes, float]]
"""The label, as JSON writes it between its quotes, and the score that each text of a request must get."""


def fault(status: int, body: bytes, known: Answers) -> str | None:
    """What is wrong with an answer; None when it is the right one."""
    if status != 200:
        code = _CODE.search(body)
        return f"HTTP {status} {code[1].decode() if code else ''}".strip()
    found = _RESULT.findall(body)
    if len(found) != len(known):
        return f"{len(found)} results for {len(known)} texts"
    for (label, score), (known_label, known_score) in zip(found, known, strict=True):
        if label != known_label or abs(float(score) - known_score) > SCORE_TOLERANCE:
            return "an answer that is not its text's"
    return None


@dataclass(frozen=True)
class Request:
    """One request's bytes, and what must come back."""

    payload: bytes
    known: Answers


def encode(host: str, body: bytes) -> bytes:
    """POST /classify as it goes over the wire."""
    headers = {"Host": host} | request_headers() | {"Content-Length": str(len(body))}
    lines = ["POST /classify HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Traffic:
    """Requests of one kind in an endless order, and what became of them."""

    def __init__(self, requests: Sequence[Request], connections: int) -> None:
        self.requests: Iterator[Request] = cycle(requests)
        self.connections = connections
        self.recording = Recording()
        self.per_second: dict[int, int] = {}
        """Right answers, by the second of the measured time that they came in."""
        self.late = 0
        """Right answers that came after the measured time."""


class Load:
    """What all connections share: the measured window, on the clock of `time.perf_counter`, and where to connect."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.begin = self.end = math.inf
        self.in_flight = 0

    @property
    def over(self) -> bool:
        return time.perf_counter() >= self.end

    def answered(self, traffic: Traffic, began: float, wrong: str | None) -> None:
        """Counts a failure whenever it comes, a right answer when it comes in the window."""
        now = time.perf_counter()
        self.in_flight -= 1
        if wrong is not None:
            traffic.recording.fail(wrong)
        elif now >= self.end:
            traffic.late += 1
        elif now >= self.begin:
            traffic.recording.milliseconds.append(1000 * (now - began))
            second = int(now - self.begin)
            traffic.per_second[second] = traffic.per_second.get(second, 0) + 1

    async def connect(self, done: Callable[["Connection"], None]) -> "Connection":
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(GIVE_UP_SECONDS):
            _, connection = await loop.create_connection(lambda: Connection(self, done), self.host, self.port)
        return connection


class Connection(asyncio.Protocol):
    """One kept-alive connection with at most one request on its way; `done` is told when it is free, or closed."""

    def __init__(self, load: Load, done: Callable[["Connection"], None]) -> None:
        self._load, self._done = load, done
        self._parser = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._sent: tuple[Traffic, Request, float] | None = None
        self._transport: asyncio.WriteTransport
        self.closed = False

    def send(self, traffic: Traffic, began: float) -> None:
        """Sends the next request; `began` is when its latency starts."""
        request = next(traffic.requests)
        self._sent = traffic, request, began
        self._load.in_flight += 1
        self._transport.write(request.payload)

    def give_up(self, reason: str) -> None:
        """Ends the connection; the request on its way, if any, failed for this reason."""
        self.closed = True
        self._settle(reason)
        self._transport.abort()

    def _settle(self, wrong: str | None) -> None:
        if self._sent:
            traffic, _, began = self._sent
            self._sent = None
            self._load.answered(traffic, began, wrong)

    def connection_made(self, transport: asyncio.WriteTransport) -> None:  # type: ignore[override]  # a TCP one can write
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.give_up(f"not HTTP: {error}")
            self._done(self)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed:
            self.closed = True
            self._settle("the connection was closed before the answer")
            self._done(self)

    def on_message_begin(self) -> None:
        self._body.clear()

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if not self._sent:
            self.give_up("")
        else:
            _, request, _ = self._sent
            self._settle(fault(self._parser.get_status_code(), b"".join(self._body), request.known))
            if not self._parser.should_keep_alive():
                self.closed = True
                self._transport.close()
        self._done(self)
