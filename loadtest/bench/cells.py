"""The cells of a round: what each one does, and the figures that it gives."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from loadtest import target, texts
from loadtest.bench import probes, processes, workers
from loadtest.bench.connection import GIVE_UP_SECONDS
from loadtest.bench.options import FIXED, BenchOptions, ModeName
from loadtest.bench.probes import Probes
from loadtest.bench.subject import RAW, Answered, Target
from loadtest.recording import Recording, latencies
from loadtest.target import Metrics

CLIENT = "loadtest.bench.client"
PERCENTS = (50, 95, 99)
_SLACK_SECONDS = 60.0
_STAGES = ("tokenize", "queue", "inference")


@dataclass(frozen=True)
class Cell:
    """What is measured once in every round. `connections` of the load generator; 0 where there is none."""

    kind: Literal["raw", "bare", "lists", "single", "mixed"]
    mode: ModeName
    connections: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.connections}" if self.kind == "single" else self.kind


@dataclass(frozen=True)
class Measured:
    """A cell in one round; `figures` lacks what there is nothing to tell of."""

    cell: Cell
    round: int
    figures: dict[str, float]
    failures: dict[str, int]


def plan(options: BenchOptions) -> list[Cell]:
    """The cells of a round. The raw runtime at fixed depth is the measure of early exit too, which has none itself."""
    cells: list[Cell] = []
    for mode in options.modes:
        by_kind = {
            "raw": [Cell("raw", FIXED[mode])],
            "bare": [Cell("bare", mode)],
            "lists": [Cell("lists", mode, options.busy_connections)],
            "single": [Cell("single", mode, connections) for connections in options.connections],
            "mixed": [
                Cell("single", mode, options.mixed_connections // 2),
                Cell("mixed", mode, options.mixed_connections),
            ],
        }
        cells += [cell for kind in options.cells for cell in by_kind[kind]]
    return list(dict.fromkeys(cells))


def measure(cell: Cell, number: int, subject: Target, options: BenchOptions, folder: Path) -> Measured:
    """One cell in one round; raises LoadTestError when it cannot be measured."""
    log = folder / f"{cell.name}-{cell.mode}"
    if cell.kind == "raw":
        return Measured(cell, number, _raw(subject, number, options, log), {})
    if cell.kind == "bare":
        return Measured(cell, number, _bare(cell, subject, options, log), {})
    return _served(cell, number, subject, options, log)


def threshold(mode: ModeName, subject: Target, options: BenchOptions) -> float:
    """The confidence at which a text leaves; 1: none does."""
    if mode != "early-exit":
        return 1
    return subject.model.exit_threshold if options.exit_threshold is None else options.exit_threshold


def _raw(subject: Target, number: int, options: BenchOptions, log: Path) -> dict[str, float]:
    job = subject.model.raw | {
        "do": "batches",
        "texts": [sample.text for sample in subject.short.samples],
        "size": options.list_size,
        "seconds": options.seconds,
    }
    jobs = [job | {"seed": f"{options.seed}, {number}, {place}"} for place in range(options.raw_processes)]
    found = workers.run(RAW, jobs, seconds=options.seconds + _SLACK_SECONDS, log=log)
    together = {figure: sum(one[figure] for one in found) for figure in found[0]}
    return together | {"cpu_ms_per_text": together["cpu_ms_per_text"] / len(found)}


def _bare(cell: Cell, subject: Target, options: BenchOptions, log: Path) -> dict[str, float]:
    job = subject.model.raw | {
        "do": "calls",
        "texts": [sample.text for sample in subject.short.samples],
        "exit_threshold": threshold(cell.mode, subject, options),
        "seconds": options.seconds,
    }
    (found,) = workers.run(RAW, [job], seconds=options.seconds + _SLACK_SECONDS, log=log)
    return latencies(found["milliseconds"], PERCENTS) | {"cpu_ms_per_text": found["cpu_ms"]}


def _served(cell: Cell, number: int, subject: Target, options: BenchOptions, log: Path) -> Measured:
    size = options.list_size if cell.kind == "lists" else 1
    shares = {"short": (subject.short, cell.connections)}
    if cell.kind == "mixed":
        half = cell.connections // 2
        shares = {"short": (subject.short, half), "long": (subject.long, cell.connections - half)}
    exit_threshold = threshold(cell.mode, subject, options)
    traffics = [traffic(subject, known, count, size, exit_threshold) for known, count in shares.values()]
    before = target.scrape(subject.url)
    seen = drive(subject, traffics, options, log)
    recordings = dict(zip(shares, seen.recordings, strict=True))
    figures = load_figures(seen, size) | _metrics_figures(before, target.scrape(subject.url))
    if cell.kind == "mixed":
        for name, recording in recordings.items():
            figures |= latencies(recording.milliseconds, PERCENTS, f"{name}_")
    return Measured(cell, number, figures, seen.failures | seen.probes.failures)


def traffic(
    subject: Target, answered: Answered, connections: int, list_size: int, exit_threshold: float
) -> dict[str, Any]:
    """The requests that send all these texts, with what must come back."""
    bodies = texts.request_bodies(
        [sample.text for sample in answered.samples],
        list_size=list_size,
        architecture=subject.architecture,
        task=subject.model.manifest["task"],
        exit_threshold=exit_threshold,
    )
    known = texts.chunks(answered.known(exit_threshold), list_size)
    requests = [{"body": body.decode(), "known": some} for body, some in zip(bodies, known, strict=True)]
    return {"connections": connections, "requests": requests}


@dataclass(frozen=True)
class Seen:
    """What the load generator saw: one recording for each kind of traffic, times in seconds.

    `sent` of open arrivals; `late` are right answers after the measured time.
    """

    seconds: float
    sent: int
    late: int
    recordings: list[Recording]
    per_second: list[int]
    service_cpu_seconds: list[float]
    memory: list[tuple[float, processes.Memory]]
    probes: Probes

    @property
    def answered(self) -> int:
        """Right answers within the measured time."""
        return sum(len(recording.milliseconds) for recording in self.recordings)

    @property
    def failures(self) -> dict[str, int]:
        """Of requests; those of probes are their own."""
        together: dict[str, int] = {}
        for recording in self.recordings:
            for reason, count in recording.failures.items():
                together[reason] = together.get(reason, 0) + count
        return together


def drive(
    subject: Target,
    traffics: list[dict[str, Any]],
    options: BenchOptions,
    log: Path,
    *,
    seconds: float | None = None,
    arrivals_per_second: float | None = None,
    resting: bool = False,
) -> Seen:
    """Runs the load generator; the service's peak memory is kept. Open arrivals have no warm-up of their own."""
    address = urlsplit(subject.url)
    lasts = options.seconds if seconds is None else seconds
    job = {
        "host": address.hostname,
        "port": address.port,
        "pid": subject.pid,
        "traffics": traffics,
        "warmup": 0.0 if arrivals_per_second else options.warmup,
        "seconds": lasts,
        "arrivals_per_second": arrivals_per_second,
        "seed": options.seed,
        "resting": resting,
    }
    allowed = options.warmup + lasts + GIVE_UP_SECONDS + _SLACK_SECONDS
    with processes.watched(subject.pid) as watch, probes.asked(subject.url, log.with_suffix(".idle")) as asked:
        (found,) = workers.run(CLIENT, [job], seconds=allowed, log=log)
    subject.peak = subject.peak.or_larger(watch.peak)
    recordings = [Recording(**one) for one in found.pop("recordings")]
    return Seen(recordings=recordings, memory=watch.samples, probes=asked, **found)


def load_figures(seen: Seen, list_size: int) -> dict[str, float]:
    """Rates, latencies, and what they cost the service and the load generator."""
    generator = seen.recordings[0]
    cpu = sum(seen.service_cpu_seconds)
    figures = {
        "service_cores": cpu / seen.seconds,
        "generator_cores": generator.generator_cores,
    } | seen.probes.slowest
    if seen.answered:
        rate = seen.answered / seen.seconds
        figures |= {"requests_per_second": rate, "texts_per_second": rate * list_size}
        figures |= {"cpu_ms_per_request": 1000 * cpu / seen.answered}
        figures |= {"cpu_ms_per_text": 1000 * cpu / seen.answered / list_size}
        figures |= {"generator_cpu_ms_per_request": 1000 * generator.generator_cpu_seconds / seen.answered}
        figures |= latencies([one for recording in seen.recordings for one in recording.milliseconds], PERCENTS)
    return figures


def _metrics_figures(before: Metrics | None, after: Metrics | None) -> dict[str, float]:
    """Where the service's own time and tokens went meanwhile, warm-up included."""
    if not before or not after:
        return {}

    def grown(name: str, **labels: str) -> float:
        return (after.total(name, **labels) or 0.0) - (before.total(name, **labels) or 0.0)

    def mean(name: str, **labels: str) -> float | None:
        count = grown(f"{name}_count", **labels)
        return grown(f"{name}_sum", **labels) / count if count else None

    tokens = {kind: grown("refrain_batch_tokens_total", kind=kind) for kind in ("real", "padding")}
    figures = {
        "padding_share": tokens["padding"] / sum(tokens.values()) if any(tokens.values()) else None,
        "mean_batch_texts": mean("refrain_batch_texts"),
        "mean_iterations": mean("refrain_iterations"),
    }
    for stage in _STAGES:
        seconds = mean("refrain_stage_duration_seconds", stage=stage)
        figures[f"mean_{stage}_ms"] = None if seconds is None else 1000 * seconds
    return {name: value for name, value in figures.items() if value is not None}
