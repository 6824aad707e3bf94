"""Connections that go on to a process with far fewer: none is lost, and none goes to who cannot take it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import handover
from service.handover import FAR_MORE, LOOKS, STALE_NS, Handover


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
