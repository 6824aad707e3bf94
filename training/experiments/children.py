"""The commands that an experiment runs, so that whatever ends the experiment ends them too, at a checkpoint."""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from signal import SIGINT
from types import TracebackType

from training.errors import TrainingError

STOP_SECONDS = 60


class Children:
    """Runs `python -m ...` from several threads; left by an exception, it stops those that still run."""

    def __init__(self, threads: int | None) -> None:
        """`threads` is how many each may compute with; None leaves it to them."""
        self._environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self._lock = threading.Lock()

    def __enter__(self) -> "Children":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.stop()

    def run(self, module: str, arguments: Sequence[str | Path], log: Path) -> None:
        """Waits for a module's command; TrainingError where it fails, KeyboardInterrupt where it is stopped."""
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", module, *map(str, arguments)]
        with log.open("ab") as output:
            with self._lock:
                if self._stopped:
                    raise KeyboardInterrupt
                child = subprocess.Popen(command, stdout=output, stderr=output, env=self._environment)
                self._running.add(child)
            status = child.wait()
        self._running.discard(child)
        if self._stopped:
            raise KeyboardInterrupt
        if status:
            raise TrainingError(f"python -m {module} ended with status {status}: {_last_line(log)} (all of it: {log})")

    def stop(self) -> None:
        """Asks each to save and end, kills what does not, and lets none begin."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for child in running:
            child.send_signal(SIGINT)
        for child in running:
            try:
                child.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
