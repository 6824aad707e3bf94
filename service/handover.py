"""New connections go on to a process that has far fewer: the kernel spreads them by chance, and few may meet one."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import structlog

FAR_MORE = 1.25  # times as many connections, and one
LOOKS = 32
"""So many new connections in a second, and at once, are compared with others' numbers.

Where more come they are short and many, chance is good enough, and to hand them over costs more than it brings.
"""
STALE_NS = 250_000_000  # a process that has not been heard of for so long may stand still, and is given none
TAKEN_AT_ONCE = 16  # in one turn of the event loop
OUT_OF_FILES_SECONDS = 5.0  # for which a process that could not take a connection wants none
NONE_WANTED = -1  # said in place of a number of connections
CONNECTIONS, SAID, TAKEN, GIVEN = range(4)
"""What a process writes into its row of the board: how many connections it has, when it said so (`time.monotonic_ns`),
how many it has taken so far, and, from here on, how many it has given to each process."""


class Handover:
    """One process's part: it says how many connections it has, hands over those that are too many, takes others'.

    An accepted connection is a file that another process can be sent. It stays where it was if the other is dead, has
    not been heard of for a moment, or has a full inbox; what lies in the inbox of one that dies then dies with it.
    """

    def __init__(self, directory: Path, slot: int, processes: int) -> None:
        """`directory` is where the processes of the service meet. Raises OSError."""
        self._slot = slot
        self._inboxes = [str(directory / f"{number}.inbox") for number in range(processes)]
        shape = processes, GIVEN + processes
        with (directory / "connections").open("a+b") as file:
            os.posix_fallocate(file.fileno(), 0, 8 * shape[0] * shape[1])  # without it a full disk is a fatal signal
            self._board = np.memmap(file, np.int64, "r+", shape=shape).view(np.ndarray)
        self.wants = False
        self._out_of_files_until = 0.0
        self._looks, self._looked = float(LOOKS), time.monotonic()
        self.say(0)
        # What was given to the process whose place this one takes, and not taken, is gone with it.
        self._board[slot, TAKEN] = self._board[:, GIVEN + slot].sum()
        Path(self._inboxes[slot]).unlink(missing_ok=True)
        self.inbox, self._outbox = (socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2))
        self.inbox.bind(self._inboxes[slot])
        self.inbox.setblocking(False)
        self._outbox.setblocking(False)

    def close(self) -> None:
        """Give and take no more."""
        self.wants = False
        self.say(0)
        self.inbox.close()
        self._outbox.close()

    def say(self, connections: int) -> None:
        """Tell the others how many connections this process has; unless it `wants` any, that it shall be given none."""
        now = time.monotonic_ns()
        wants = self.wants and now >= self._out_of_files_until * 1e9
        self._board[self._slot, CONNECTIONS] = connections if wants else NONE_WANTED
        self._board[self._slot, SAID] = now

    def hand_over(self, connection: asyncio.Transport, connections: int) -> bool:
        """Send a connection to who has far fewer than ours; whether there is one.

        If so it is that process's, and shall be closed here.
        """
        if connections < 2 or not self._may_look():
            return False
        board = self._board.copy()  # others write into it meanwhile
        on_their_way = np.maximum(0, board[:, GIVEN:].sum(axis=0) - board[:, TAKEN])
        wants = (board[:, CONNECTIONS] != NONE_WANTED) & (time.monotonic_ns() - board[:, SAID] <= STALE_NS)
        wants[self._slot] = False
        theirs = np.where(wants, board[:, CONNECTIONS] + on_their_way, np.iinfo(np.int64).max)
        fewest = int(theirs.argmin())
        if connections + on_their_way[self._slot] <= FAR_MORE * theirs[fewest] + 1:
            return False
        rights = socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [connection.get_extra_info("socket").fileno()])
        self._board[self._slot, GIVEN + fewest] += 1
        try:
            self._outbox.sendmsg([b"."], [rights], 0, self._inboxes[fewest])
        except OSError:
            self._board[self._slot, GIVEN + fewest] -= 1
            return False
        return True

    def take(self) -> Iterator[socket.socket]:
        """The connections that others have handed over, some at once; each shall be reported as `arrived`."""
        for _ in range(TAKEN_AT_ONCE):
            try:
                _, files, *_ = socket.recv_fds(self.inbox, 1, 1)
            except OSError:
                return
            if not files:
                self._out_of_files_until = time.monotonic() + OUT_OF_FILES_SECONDS
                self.arrived()
                structlog.get_logger().error("a connection that was handed over is lost: out of files")
            for file in files:
                os.set_inheritable(file, False)
                yield socket.socket(fileno=file)

    def arrived(self) -> None:
        """Count a connection that was taken as no longer on its way: it is among ours, or has failed."""
        self._board[self._slot, TAKEN] += 1

    def _may_look(self) -> bool:
        now = time.monotonic()
        self._looks = min(float(LOOKS), self._looks + LOOKS * (now - self._looked))
        self._looked = now
        if self._looks < 1:
            return False
        self._looks -= 1
        return True
