"""The supervisor over scripted processes: what it does when the machine refuses it one, and whom it tells what."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import structlog

import service.supervisor
from service.errors import StartError
from service.process_tree import PIDS
from service.settings import Settings
from service.supervisor import Supervisor, pause_after

# Says that it is ready, or with `starts` only that it starts, with `failed` why not, when `silent` nothing; is gone at
# once with `ends`; else waits to be ended, and makes a file when it knows that the others are ready.
PROGRAM = """
import pathlib, socket, sys
line, order, script, file = socket.socket(fileno=int(sys.argv[1])), *sys.argv[2:]
line.send({"starts": b"starting\\n", "silent": b"", "failed": b'failed "no such bundle"\\n'}.get(script, b"ready\\n"))
said = b"all ready" if order == "late" else b""
while script != "ends":
    if b"all ready" in said:
        pathlib.Path(file).touch()
    if not (said := line.recv(100)):
        break
"""
SECONDS = 30.0  # at most, for each test
REAL_POPEN = subprocess.Popen


def refusal(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@dataclass
class Machine:
    """Starts a small program in the place of each serving process, or refuses to."""

    directory: Path
    scripts: dict[str, list[str]] = field(default_factory=dict)  # by slot, of its next processes; then they serve
    refusals: list[OSError] = field(default_factory=list)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    on_start: Callable[[str, int], None] = lambda slot, line: None

    def start(self, arguments: Sequence[str], *, pass_fds: Sequence[int], **options: Any) -> subprocess.Popen[bytes]:
        if self.refusals:
            raise self.refusals.pop(0)
        *_, slot, _port, line, order = arguments
        script = self.scripts[slot].pop(0) if self.scripts.get(slot) else "serves"
        program = [sys.executable, "-S", "-c", PROGRAM, line, order, script, self.directory / str(len(self.started))]
        self.started.append(REAL_POPEN(program, pass_fds=pass_fds, **options))
        self.on_start(slot, int(line))
        return self.started[-1]

    def told(self) -> set[str]:
        """Which processes, by when they were started, know that the others are ready."""
        return {file.name for file in self.directory.iterdir() if file.name.isdigit()}

    def pids(self) -> list[int]:
        """Those that count for the metrics of processes, without the supervisor's own."""
        return [int(pid) for pid in (self.directory / PIDS).read_text().split()[1:]]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", machine.start)
    monkeypatch.setattr(service.supervisor, "pause_after", lambda early: pause_after(early) / 10)
    return machine


def supervise(machine: Machine, *steps: Callable[[], object]) -> list[Any]:
    """Run two processes and wait until each step in turn gives something true; the answer is the log."""

    async def run() -> None:
        supervisor = Supervisor(Settings(processes=2, stuck_seconds=600), 0, machine.directory)
        running = asyncio.create_task(supervisor.run())
        try:
            async with asyncio.timeout(SECONDS):
                for step in steps:
                    while not step() and not running.done():
                        await asyncio.sleep(0.01)
        except TimeoutError:
            pytest.fail(f"waited in vain: {machine.told()} know that all are ready")
        finally:
            supervisor.stop()
            await running

    with structlog.testing.capture_logs() as logged:
        try:
            asyncio.run(run())
        finally:
            for process in machine.started:
                process.kill()
    return logged


def _raise(error: OSError) -> None:
    raise error


@pytest.mark.parametrize("refused", ["process", "line"])
def test_a_replacement_that_cannot_be_started_is_tried_again_while_the_others_serve(
    refused: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill() -> bool:
        refusals = [refusal(errno.EAGAIN), refusal(errno.EAGAIN)]
        if refused == "process":
            machine.refusals = refusals
        else:
            real = socket.socketpair
            monkeypatch.setattr(socket, "socketpair", lambda *_: _raise(refusals.pop()) if refusals else real())
        machine.started[0].kill()
        return True

    logged = supervise(
        machine,
        lambda: machine.told() == {"0", "1"},
        kill,
        lambda: machine.told() == {"0", "1", "2"},
        lambda: set(machine.pids()) == {machine.started[1].pid, machine.started[2].pid},
    )
    assert len(machine.started) == 3
    ended, *failed = [line for line in logged if line["log_level"] == "error"]
    slot = ended["slot"]
    assert ended["event"] == "a process ended"
    assert [(line["event"], line["slot"]) for line in failed] == [("a process cannot be started", slot)] * 2
    assert all(os.strerror(errno.EAGAIN) in line["reason"] for line in failed)
    assert ended["next_in_seconds"] < failed[0]["next_in_seconds"] < failed[1]["next_in_seconds"]


@pytest.mark.parametrize("others", [0, 1])
def test_a_service_that_cannot_start_a_process_at_all_says_so_and_leaves_none(others: int, machine: Machine) -> None:
    def refuse(*started: object) -> None:
        if len(machine.started) == others:
            machine.refusals = [refusal(errno.EAGAIN)] * 2  # another may be on its way

    machine.on_start = refuse
    refuse()
    with pytest.raises(StartError, match=rf"^a process cannot be started: .*{os.strerror(errno.EAGAIN)}$"):
        supervise(machine, lambda: False)
    assert len(machine.started) == others
    assert all(process.poll() is not None for process in machine.started)


@pytest.mark.parametrize(
    ("script", "ticks", "reason"),
    [
        ("silent", 2, "a process said nothing for 2 s while it started, and was killed"),
        ("failed", 60, "no such bundle"),  # in three seconds even a busy machine's process has spoken
    ],
)
def test_a_service_whose_process_stands_still_while_it_starts_ends_and_says_why(
    script: str, ticks: int, reason: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.supervisor, "START_TICKS", ticks)
    monkeypatch.setattr(service.supervisor, "TICK_SECONDS", 0.05)
    machine.scripts = {slot: [script] * 9 for slot in ("0", "1")}
    with pytest.raises(StartError, match=rf"^{reason}$"):
        supervise(machine, lambda: False)


def test_processes_that_cannot_be_written_down_serve_and_are_written_down_later(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refusals = service.supervisor.write_pids, [refusal(errno.ENOSPC)] * 2

    def write(directory: Path, pids: Sequence[int]) -> None:
        if len(machine.started) == 3 and refusals:
            raise refusals.pop()
        real(directory, pids)

    monkeypatch.setattr(service.supervisor, "write_pids", write)
    logged = supervise(
        machine,
        lambda: machine.told() == {"0", "1"},
        lambda: machine.started[0].kill() is None,
        lambda: machine.told() == {"0", "1", "2"},
        lambda: machine.started[2].kill() is None,
        lambda: machine.told() == {"0", "1", "2", "3"},
        lambda: set(machine.pids()) == {machine.started[1].pid, machine.started[3].pid},
    )
    assert len(machine.started) == 4
    assert os.strerror(errno.ENOSPC) in str([line for line in logged if line["event"] != "a process ended"])


def test_a_process_learns_that_all_are_ready_also_if_the_last_gets_ready_while_it_is_started(machine: Machine) -> None:
    """It takes the place of one that was ready before the other slot's first."""
    machine.scripts = {"0": ["ends", "starts"], "1": ["starts"]}
    last: list[socket.socket] = []

    def get_ready(slot: str, line: int) -> None:
        if slot == "1":
            last.append(socket.socket(fileno=os.dup(line)))
        elif len(machine.started) == 3:
            with last.pop() as speaking:
                speaking.send(b"ready\n")

    machine.on_start = get_ready
    supervise(machine, lambda: machine.told() == {"1", "2"})
