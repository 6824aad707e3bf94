"""The load generator: requests encoded beforehand, sent over kept-alive connections, every answer checked.

It shares the cores with the service, so it does nothing while it measures that could be done before or after.
`python -m loadtest.bench.client` does one job for loadtest.bench.workers.
"""

import asyncio
import json
import math
import random
import re
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

import httptools
import uvloop

from loadtest.bench import processes, workers
from loadtest.recording import Recording
from loadtest.target import request_headers

SCORE_TOLERANCE = 1.1e-5
"""What is promised of the same text in any company, and what rounding to six places adds."""
GIVE_UP_SECONDS = 15.0
"""After the last request; longer than the service's own deadline, so that its 504 is heard."""
MAX_CONNECTIONS = 8192
"""Of open arrivals: more than the service lets wait."""
_RETRY_SECONDS = 0.1
_TICK_SECONDS = 0.002
"""Between two looks at what is due: a look at each arrival costs the cores that the service runs on."""
_BEHIND = 32
"""Requests sent without a look at what has come, where more are overdue."""
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


class Closed:
    """Closed loop: each connection sends its next request as soon as the last one is answered."""

    def __init__(self, load: Load, traffics: Sequence[Traffic]) -> None:
        self._load, self._traffics = load, traffics
        self.connections: set[Connection] = set()
        self.opening: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        for traffic in self._traffics:
            for _ in range(traffic.connections):
                await self._open(traffic)

    async def _open(self, traffic: Traffic) -> None:
        connection = await self._load.connect(lambda connection: self._next(traffic, connection))
        self.connections.add(connection)
        connection.send(traffic, time.perf_counter())

    def _next(self, traffic: Traffic, connection: Connection) -> None:
        if self._load.over:
            return
        if not connection.closed:
            connection.send(traffic, time.perf_counter())
            return
        self.connections.discard(connection)
        task = asyncio.get_running_loop().create_task(self._again(traffic))
        self.opening.add(task)
        task.add_done_callback(self.opening.discard)

    async def _again(self, traffic: Traffic) -> None:
        try:
            await self._open(traffic)
        except OSError as error:
            traffic.recording.fail(_no_connection(error))
            await asyncio.sleep(_RETRY_SECONDS)
            if not self._load.over:
                await self._again(traffic)


class Open:
    """Open arrivals: requests are due at times fixed beforehand, whether or not earlier ones are answered."""

    def __init__(self, load: Load, traffic: Traffic, due: Sequence[float]) -> None:
        self._load, self._traffic, self._due = load, traffic, due
        self.connections: set[Connection] = set()
        self._free: deque[Connection] = deque()
        self.opening: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        for _ in range(self._traffic.connections):
            connection = await self._load.connect(self._done)
            self.connections.add(connection)
            self._free.append(connection)

    async def arrive(self) -> None:
        """Sends each request once it is due, which is when its latency starts."""
        for number, seconds in enumerate(self._due):
            began = self._load.begin + seconds
            wait = began - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(max(wait, _TICK_SECONDS))
            elif number % _BEHIND == 0:  # one that is behind must hear answers too
                await asyncio.sleep(0)
            self._send(began)

    def _send(self, began: float) -> None:
        while self._free:
            connection = self._free.popleft()
            if not connection.closed:
                return connection.send(self._traffic, began)
        if len(self.connections) + len(self.opening) >= MAX_CONNECTIONS:
            return self._traffic.recording.fail(f"not sent: all {MAX_CONNECTIONS} connections were busy")
        task = asyncio.get_running_loop().create_task(self._send_on_another(began))
        self.opening.add(task)
        return task.add_done_callback(self.opening.discard)

    async def _send_on_another(self, began: float) -> None:
        try:
            connection = await self._load.connect(self._done)
        except OSError as error:
            return self._traffic.recording.fail(_no_connection(error))
        self.connections.add(connection)
        return connection.send(self._traffic, began)

    def _done(self, connection: Connection) -> None:
        if connection.closed:
            self.connections.discard(connection)
        else:
            self._free.append(connection)


def _no_connection(error: OSError) -> str:
    return f"no connection: {error.strerror or 'not in time'}"


def arrivals(per_second: float, seconds: float, seed: int) -> list[float]:
    """Poisson arrivals: rising times from 0 on, below `seconds`."""
    rng, times, now = random.Random(seed), [], 0.0
    while (now := now + rng.expovariate(per_second)) < seconds:
        times.append(now)
    return times


async def drive(job: dict[str, Any]) -> dict[str, Any]:
    """Load for `warmup` seconds, then for the measured ones; then waits for what is on its way."""
    load, traffics = Load(job["host"], job["port"]), [_traffic(one, job) for one in job["traffics"]]
    rate = job["arrivals_per_second"]
    due = arrivals(rate, job["seconds"], job["seed"]) if rate else []
    pace = Open(load, traffics[0], due) if rate else Closed(load, traffics)
    await pace.start()
    await asyncio.sleep(job["warmup"])
    service, own = processes.cpu_seconds(job["pid"]), time.process_time()
    load.begin = time.perf_counter()
    await (pace.arrive() if isinstance(pace, Open) else asyncio.sleep(job["seconds"]))
    load.end = time.perf_counter()
    used = {pid: used - service.get(pid, 0.0) for pid, used in processes.cpu_seconds(job["pid"]).items()}
    generator = time.process_time() - own
    await _last_answers(load, pace)
    seconds = load.end - load.begin
    for traffic in traffics:
        traffic.recording.generator_cpu_seconds, traffic.recording.generator_wall_seconds = generator, seconds
    return {
        "seconds": seconds,
        "sent": len(due),
        "late": sum(traffic.late for traffic in traffics),
        "recordings": [asdict(traffic.recording) for traffic in traffics],
        "per_second": [traffics[0].per_second.get(second, 0) for second in range(math.ceil(seconds))],
        "service_cpu_seconds": list(used.values()),
    }


async def _last_answers(load: Load, pace: Closed | Open) -> None:
    deadline = time.perf_counter() + GIVE_UP_SECONDS
    while (load.in_flight or pace.opening) and time.perf_counter() < deadline:
        await asyncio.sleep(0.01)
    for connection in list(pace.connections):
        connection.give_up(f"no answer within {GIVE_UP_SECONDS:g} s of the end")


def _traffic(described: dict[str, Any], job: dict[str, Any]) -> Traffic:
    host = f"{job['host']}:{job['port']}"
    requests = [
        Request(
            encode(host, request["body"].encode()),
            [(json.dumps(label, ensure_ascii=False)[1:-1].encode(), score) for label, score in request["known"]],
        )
        for request in described["requests"]
    ]
    return Traffic(requests, described["connections"])


def prepare(job: dict[str, Any]) -> Callable[[], Any]:
    with suppress(ValueError, OSError):  # fewer files than we would like: a connection that fails will say so
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return lambda: uvloop.run(drive(job))


if __name__ == "__main__":
    workers.serve(prepare)
