"""Keeps the serving processes running: starts them, replaces those that die or stand still, and ends them in order."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from prometheus_client.multiprocess import mark_process_dead

from service.errors import StartError
from service.metrics import SupervisorMetrics
from service.process_tree import write_pids
from service.settings import Settings

TICK_SECONDS = 1.0
START_TICKS = 120  # until a process first says something; one that replaces another loads its models before
LEAST_SILENT_TICKS = 3
KILL_SECONDS = 8.0  # after the drain, before a process that did not end is killed
YOUNG_SECONDS = 10.0
LONGEST_PAUSE_SECONDS = 30.0


@dataclass(eq=False)
class Worker:
    """One process, and the line on which it says its phase: nothing yet, starting, ready or draining."""

    slot: int
    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    began: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    phase: str | None = None
    failure: str | None = None


class Supervisor:
    """The parent of the serving processes. It loads no model and answers no request, so little can go wrong with it."""

    def __init__(self, settings: Settings, port: int, directory: Path) -> None:
        """`port` is reserved, `directory` is where the processes share their metrics."""
        self._settings, self._port, self._directory = settings, port, directory
        self._workers: dict[int, Worker] = {}
        self._were_ready: set[int] = set()  # slots
        self._listening = False
        self._stopping = asyncio.Event()
        self._drain_begins = 0.0  # once it is stopping, on the event loop's clock
        self._failure: StartError | None = None
        self._metrics = SupervisorMetrics()
        self._log = structlog.get_logger()

    async def run(self) -> None:
        """Serve until a signal; raises StartError when a process cannot start, before each was ready once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        async with asyncio.TaskGroup() as slots:
            for slot in range(self._settings.processes):
                slots.create_task(self._keep(slot))
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Let every process drain and end; said again it skips the delay before the drain, then ends them at once.

        So does time.
        """
        loop = asyncio.get_running_loop()
        if not self._stopping.is_set():
            self._stopping.set()
            self._drain_begins = loop.time() + self._settings.drain_delay_seconds
            for worker in self._workers.values():
                _send(worker, signal.SIGTERM)
            loop.call_at(self._drain_begins + self._settings.drain_seconds + KILL_SECONDS, self._kill_all)
        elif loop.time() < self._drain_begins:
            self._drain_begins = loop.time()
            self._tell("drain", list(self._workers.values()))
        else:
            self._kill_all()

    def reload(self, besides: Worker | None = None) -> None:
        """Let every process load the bundles again; one that is still starting does it as soon as it can."""
        self._tell("reload", [worker for worker in self._workers.values() if worker is not besides])

    async def _keep(self, slot: int) -> None:
        """One process after another, until it is time to stop."""
        deaths = 0
        while not self._stopping.is_set():
            worker = await self._start(slot)
            await self._watch(worker)
            status = worker.process.returncode
            self._forget(worker)
            if self._stopping.is_set() or self._fails_the_start(worker):
                return
            lived = asyncio.get_running_loop().time() - worker.began
            deaths = deaths + 1 if lived < YOUNG_SECONDS else 0
            pause = pause_after(deaths)
            pid, reason = worker.process.pid, worker.failure
            self._log.error("a process ended", slot=slot, pid=pid, status=status, reason=reason, next_in_seconds=pause)
            self._metrics.restarts.inc()
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stopping.wait()

    async def _start(self, slot: int) -> Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            order = "late" if self._all_were_ready else "first"
            arguments = [slot, self._port, theirs.fileno(), order]
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "service.worker", *map(str, arguments)), pass_fds=[theirs.fileno()]
            )
        worker = Worker(slot, process, *await asyncio.open_connection(sock=ours))
        self._workers[slot] = worker
        self._count()
        if self._stopping.is_set():
            _send(worker, signal.SIGTERM)
        return worker

    async def _watch(self, worker: Worker) -> None:
        """Listen to a process until it ends, and end one that falls silent."""
        silent = 0  # in ticks of our own: when the whole machine was asleep, nobody is to blame
        while silent <= self._patience(worker):
            try:
                async with asyncio.timeout(TICK_SECONDS):
                    line = await worker.reader.readline()
            except TimeoutError:
                silent += 1
                continue
            except ConnectionError:  # in place of the end, when it was killed before it had read an order
                break
            if not line:
                break
            silent = 0
            self._hear(worker, line.decode().strip())
        else:
            self._log.error("a process stands still", slot=worker.slot, pid=worker.process.pid)
            _send(worker, signal.SIGKILL)
        worker.writer.close()
        try:
            async with asyncio.timeout(KILL_SECONDS):
                await worker.process.wait()
        except TimeoutError:
            _send(worker, signal.SIGKILL)
            await worker.process.wait()

    def _patience(self, worker: Worker) -> float:
        return START_TICKS if worker.phase is None else max(self._settings.stuck_seconds, LEAST_SILENT_TICKS)

    def _hear(self, worker: Worker, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "failed":
            worker.failure = json.loads(rest)
        elif word == "reloaded":
            self.reload(besides=worker)
        elif word != worker.phase:
            worker.phase = word
            self._note_phase(worker)

    def _note_phase(self, worker: Worker) -> None:
        self._count()
        if not self._listening:
            self._listening = True
            self._log.info("listening", host=self._settings.host, port=self._port)
        if worker.phase == "ready" and not self._all_were_ready:
            self._were_ready.add(worker.slot)
            if self._all_were_ready:
                self._tell("all ready", list(self._workers.values()))

    @property
    def _all_were_ready(self) -> bool:
        return len(self._were_ready) == self._settings.processes

    def _fails_the_start(self, worker: Worker) -> bool:
        """Whether a process that ended by itself means that none can start; then the others are told to end."""
        status = worker.process.returncode or 0
        if worker.slot in self._were_ready or status <= 0:
            return False
        reason = worker.failure or f"a process ended with status {status} while it started; it said why above"
        self._failure = StartError(reason)
        self.stop()
        return True

    def _forget(self, worker: Worker) -> None:
        del self._workers[worker.slot]
        mark_process_dead(worker.slot, self._directory)  # type: ignore[no-untyped-call]
        self._count()

    def _count(self) -> None:
        write_pids(self._directory, [os.getpid(), *(worker.process.pid for worker in self._workers.values())])
        self._metrics.processes.set(sum(worker.phase == "ready" for worker in self._workers.values()))

    def _tell(self, order: str, workers: Sequence[Worker]) -> None:
        for worker in workers:
            worker.writer.write(order.encode() + b"\n")

    def _kill_all(self) -> None:
        for worker in self._workers.values():
            _send(worker, signal.SIGKILL)


def pause_after(deaths: int) -> float:
    """Seconds until the next start, after so many processes in a row that died young."""
    return min(LONGEST_PAUSE_SECONDS, 0.5 * 2.0 ** (deaths - 1)) if deaths else 0.0


def _send(worker: Worker, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        worker.process.send_signal(number)
