"""The server's life: how it drains, when it ends."""

from __future__ import annotations

import asyncio
import resource
import socket
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import cast

import structlog
import uvicorn
from fastapi import FastAPI

from service.connections import LAST_WORD, RESERVE, Connection, check_all
from service.early_refusals import EarlyRefusals
from service.handover import Handover
from service.runtime import Runtime

KEEP_ALIVE_SECONDS = 75  # longer than common proxies keep theirs, so that the proxy closes first
CHECK_TICKS = 3  # tenths of a second between two looks for clients that take too long
TELL_TICKS = 10  # tenths of a second between two lines of log that sum up early refusals
GIVE_UP_TICKS = 10  # tenths of a second that the engines may be found dead or stuck: long enough for a probe to see it
BACKLOG = 128  # of each listener: clients that have left already stand in that line, and probes behind them
SPARE_FILES = 128  # open files that are no connections: models, logs, the collector of the metrics
LAST_SECONDS = 1  # after the drain, for what is still running then: it was given up


class Server(uvicorn.Server):
    """uvicorn's server, which drains on a signal, and ends when models cannot be loaded or the engines are down.

    `report` is told the phase, ten times a second as long as the event loop runs.
    """

    def __init__(
        self,
        app: FastAPI,
        report: Callable[[str], None] = lambda phase: None,
        handover: Handover | None = None,
    ) -> None:
        self._runtime: Runtime = app.state.runtime
        self._refusals = EarlyRefusals(self._runtime)
        self._handover = handover
        self._taking: set[asyncio.Task[None]] = set()  # the event loop itself keeps no task alive
        self._protocol = partial(Connection, runtime=self._runtime, refusals=self._refusals, handover=handover)
        _allow_open_files(self._runtime.settings.max_connections)
        # No limit_concurrency: it would turn probes away too, and in plain text. Runtime.admitted bounds the work.
        config = uvicorn.Config(
            app,
            loop="uvloop",
            http=cast(type[asyncio.Protocol], self._protocol),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nobody here asks for a client's address
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=LAST_SECONDS,
        )
        super().__init__(config)
        self._report = report
        self._ticks_down = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Leave, however often it is said: the signal may come from the supervisor and from whoever told it so."""
        self._runtime.leave()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, also for connections that other processes hand over."""
        await super().startup(sockets)
        if self._handover is not None:
            asyncio.get_running_loop().add_reader(self._handover.inbox, self._take, self._handover)

    def _take(self, handover: Handover) -> None:
        for connection in handover.take():
            task = asyncio.get_running_loop().create_task(self._connect(connection, handover))
            self._taking.add(task)
            task.add_done_callback(self._taking.discard)

    async def _connect(self, connection: socket.socket, handover: Handover) -> None:
        make = partial(
            self._protocol,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            taken=True,
        )
        try:
            await asyncio.get_running_loop().connect_accepted_socket(make, connection)
        except OSError:  # its client has left
            handover.arrived()
            connection.close()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End; what was handed over in the last moment is still taken, and told to go elsewhere like all others."""
        if self._handover is not None:
            asyncio.get_running_loop().remove_reader(self._handover.inbox)
            self._take(self._handover)
            self._handover.close()
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Look, ten times a second, whether it is time to go."""
        self._report(self._runtime.phase)
        if self._handover is not None:
            able = self._runtime.phase == "ready" and self._runtime.engine_thread.alive()
            self._handover.wants = able and not self._runtime.leaving
            self._handover.say(len(self.server_state.connections))
        self._look_after_the_engines()
        if self._runtime.port_is_left:  # new connections then find whoever else listens there
            for server in self.servers:
                server.close()
        if self._runtime.failure is not None or self._runtime.drained(time.monotonic()):
            self.should_exit = True
        if counter % CHECK_TICKS == 0:
            check_all(self.server_state.connections)
        if counter % TELL_TICKS == 0:
            self._refusals.tell()
        # Kept-alive connections end with their next answer, so that none brings a request once the drain has begun.
        self.config.encoded_headers = (
            [LAST_WORD] if self._runtime.leaving else []
        )  # uvicorn takes it up within a second
        return await super().on_tick(counter)

    def _look_after_the_engines(self) -> None:
        # In ticks, not in seconds: a machine that was asleep finds everything late when it wakes.
        self._ticks_down = 0 if self._runtime.engine_thread.alive() else self._ticks_down + 1
        if self._ticks_down == GIVE_UP_TICKS:
            self._runtime.give_up()


def _allow_open_files(connections: int) -> None:
    """Raise the process's soft limit of open files to what so many connections need, as far as the hard one lets us."""
    needed = connections + RESERVE + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        if allowed < needed:
            structlog.get_logger().warning("fewer connections than set", open_files=allowed, needed=needed)
