"""Rounds: one architecture in the service, then the other, then both, each warm and under every load."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

from loadtest import gpu, target, texts
from loadtest.driver import USUAL_STEPS, drive
from loadtest.errors import LoadTestError
from loadtest.figures import course, curve, figures_of, is_refusal, memory_figures
from loadtest.job import Job
from loadtest.options import Architecture, Load, Options
from loadtest.steps import Step, is_generator_limit, limiting
from loadtest.target import Metrics

Subject = Literal["recurrent", "baseline", "both"]
START_SECONDS = 4.0
"""About what it takes to start and to stop the service, for the progress bar."""
LOAD_SECONDS = 2.5
"""About what it takes to start and to end the load generator."""


@dataclass(frozen=True)
class Measured:
    """One load on one subject in one round; `figures` lacks what there is nothing to tell of.

    `by_architecture`: where both were asked, what of it is each one's own.
    """

    load: str
    subject: Subject
    round: int
    figures: dict[str, float]
    failures: dict[str, int] = field(default_factory=dict)
    by_architecture: dict[str, dict[str, float]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)
    course: list[dict[str, float]] = field(default_factory=list)
    generator_limited: bool = False


@dataclass(frozen=True)
class Round:
    """One subject in one round: every load on it, memory, what is loaded, and how the service ended."""

    subject: Subject
    number: int
    memory: dict[str, float]
    measured: list[Measured]
    models: list[dict[str, str]]
    stop_fault: str | None = None

    @property
    def failed(self) -> bool:
        return self.stop_fault is not None or any(one.failures for one in self.measured)

    @property
    def generator_limited(self) -> bool:
        return any(one.generator_limited for one in self.measured)


def subjects(options: Options) -> list[Subject]:
    """What is in the service in turn: each architecture alone, then, where both are wanted, both."""
    alone: list[Subject] = list(options.architectures)
    return [*alone, "both"] if len(alone) > 1 else alone


def expected_seconds(options: Options) -> float:
    """About what one subject of a round takes."""
    steps = [USUAL_STEPS if load.shape == "step" else 1 for load in options.loads()]
    loads = sum(load.seconds * count + LOAD_SECONDS for load, count in zip(options.loads(), steps, strict=True))
    return loads + options.warmup + (0 if options.host else START_SECONDS)


def run(subject: Subject, number: int, options: Options, passed: Callable[[float], None]) -> Round:
    """One subject in one round, against the running service or one that is started for it and stopped after it."""
    architectures: tuple[Architecture, ...] = options.architectures if subject == "both" else (subject,)
    with tempfile.TemporaryDirectory(prefix="refrain-loadtest-") as name:
        gpu_before = gpu.memory_bytes()
        with _service(architectures, options, Path(name) / "service.log") as (url, stop):
            runner = _Runner(url, subject, number, architectures, options, passed)
            _check_served(url, architectures, options.task)
            idle = target.scrape(url)
            measured = runner.all_loads()
            memory = memory_figures(idle, runner.scrapes, architectures, options.task)
            if gpu_before is not None and runner.gpu_bytes is not None and not options.host:
                memory["gpu_memory_bytes"] = runner.gpu_bytes - gpu_before
            return Round(subject, number, memory, measured, _models(idle, architectures, options.task), stop())


@contextmanager
def _service(
    architectures: Sequence[Architecture], options: Options, log: Path
) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """A service's URL, and what stops it and says what was wrong with its end; one that runs already is left."""
    if options.host:
        target.wait_ready(options.host, options.ready_timeout)
        yield options.host, lambda: None
        return
    settings = {"REFRAIN_ARCHITECTURES": ",".join(architectures)}
    with target.service(architectures[0], options, log, settings) as (url, process):
        yield url, lambda: target.stop_fault(process, options.stop_timeout)


def _check_served(url: str, architectures: Sequence[Architecture], task: str) -> None:
    loaded = [(str(one.get("task")), str(one.get("architecture"))) for one in target.models(url)]
    for architecture in architectures:
        if (task, architecture) not in loaded:
            there = ", ".join(f"{name} ({kind})" for name, kind in sorted(loaded)) or "nothing"
            raise LoadTestError(f"the service has no {architecture} model for the task {task!r}; it has {there}")


def _models(scrape: Metrics | None, architectures: Sequence[Architecture], task: str) -> list[dict[str, str]]:
    found = (
        scrape.labels("refrain_model_info", architecture=name, task=task) if scrape else {} for name in architectures
    )
    return [labels for labels in found if labels]


@dataclass
class _Runner:
    """The loads of one subject in one round, one after the other."""

    url: str
    subject: Subject
    number: int
    architectures: Sequence[Architecture]
    options: Options
    passed: Callable[[float], None]
    scrapes: list[Metrics | None] = field(default_factory=list)
    gpu_bytes: float | None = None

    def all_loads(self) -> list[Measured]:
        loads, done = self.options.loads(), list[Measured]()
        bodies = [body.encode() for _, body in self._requests(loads[0].list_size)]
        target.warm_up(self.url, bodies, users=self.options.users, seconds=self.options.warmup)
        for load in loads:
            done.append(self._measure(load, self._level(load, done)))
        return done

    def _level(self, load: Load, done: Sequence[Measured]) -> float:
        """Where the height of a load is not given: half of what the users got, with room to climb."""
        if load.level is not None:
            return load.level
        got = (one.figures.get("requests_per_second", 0.0) for one in done if one.load == "users")
        return next(got, 0.0) / 2 or self.options.rate

    def _requests(self, list_size: int) -> list[tuple[str, str]]:
        """Every text once for each architecture, one after the other."""
        options = self.options
        sources = texts.load(options.texts, seed=options.seed, mixed=options.lengths == "mixed")
        each = [
            [
                (architecture, body.decode())
                for body in texts.request_bodies(
                    sources,
                    list_size=list_size,
                    architecture=architecture,
                    task=options.task,
                    exit_threshold=options.exit_threshold,
                )
            ]
            for architecture in self.architectures
        ]
        return list(chain.from_iterable(zip(*each, strict=True)))

    def _measure(self, load: Load, level: float) -> Measured:
        options = self.options
        job = Job(
            url=self.url,
            requests=self._requests(load.list_size),
            list_size=load.list_size,
            arrivals=load.arrivals,
            shape=load.shape,
            level=level,
            seconds=load.seconds,
            service_level_ms=options.service_level_ms,
            most_rate=options.most_rate,
            seed=f"{options.seed}, {self.number}",
        )
        driven = drive(job, self.passed)
        self.scrapes += [*driven.during, driven.after]
        self.gpu_bytes = max(filter(None, (self.gpu_bytes, driven.gpu_bytes)), default=None)
        trace, is_step = driven.trace, load.shape == "step"
        figures, by_architecture = figures_of(driven, load, options, self.architectures)
        limited = is_generator_limit(trace.generator_cores, figures.get("late_p99_ms"), figures.get("p99_ms"))
        return Measured(
            load=load.name,
            subject=self.subject,
            round=self.number,
            figures=figures,
            failures={
                reason: count for reason, count in trace.failures.items() if not (is_step and is_refusal(reason))
            },
            by_architecture=by_architecture,
            steps=trace.steps,
            curve=[] if is_step else curve(trace.answers),
            course=course(trace.answers) if load.shape in ("ramp", "spike") else [],
            generator_limited=bool(limiting(trace.steps, options.service_level_ms)) if is_step else limited,
        )
