"""A whole benchmark: the services side by side, the rounds with all their cells, then overload, then the end."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from loadtest import target
from loadtest.bench import cells, overload, processes
from loadtest.bench.cells import Cell, Measured
from loadtest.bench.options import FIXED, BenchOptions
from loadtest.bench.overload import Overload
from loadtest.bench.processes import Memory
from loadtest.bench.subject import Samples, Target, answer, find_model, load_samples
from loadtest.errors import LoadTestError


@dataclass(frozen=True)
class Footprint:
    """Memory of one architecture's service; `model` are the bytes of its graphs in all processes, as /metrics says."""

    processes: int
    idle: Memory
    peak: Memory
    model: float | None


@dataclass(frozen=True)
class Accuracy:
    """Of a mode on labelled texts, by the answers that the service's were checked against."""

    mode: str
    texts: str
    exit_threshold: float
    mean_iterations: float
    accuracy: float | None


@dataclass
class Results:
    """Everything that a run found out."""

    texts: str = ""
    models: dict[str, str] = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)
    footprints: dict[str, Footprint] = field(default_factory=dict)
    accuracies: list[Accuracy] = field(default_factory=list)
    overload: Overload | None = None
    faults: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether every request was answered rightly, but for those that overload may turn away."""
        over = self.overload
        failed = any(one.failures for one in self.measured)
        spoilt = over and (over.unexpected or over.failures_beside or over.probe_failures or over.lost)
        return not (failed or self.faults or spoilt)


def run(options: BenchOptions, folder: Path) -> Results:
    """The whole benchmark; its processes' logs go to the folder. Raises LoadTestError when it cannot go on."""
    results, samples = Results(), load_samples(options)
    with ExitStack() as stack:
        targets: dict[str, Target] = {}
        for architecture in dict.fromkeys(FIXED[mode] for mode in options.modes):
            started = stack.enter_context(_started(architecture, options, samples, folder, results))
            targets[architecture] = started
        results.texts = f"{_described(next(iter(targets.values())))}; {samples.source}"
        results.accuracies = _accuracies(targets, options)
        for cell, number in _turns(options):
            results.measured.append(cells.measure(cell, number, targets[FIXED[cell.mode]], options, folder))
        if options.overload:
            first = options.modes[0]
            try:
                results.overload = overload.measure(first, targets[FIXED[first]], options, folder)
            except LoadTestError as error:  # what was measured before is kept
                results.faults.append(f"overload: {error}")
        results.footprints = {name: _footprint(one) for name, one in targets.items()}
    return results


def _turns(options: BenchOptions) -> Iterator[tuple[Cell, int]]:
    """Every cell once in each round; each round begins with another one, so that no cell has a place of its own."""
    planned = cells.plan(options)
    with tqdm(total=options.rounds * len(planned), unit="cell") as progress:
        for number in range(options.rounds):
            first = number * len(planned) // options.rounds
            for cell in planned[first:] + planned[:first]:
                progress.set_description(f"round {number + 1} of {options.rounds}: {cell.mode} {cell.name}")
                yield cell, number + 1
                progress.update()


@contextmanager
def _started(
    architecture: str, options: BenchOptions, samples: Samples, folder: Path, results: Results
) -> Iterator[Target]:
    """The service with this architecture; a bad end is noted in the results."""
    log, launch = folder / f"service-{architecture}.log", options.service()
    with target.service(architecture, launch, log, options.settings()) as (url, process):
        idle = processes.memory(process.pid)
        model = find_model(options, target.models(url), architecture)
        results.models[architecture] = f"{model.manifest['name']}@{model.manifest['version']}, {model.precision}"
        short, long = (
            answer(model, some, options, folder / f"answers-{architecture}") for some in (samples.short, samples.long)
        )
        yield Target(architecture, url, process.pid, model, short, long, idle, peak=idle)
        _stop(process, architecture, options, results)


def _stop(process: subprocess.Popen[bytes], architecture: str, options: BenchOptions, results: Results) -> None:
    fault = target.stop_fault(process, options.stop_timeout)
    if fault:
        results.faults.append(f"{architecture}: {fault}")


def _described(one: Target) -> str:
    short, long = sorted(one.short.tokens), sorted(one.long.tokens)
    return (
        f"{len(short)} short texts of {short[0]} to {short[-1]} tokens, median {short[len(short) // 2]}, and "
        f"{len(long)} long ones of {long[0]} to {long[-1]}, median {long[len(long) // 2]}"
    )


def _accuracies(targets: dict[str, Target], options: BenchOptions) -> list[Accuracy]:
    found = []
    for mode in options.modes:
        subject = targets[FIXED[mode]]
        threshold = cells.threshold(mode, subject, options)
        for name, answered in (("short", subject.short), ("long", subject.long)):
            taken = answered.taken(threshold)
            mean = sum(taken) / len(taken)
            found.append(Accuracy(mode, name, threshold, mean, answered.accuracy(threshold)))
    return found


def _footprint(subject: Target) -> Footprint:
    scraped: Any = target.scrape(subject.url)
    labels = {"architecture": subject.architecture, "task": subject.model.manifest["task"]}
    model = scraped.total("refrain_model_memory_bytes", **labels) if scraped else None
    return Footprint(len(processes.tree(subject.pid)), subject.idle, subject.peak, model)
