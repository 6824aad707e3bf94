"""New connections go on to a process that has far fewer: the kernel spreads them by chance, and few may meet one."""

from __future__ import annotations

import os
import socket
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

FAR_MORE = 1.25  # times as many connections, and one
STALE_NS = 500_000_000  # a process that has not been heard of for so long may stand still, and is given none
TAKEN_AT_ONCE = 16  # in one turn of the event loop
NONE_WANTED = -1  # said in place of a number of connections
CONNECTIONS, SAID, TAKEN, GIVEN = range(4)
"""What a process writes into its row of the board: how many connections it has, when it said so (`time.monotonic_ns`),
how many it has taken so far, and, from here on, how many it has given to each process."""


class Handover:
    """One process's part: it says how many connections it has, hands over those that are too many, takes others'.

    An accepted connection is a file that another process can be sent. Who does not take it, as it is dead or its inbox
    is full, leaves it where it was.
    """

    def __init__(self, directory: Path, slot: int, processes: int) -> None:
        """`directory` is where the processes of the service meet. Raises OSError."""
        self._slot = slot
        self._inboxes = [str(directory / f"{number}.inbox") for number in range(processes)]
        shape = processes, GIVEN + processes
        with (directory / "connections").open("a+b") as file:
            os.ftruncate(file.fileno(), 8 * shape[0] * shape[1])
            self._board = np.memmap(file, np.int64, "r+", shape=shape)
        self.wants = False
        self.say(0)
        # What was given to the process whose place this one takes, and not taken, is gone with it.
        self._board[slot, TAKEN] = self._board[:, GIVEN + slot].sum()
        Path(self._inboxes[slot]).unlink(missing_ok=True)
        self.inbox, self._outbox = (socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2))
        self.inbox.bind(self._inboxes[slot])
        self.inbox.setblocking(False)
        self._outbox.setblocking(False)

    def say(self, connections: int) -> None:
        """Tell the others how many connections this process has; unless it `wants` any, that it shall be given none."""
        self._board[self._slot, CONNECTIONS] = connections if self.wants else NONE_WANTED
        self._board[self._slot, SAID] = time.monotonic_ns()

    def hand_over(self, connection: int, connections: int) -> bool:
        """Send a connection, given by its file's number, to who has far fewer than ours; whether there is one.

        If so it is that process's, and shall be closed here.
        """
        said, given = self._board[:, :GIVEN].T, self._board[:, GIVEN:]
        on_their_way = given.sum(axis=0) - said[TAKEN]
        wants = (said[CONNECTIONS] != NONE_WANTED) & (time.monotonic_ns() - said[SAID] <= STALE_NS)
        wants[self._slot] = False
        if not wants.any():
            return False
        theirs = np.where(wants, said[CONNECTIONS] + on_their_way, np.iinfo(np.int64).max)
        fewest = int(theirs.argmin())
        if connections + on_their_way[self._slot] <= FAR_MORE * theirs[fewest] + 1:
            return False
        rights = socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [connection])
        try:
            self._outbox.sendmsg([b"."], [rights], 0, self._inboxes[fewest])
        except OSError:
            return False
        given[self._slot, fewest] += 1
        return True

    def take(self) -> Iterator[socket.socket]:
        """The connections that others have handed over, some at once."""
        for _ in range(TAKEN_AT_ONCE):
            try:
                _, files, *_ = socket.recv_fds(self.inbox, 1, 1)
            except OSError:
                return
            self._board[self._slot, TAKEN] += 1
            yield from (socket.socket(fileno=file) for file in files)
