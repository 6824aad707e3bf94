"""The server's life: the socket it listens on, how it drains, when it ends."""

from __future__ import annotations

import asyncio
import socket
import time
from functools import partial
from types import FrameType
from typing import cast

import uvicorn
from fastapi import FastAPI

from service.connections import Connection, allow_open_files, check_all
from service.errors import StartError
from service.runtime import Runtime

KEEP_ALIVE_SECONDS = 75  # longer than common proxies keep theirs, so that the proxy closes first
CHECK_TICKS = 3  # tenths of a second between two looks for clients that take too long
LAST_SECONDS = 1  # after the drain, for what is still running then: it was given up


class Server(uvicorn.Server):
    """uvicorn's server, which first drains on a signal, and ends when the models cannot be loaded."""

    def __init__(self, app: FastAPI) -> None:
        self._runtime: Runtime = app.state.runtime
        allow_open_files(self._runtime.settings.max_connections)
        # No limit_concurrency: it would turn probes away too, and in plain text. Runtime.admitted bounds the work.
        config = uvicorn.Config(
            app,
            loop="uvloop",
            http=cast(type[asyncio.Protocol], partial(Connection, runtime=self._runtime)),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nobody here asks for a client's address
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=LAST_SECONDS,
        )
        super().__init__(config)
        self._told = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, stop at once at the second; either way the process ends by itself, status 0."""
        if self._told:
            self.should_exit = self.force_exit = True
        self._told = True
        self._runtime.drain()

    async def on_tick(self, counter: int) -> bool:
        """Look, ten times a second, whether it is time to go."""
        if self._runtime.failure is not None or self._runtime.drained(time.monotonic()):
            self.should_exit = True
        if counter % CHECK_TICKS == 0:
            check_all(self.server_state.connections)
        return await super().on_tick(counter)


def bind(host: str, port: int) -> socket.socket:
    """Open the listening socket; raises StartError when the address is wrong or taken."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]  # Python adds the address, which is said already
        raise StartError(f"cannot listen on {host}:{port}: {reason}") from None
