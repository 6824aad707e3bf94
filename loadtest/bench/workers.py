"""Processes that do a job each, all at the same time: started, told what to do, let go together, and their results."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Timer
from typing import Any

from loadtest import target
from loadtest.errors import LoadTestError

START_SECONDS = 60.0
"""For a process to start and to prepare its job, on a busy machine."""
SOURCE = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def run(module: str, jobs: Sequence[Any], *, seconds: float, log: Path) -> list[Any]:
    """Runs `python -m module` for each job, which goes in and comes out as JSON; none begins before all are prepared.

    `seconds` is how long the jobs may take once they have begun. LoadTestError when one ends or does not end in time.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker(module, log.with_suffix(f".{place}"))) for place in range(len(jobs))]
        with _deadline(workers, START_SECONDS):
            for worker, job in zip(workers, jobs, strict=True):
                worker.say(json.dumps(job))
            for worker in workers:
                worker.hear()
        with _deadline(workers, seconds):
            for worker in workers:
                worker.say("go")
            return [json.loads(worker.hear()) for worker in workers]


def serve(prepare: Callable[[Any], Callable[[], Any]]) -> None:
    """The other side: takes a job, prepares it, says so, waits for the word, does it, and gives its result."""
    perform = prepare(json.loads(sys.stdin.readline()))
    _write("ready")
    if sys.stdin.readline():  # nothing: whoever wanted this is gone
        _write(json.dumps(perform()))


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class _Worker:
    def __init__(self, process: subprocess.Popen[bytes], name: str, log: Path) -> None:
        self.process, self._name, self._log = process, name, log

    def say(self, line: str) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):  # it has ended: hear() says so
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            raise LoadTestError(f"{self._name} ended or did not answer in time{target.tail(self._log)}")
        return line.decode()


@contextmanager
def _worker(module: str, log: Path) -> Iterator[_Worker]:
    with target.child([sys.executable, "-m", module], log, SOURCE, piped=True) as process:
        try:
            yield _Worker(process, module, log)
        finally:
            for pipe in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):
                    pipe and pipe.close()


@contextmanager
def _deadline(workers: Sequence[_Worker], seconds: float) -> Iterator[None]:
    """Kills the workers when the block takes longer, which ends every wait for one of them."""

    def kill() -> None:
        for worker in workers:
            worker.process.kill()

    timer = Timer(seconds, kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
