"""Connections that go on to a process with far fewer: none is lost, and none goes to who cannot take it."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from service import handover
from service.handover import CONNECTIONS, FAR_MORE, LOOKS, NONE_WANTED, STALE_NS, Handover
from service.sockets import listen
from tests.service.fakes import wait_until
from tests.service.live import classify_bytes, live, reply


class Transport(asyncio.Transport):
    """What the event loop has of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__({"socket": connection})


class Peer:
    """A process as far as it matters here: it accepts, hands over, takes, and knows what it has."""

    def __init__(self, directory: Path, slot: int, processes: int, sockets: ExitStack) -> None:
        self.handover, self.has, self.sockets = Handover(directory, slot, processes), [], sockets
        sockets.callback(self.handover.close)
        self.handover.wants = True
        self.handover.say(0)

    has: list[socket.socket]

    def accept(self, connection: socket.socket) -> bool:
        """Whether it was handed over."""
        handed = self.handover.hand_over(Transport(connection), len(self.has) + 1)
        if handed:
            connection.close()
        else:
            self.has.append(self.sockets.enter_context(connection))
        self.handover.say(len(self.has))
        return handed

    def take(self) -> None:
        for connection in self.handover.take():
            self.handover.arrived()
            self.has.append(self.sockets.enter_context(connection))
        self.handover.say(len(self.has))


@contextmanager
def meeting(processes: int) -> Iterator[tuple[list[Peer], ExitStack]]:
    with TemporaryDirectory(prefix="r") as directory, ExitStack() as sockets:
        yield [Peer(Path(directory), slot, processes, sockets) for slot in range(processes)], sockets


def connect(sockets: ExitStack) -> tuple[socket.socket, socket.socket]:
    client, ours = socket.socketpair()
    return sockets.enter_context(client), ours


@given(
    processes=st.integers(2, 4),
    steps=st.lists(
        st.tuples(st.sampled_from(["accept", "accept", "take"]), st.integers(0, 3)), max_size=25
    ),  # an inbox may hold no more than eleven
)
def test_every_connection_is_somewhere_and_no_process_has_far_more_than_another(
    processes: int, steps: Sequence[tuple[str, int]]
) -> None:
    with meeting(processes) as (peers, sockets):
        clients = []
        for what, number in steps:
            peer = peers[number % processes]
            if what == "take":
                peer.take()
            else:
                client, ours = connect(sockets)
                clients.append(client)
                peer.accept(ours)
        for peer in [*peers, *peers, *peers]:  # as many at once as fit a turn
            peer.take()
        for number, client in enumerate(clients):
            client.sendall(bytes([number]))
        assert sorted(one.recv(9)[0] for peer in peers for one in peer.has) == list(range(len(clients)))
        counts = [len(peer.has) for peer in peers]
        assert max(counts) <= FAR_MORE * min(counts) + 2  # an only one is kept, whatever is on its way


def test_who_stands_still_or_wants_none_is_given_none(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10**12
    monkeypatch.setattr(handover.time, "monotonic_ns", lambda: now)
    with meeting(2) as ((one, other), sockets):
        other.handover.wants = False
        other.handover.say(0)
        assert not any(one.accept(connect(sockets)[1]) for _ in range(3))
        other.handover.wants = True
        other.handover.say(0)
        now += STALE_NS
        assert one.accept(connect(sockets)[1])
        now += 1
        assert not one.accept(connect(sockets)[1])


def test_who_is_gone_or_has_a_full_inbox_is_given_no_more() -> None:
    with meeting(2) as ((one, other), sockets):
        connections = [connect(sockets)[1] for _ in range(30)]
        handed = sum(one.accept(connection) for connection in connections)
        assert 0 < handed + len(one.has) == len(connections)
        while len(other.has) < handed:
            before = len(other.has)
            other.take()
            assert len(other.has) > before
        other.has.clear()
        other.handover.say(0)
        other.handover.inbox.close()
        assert not one.accept(connect(sockets)[1])


def test_one_that_takes_anothers_place_begins_anew() -> None:
    with meeting(2) as ((one, other), sockets):
        for _ in range(2):
            one.accept(connect(sockets)[1])
        assert len(one.has) == 1  # the second is on its way to who never took it
        other.handover.inbox.close()
        another = Peer(Path(other.handover._inboxes[1]).parent, 1, 2, sockets)
        assert one.accept(connect(sockets)[1])
        another.take()
        assert (len(one.has), len(another.has)) == (1, 1)


def test_of_many_new_connections_in_a_moment_few_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(handover.time, "monotonic", lambda: now)
    with meeting(2) as ((one, other), sockets):

        def handed(often: int) -> int:
            """Of so many short ones, each of which meets two others."""
            count = 0
            for _ in range(often):
                one.has = [sockets.enter_context(socket.socket()) for _ in range(2)]
                count += one.accept(connect(sockets)[1])
                other.take()
                other.has.clear()
                other.handover.say(0)
            return count

        assert handed(3 * LOOKS) == LOOKS
        now += 0.5
        assert handed(LOOKS) == LOOKS // 2


def full_disk() -> AbstractContextManager[None]:
    """No file can grow."""
    return limited(resource.RLIMIT_FSIZE, 0)


def out_of_files() -> AbstractContextManager[None]:
    """No file can be opened."""
    lowest = os.dup(0)
    os.close(lowest)
    return limited(resource.RLIMIT_NOFILE, lowest)


@contextmanager
def limited(what: int, limit: int) -> Iterator[None]:
    before = resource.getrlimit(what)
    resource.setrlimit(what, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def test_without_room_to_meet_it_is_an_error_and_not_a_signal_later(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(OSError, match=r"\[Errno (27|28)\]"):
        Handover(tmp_path, 0, 64)
    Handover(tmp_path, 0, 64).close()
    (board,) = (file.stat() for file in tmp_path.iterdir() if not file.is_socket())
    assert 512 * board.st_blocks >= board.st_size > 8192  # all of it is there, and no page comes when it is written


def test_who_is_out_of_files_says_what_is_lost_and_is_given_none_for_a_while() -> None:
    with meeting(2) as ((one, other), sockets):
        client, ours = connect(sockets)
        one.accept(connect(sockets)[1])
        assert one.accept(ours)
        with out_of_files(), capture_logs() as logs:
            other.take()
        assert [line["event"] for line in logs] == ["a connection that was handed over is lost: out of files"]
        assert (client.recv(1), other.has) == (b"", [])
        assert not one.accept(connect(sockets)[1])


def tcp(sockets: ExitStack) -> tuple[socket.socket, socket.socket]:
    """A client's end and the accepted one."""
    with listen("127.0.0.1", 0) as listener:
        client = sockets.enter_context(socket.create_connection(listener.getsockname(), timeout=20))
        return client, listener.accept()[0]


def test_a_server_answers_what_is_handed_over_and_wants_none_once_its_engine_hangs() -> None:
    with TemporaryDirectory(prefix="r") as directory, ExitStack() as sockets:
        peer, inbox = Peer(Path(directory), 0, 2, sockets), Handover(Path(directory), 1, 2)
        for _ in range(9):  # that nobody wants yet
            assert not peer.accept(tcp(sockets)[1])
        with live(handover=inbox, stuck_seconds=0.3, drain_seconds=600) as served:
            wait_until(lambda: inbox._board[1, CONNECTIONS] != NONE_WANTED)
            client, ours = tcp(sockets)
            assert peer.accept(ours)
            client.sendall(classify_bytes("a film"))
            assert reply(client).status == 200
            served.fake.recurrent.gate.clear()
            client.sendall(classify_bytes("another"))
            wait_until(lambda: inbox._board[1, CONNECTIONS] == NONE_WANTED)
            assert not peer.accept(tcp(sockets)[1])
            served.fake.recurrent.gate.set()


def test_what_is_handed_over_in_the_last_moment_is_told_to_go_elsewhere() -> None:
    with TemporaryDirectory(prefix="r") as directory, ExitStack() as sockets:
        peer, inbox = Peer(Path(directory), 0, 2, sockets), Handover(Path(directory), 1, 2)
        for _ in range(4):  # that nobody wants yet
            assert not peer.accept(tcp(sockets)[1])
        with live(handover=inbox) as served:
            client, ours = tcp(sockets)
            client.sendall(classify_bytes("too late"))
            loop = served.server.servers[0].get_loop()

            def end() -> None:
                loop.remove_reader(inbox.inbox)  # the moment after the last look
                peer.accept(ours)
                served.fake.app.state.runtime.leave_port()
                served.server.should_exit = True

            wait_until(lambda: inbox._board[1, CONNECTIONS] != NONE_WANTED)
            loop.call_soon_threadsafe(end)
            answer = reply(client)
            assert (answer.status, answer.headers["connection"]) == (503, "close")
