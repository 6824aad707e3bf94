"""One load from outside: the process that drives it, and what the service says of itself meanwhile."""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from loadtest import gpu, target
from loadtest.errors import LoadTestError
from loadtest.job import Job, Trace
from loadtest.steps import MOST_STEPS
from loadtest.target import Metrics

_SAMPLE_SECONDS = 1.0
_SLACK_SECONDS = 60.0
"""To start, to wait for the last answers, and to end."""
_STEP_SLACK_SECONDS = 35.0
USUAL_STEPS = 9
"""For the progress bar: a search takes about so many."""


@dataclass(frozen=True)
class Driven:
    """What the load generator saw, and scrapes of the service: before, meanwhile and after."""

    trace: Trace
    before: Metrics | None
    during: list[Metrics | None]
    after: Metrics | None
    gpu_bytes: float | None
    seconds: float
    """Between the first scrape and the last."""
    others_cpu_seconds: float | None
    """In them, CPU time of all processes of this machine but the load test's own; None where it is not known."""

    def grown(self, name: str, **labels: str) -> float | None:
        """By how much a counter grew; None when it is not known, as behind a proxy that asks another replica."""
        if not self.before or not self.after:
            return None
        began, ended = self.before.total(name, **labels) or 0.0, self.after.total(name, **labels)
        return None if ended is None or ended < began else ended - began


def drive(job: Job, passed: Callable[[float], None]) -> Driven:
    """Runs the load to its end; `passed` is told of the seconds that it takes. LoadTestError when it does not end."""
    with tempfile.TemporaryDirectory(prefix="refrain-loadtest-") as name:
        folder = Path(name)
        told, seen, log = folder / "job.json", folder / "trace.json", folder / "log"
        job.write(told)
        before, began, used = target.scrape(job.url), time.monotonic(), others_cpu_seconds()
        command = [sys.executable, "-m", "loadtest.users", str(told), str(seen)]
        source = str(Path(__file__).resolve().parents[1])
        with target.child(command, log, {"PYTHONPATH": source}) as process:
            during, gpu_bytes = _watch(process, job, passed)
            if process.poll() != 0 or not seen.is_file():
                status = process.returncode
                ended = "did not end in time" if status is None else f"ended with status {status}"
                raise LoadTestError(f"the load generator {ended}{target.tail(log)}")
        after, seconds = target.scrape(job.url), time.monotonic() - began
        now = others_cpu_seconds()
        others = None if used is None or now is None else now - used
        return Driven(Trace.read(seen), before, during, after, gpu_bytes, seconds, others)


def others_cpu_seconds(stat: Path = Path("/proc/stat")) -> float | None:
    """CPU time so far of all processes but this one and those of its children that ended; None where /proc is unlike
    Linux's.
    """
    try:
        user, nice, system, _, _, irq, softirq, *_ = map(int, stat.read_text().splitlines()[0].split()[1:])
    except (OSError, ValueError, IndexError):
        return None
    own = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK") - own


def _watch(
    process: subprocess.Popen[bytes], job: Job, passed: Callable[[float], None]
) -> tuple[list[Metrics | None], float | None]:
    """Scrapes the service until the process has ended or its time is up; the scrapes, and the most memory on GPUs."""
    allowed = MOST_STEPS * (job.seconds + _STEP_SLACK_SECONDS) if job.shape == "step" else job.seconds
    deadline = time.monotonic() + allowed + _SLACK_SECONDS
    scrapes: list[Metrics | None] = []
    on_gpu: list[float] = []
    while process.poll() is None and time.monotonic() < deadline:
        began = time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_SAMPLE_SECONDS)
        scrapes.append(target.scrape(job.url))
        if (used := gpu.memory_bytes()) is not None:
            on_gpu.append(used)
        passed(time.monotonic() - began)
    return scrapes, max(on_gpu, default=None)
