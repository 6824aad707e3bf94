"""Keeps the serving processes running: starts them, replaces those that die or stand still, and ends them in order."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
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
GONE_SECONDS = 0.01  # between two looks whether a process is gone whose line has ended
YOUNG_SECONDS = 10.0
LONGEST_PAUSE_SECONDS = 30.0


@dataclass(eq=False)
class Worker:
    """One process, and the line on which it says its phase: nothing yet, starting, ready or draining."""

    slot: int
    process: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
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
        """Serve until a signal; raises StartError when a process cannot start in a slot where none was ready yet."""
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
                worker.process.terminate()
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
        loop = asyncio.get_running_loop()
        early = 0  # ends in a row that came soon; a process that cannot be started has ended at once
        while not self._stopping.is_set():
            began = loop.time()
            event, facts = await self._one(slot)
            if self._stopping.is_set():
                return
            early = early + 1 if loop.time() - began < YOUNG_SECONDS else 0
            pause = pause_after(early)
            self._log.error(event, slot=slot, **facts, next_in_seconds=pause)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stopping.wait()

    async def _one(self, slot: int) -> tuple[str, dict[str, object]]:
        """One process from its start to its end; the answer is what there is to log of that."""
        try:
            worker = await self._start(slot)
        except OSError as error:
            self._check_start(slot, f"a process cannot be started: {error}")
            return "a process cannot be started", {"reason": str(error)}
        await self._watch(worker)
        self._forget(worker)
        pid, status = worker.process.pid, worker.process.returncode
        if worker.failure or status > 0:  # not by somebody's signal
            silent = f"a process ended with status {status} while it started; it said why above"
            self._check_start(slot, worker.failure or silent)
        if not self._stopping.is_set():
            self._metrics.restarts.inc()
        return "a process ended", {"pid": pid, "status": status, "reason": worker.failure}

    async def _start(self, slot: int) -> Worker:
        """Start a process; raises OSError where the machine has none to give, or no line to it."""
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours)
            # From here on nothing is awaited: what is said before, the order has, and what is said later, the line.
            order = "late" if self._all_were_ready else "first"
            arguments = [slot, self._port, theirs.fileno(), order]
            try:  # not asyncio's: that also takes a thread, and without one leaves a process that nobody knows of
                process = subprocess.Popen(
                    [sys.executable, "-m", "service.worker", *map(str, arguments)], pass_fds=[theirs.fileno()]
                )
            except OSError:
                writer.close()
                raise
        worker = Worker(slot, process, reader, writer)
        self._workers[slot] = worker
        self._count()
        if self._stopping.is_set():
            process.terminate()
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
            if worker.phase is None and worker.failure is None:
                worker.failure = f"a process said nothing for {START_TICKS} s while it started, and was killed"
            worker.process.kill()
        worker.writer.close()
        try:
            async with asyncio.timeout(KILL_SECONDS):
                await _gone(worker.process)
        except TimeoutError:
            worker.process.kill()
            await _gone(worker.process)

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
            self._log.info("listening", host=self._settings.host, port=self._port, pid=os.getpid())
        if worker.phase == "ready" and not self._all_were_ready:
            self._were_ready.add(worker.slot)
            if self._all_were_ready:
                self._tell("all ready", list(self._workers.values()))

    @property
    def _all_were_ready(self) -> bool:
        return len(self._were_ready) == self._settings.processes

    def _check_start(self, slot: int, reason: str) -> None:
        """End the service where what has failed in a slot never went well there: then none can start."""
        if slot not in self._were_ready and not self._stopping.is_set():
            self._failure = StartError(reason)
            self.stop()

    def _forget(self, worker: Worker) -> None:
        del self._workers[worker.slot]
        mark_process_dead(worker.slot, self._directory)  # type: ignore[no-untyped-call]
        self._count()

    def _count(self) -> None:
        """Bring the metrics up to date; what cannot be written now is at the next change, and nobody ends for it."""
        self._metrics.processes.set(sum(worker.phase == "ready" for worker in self._workers.values()))
        try:
            write_pids(self._directory, [os.getpid(), *(worker.process.pid for worker in self._workers.values())])
        except OSError as error:
            self._log.error("metrics of processes are out of date until one changes again", reason=str(error))

    def _tell(self, order: str, workers: Sequence[Worker]) -> None:
        for worker in workers:
            worker.writer.write(order.encode() + b"\n")

    def _kill_all(self) -> None:
        for worker in self._workers.values():
            worker.process.kill()


def pause_after(deaths: int) -> float:
    """Seconds until the next start, after so many processes in a row that died young."""
    return min(LONGEST_PAUSE_SECONDS, 0.5 * 2.0 ** (deaths - 1)) if deaths else 0.0


async def _gone(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a process whose line has ended, which is moments before."""
    while process.poll() is None:
        await asyncio.sleep(GONE_SECONDS)
