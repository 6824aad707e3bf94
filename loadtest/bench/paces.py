"""When requests are sent: as soon as the last one is answered, or at times fixed beforehand."""

import asyncio
import time
from collections import deque
from collections.abc import Sequence

from loadtest.bench.connection import Connection, Load, Traffic

MAX_CONNECTIONS = 8192
"""Of open arrivals: more than the service lets wait."""
_RETRY_SECONDS = 0.1
_TICK_SECONDS = 0.002
"""Between two looks at what is due: a look at each arrival costs the cores that the service runs on."""
_BEHIND = 32
"""Requests sent without a look at what has come, where more are overdue."""


async def rest(seconds: float) -> None:
    """Sleeps for so long, a tick at least, and then hears what has come.

    Nothing wakes it meanwhile: to wake it for each answer would cost the cores that the service runs on.
    """
    time.sleep(max(seconds, _TICK_SECONDS))
    await asyncio.sleep(0)


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
                await rest(wait)
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
