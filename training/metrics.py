"""`metrics.jsonl`: what a training reports of itself on the way, its speed and memory among it."""

import json
import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from training.run import replace

RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""What `ru_maxrss` counts in, in bytes."""


class Log:
    """The file; a resumed run drops the lines of steps, and of validations, that it takes again."""

    def __init__(self, path: Path, step: int, epoch: int) -> None:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        replace(path, b"".join(line for line in lines if _was_written_by(line, step, epoch)))
        self.path = path

    def write(self, **figures: object) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(figures) + "\n")


def _was_written_by(line: bytes, step: int, epoch: int) -> bool:
    """Whether a line is of that step and epoch or before; a line of which a part was written is of none."""
    try:
        at = json.loads(line)
        return bool(line.endswith(b"\n") and at["step"] <= step and at["epoch"] <= epoch)
    except (ValueError, TypeError, KeyError):
        return False


class Meter:
    """Tokens and seconds of training since it was last read; what is measured in between does not count."""

    def __init__(self) -> None:
        self.tokens, self.started = 0, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Speed, the seconds it was measured over, and the most memory this process ever held, in MB."""
        seconds = time.perf_counter() - self.started
        figures = {"tokens_per_second": round(self.tokens / seconds), "seconds": round(seconds, 2)}
        self.tokens, self.started = 0, time.perf_counter()
        return figures | peak_memory()


def peak_memory() -> dict[str, float]:
    peak: dict[str, float] = {"peak_memory_mb": round(_peak_bytes() / 1e6)}
    if torch.cuda.is_available():
        peak["peak_cuda_mb"] = round(torch.cuda.max_memory_allocated() / 1e6)
    return peak


def _peak_bytes() -> int:
    """Linux counts the peak of whoever started this process as its own, but for `VmHWM`."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
