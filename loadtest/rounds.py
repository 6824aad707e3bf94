"""One round: one architecture, warm, under load for a while, and what that cost."""

import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from loadtest import target, texts
from loadtest.errors import LoadTestError
from loadtest.options import Options
from loadtest.recording import Recording, percentiles
from loadtest.target import Metrics

_SAMPLE_SECONDS = 0.5
_IN_FLIGHT_SECONDS = 20
"""How long Locust waits for requests on their way at the end: longer than its users wait, so that each is counted."""

_MEMORY = "process_resident_memory_bytes"
_CPU = "process_cpu_seconds_total"


@dataclass(frozen=True)
class Round:
    """What one round showed. `figures` lacks what there is nothing to tell of: no answer, or no such metric."""

    architecture: str
    number: int
    figures: dict[str, float]
    failures: dict[str, int]
    model: dict[str, str]
    stop_fault: str | None = None

    @property
    def failed(self) -> bool:
        return bool(self.failures) or self.stop_fault is not None


def run(architecture: str, number: int, options: Options) -> Round:
    """One round against the running service, or against one that is started for it and stopped after it."""
    with tempfile.TemporaryDirectory(prefix="refrain-loadtest-") as name:
        folder = Path(name)
        if options.host:
            target.wait_ready(options.host, options.ready_timeout)
            return _measure(options.host, architecture, number, options, folder)
        with target.service(architecture, options, folder / "service.log") as (url, process):
            measured = _measure(url, architecture, number, options, folder)
            return replace(measured, stop_fault=target.stop_fault(process, options.stop_timeout))


def _measure(url: str, architecture: str, number: int, options: Options, folder: Path) -> Round:
    idle = target.scrape(url)
    sources = texts.load(options.texts, seed=options.seed, mixed=options.mixed)
    bodies = texts.request_bodies(sources, list_size=options.list_size, architecture=architecture, task=options.task)
    target.warm_up(url, bodies, users=options.users, seconds=options.warmup)
    before = target.scrape(url)
    recording, during = _drive(url, architecture, options, folder)
    after = target.scrape(url)
    series = {"architecture": architecture, "task": options.task}
    figures = _load_figures(recording, options.list_size)
    figures |= _memory_figures(idle, [*during, after], series)
    figures |= _cpu_figures(before, after, recording, options.list_size)
    model = after.labels("refrain_model_info", **series) if after else {}
    return Round(architecture, number, figures, recording.failures, model)


def _drive(url: str, architecture: str, options: Options, folder: Path) -> tuple[Recording, list[Metrics | None]]:
    """Runs Locust to its end; what it recorded, and the scrapes made meanwhile."""
    path, log = folder / "recording.json", folder / "locust.log"
    scrapes = []
    deadline = time.monotonic() + options.duration + 2 * _IN_FLIGHT_SECONDS + 30
    source = str(Path(__file__).resolve().parents[1])
    with target.child(_locust(url, architecture, options, path), log, {"PYTHONPATH": source}) as locust:
        while locust.poll() is None and time.monotonic() < deadline:
            with suppress(subprocess.TimeoutExpired):
                locust.wait(_SAMPLE_SECONDS)
            scrapes.append(target.scrape(url))
        if locust.poll() != 0 or not path.is_file():
            ended = "did not end in time" if locust.returncode is None else f"ended with status {locust.returncode}"
            raise LoadTestError(f"Locust {ended}{target.tail(log)}")
    return Recording.read(path), scrapes


def _locust(url: str, architecture: str, options: Options, recording: Path) -> list[str]:
    command = [sys.executable, "-m", "locust", "--locustfile", str(Path(__file__).with_name("locustfile.py"))]
    command += ["--headless", "--host", url, "--users", str(options.users), "--spawn-rate", str(options.users)]
    command += ["--run-time", f"{options.duration}s", "--stop-timeout", str(_IN_FLIGHT_SECONDS)]
    command += ["--loglevel", "WARNING", "--exit-code-on-error", "0"]
    command += ["--architecture", architecture, "--task", options.task, "--list-size", str(options.list_size)]
    command += ["--texts", str(options.texts)] if options.texts else ["--seed", str(options.seed)]
    return command + ["--mixed"] * options.mixed + ["--recording", str(recording)]


def _load_figures(recording: Recording, list_size: int) -> dict[str, float]:
    generator = {"generator_cores": recording.generator_cores}
    answered = len(recording.milliseconds)
    if not answered:
        return generator
    rate = answered / recording.seconds
    p50, p95, p99 = percentiles(recording.milliseconds, (50, 95, 99))
    rates = {"requests": answered, "requests_per_second": rate, "texts_per_second": rate * list_size}
    return rates | {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99} | generator


def _memory_figures(idle: Metrics | None, loaded: list[Metrics | None], series: dict[str, str]) -> dict[str, float]:
    peaks = [scrape.total(_MEMORY) for scrape in loaded if scrape]
    figures = {
        "idle_memory_bytes": idle.total(_MEMORY) if idle else None,
        "peak_memory_bytes": max((peak for peak in peaks if peak is not None), default=None),
        "model_memory_bytes": idle.total("refrain_model_memory_bytes", **series) if idle else None,
    }
    return {name: value for name, value in figures.items() if value is not None}


def _cpu_figures(
    before: Metrics | None, after: Metrics | None, recording: Recording, list_size: int
) -> dict[str, float]:
    began, ended = (scrape.total(_CPU) if scrape else None for scrape in (before, after))
    answered = len(recording.milliseconds) * list_size
    if began is None or ended is None or not answered:
        return {}
    used = ended - began
    return {"cpu_seconds_per_1000_texts": 1000 * used / answered, "service_cores": used / recording.seconds}
