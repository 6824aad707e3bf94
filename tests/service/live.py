"""The service on a real socket in a thread of the test's process, with its real server and fake engines."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPConnection, parse_headers
from types import MappingProxyType
from typing import Any, NamedTuple

from service.bundle import Bundle
from service.handover import Handover
from service.server import Server
from service.sockets import listen
from tests.service.fakes import Fake, fake_app, fake_bundle, wait_until


@dataclass
class Live:
    """A server in a thread of this process."""

    fake: Fake
    server: Server
    thread: threading.Thread
    listener: socket.socket

    @property
    def port(self) -> int:
        port: int = self.listener.getsockname()[1]
        return port

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)

    def count(self, name: str, **labels: str) -> float:
        registry = self.fake.app.state.runtime.metrics.registry
        return registry.get_sample_value(name, labels) or 0.0

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] = MappingProxyType({})
    ) -> tuple[int, dict[str, Any]]:
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def send(self, data: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        connection.sendall(data)
        return connection


def classify_bytes(text: str, **asked: Any) -> bytes:
    body = json.dumps({"inputs": text, **asked}).encode()
    return b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


class Reply(NamedTuple):
    """One answer as it came."""

    status: int
    headers: Message
    body: bytes


def replies(connection: socket.socket) -> Iterator[Reply]:
    """Read answers one after another, interim ones skipped, until the service ends the connection."""
    with connection.makefile("rb") as stream:
        while line := stream.readline():
            status, headers = int(line.split()[1]), parse_headers(stream)
            if status != 100:
                yield Reply(status, headers, stream.read(int(headers["content-length"])))


def reply(connection: socket.socket) -> Reply:
    """Read the one answer that is to come."""
    return next(replies(connection))


def is_closed(connection: socket.socket) -> bool:
    """Whether the service ended the connection and sent nothing more; it must do so before the socket's timeout."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


@contextmanager
def live(
    bundles: Sequence[Bundle] = (fake_bundle(),), *, handover: Handover | None = None, **settings: Any
) -> Iterator[Live]:
    fake = fake_app(bundles, **settings)
    listener = listen("127.0.0.1", 0)
    server = Server(fake.app, handover=handover)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    served = Live(fake, server, thread, listener)
    try:
        wait_until(lambda: served.ask("GET", "/readyz")[0] == 200)
        fake.recurrent.entered.clear()
        fake.recurrent.steps = 0
        yield served
    finally:
        fake.recurrent.gate.set()
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()
