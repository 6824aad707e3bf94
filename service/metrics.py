"""Every metric in one file, each with who reads it; whichever process is asked, the answer is for all of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Metric,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.values import MultiProcessValue

from service.jobs import Drop, Exit
from service.process_tree import ProcessTree
from service.scratch import scratch_directory

if TYPE_CHECKING:
    from service.loading import Model

SECONDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ITERATIONS = (1, 2, 3, 4, 6, 8, 12, 16)
DIFFERENCES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
MODEL = ("architecture", "task")
ERRORS = ("500", "503", "504")  # that alerts count
Reload = Literal["taken", "unchanged", "refused"]
DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's own name for where processes put their values


def share_metrics(name: str) -> None:
    """Keep the values of all metrics made from now on in files of that name in DIRECTORY, where others find them.

    Whoever takes the place of a dead process takes its name too, and goes on from its values: counters never fall.
    """
    values.ValueClass = MultiProcessValue(lambda: name)  # type: ignore[no-untyped-call]


@contextmanager
def shared_metrics(name: str) -> Iterator[Path]:
    """Make and name DIRECTORY for this process and those that it starts; it is gone in the end. Raises StartError."""
    with scratch_directory() as directory:
        os.environ[DIRECTORY] = str(directory)
        share_metrics(name)
        yield directory


class SupervisorMetrics:
    """What only the supervisor knows."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        # Alerts: fewer than asked for, and a process that does not live.
        self.processes = Gauge(
            "refrain_processes", "Processes that are ready.", multiprocess_mode="livesum", registry=registry
        )
        self.restarts = Counter("refrain_process_restarts", "Processes that were replaced.", registry=registry)


class Metrics:
    """The service's metrics. Labels only take values of closed sets: codes, loaded architectures and tasks, reasons."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a series beside every counter that nobody reads
        self.registry = registry = CollectorRegistry()
        self._shown = _over_processes(Path(os.environ[DIRECTORY])) if DIRECTORY in os.environ else registry
        PlatformCollector(registry=self._shown)
        if self._shown is registry:
            ProcessCollector(registry=registry)
            GCCollector(registry=registry)
        # Alerts on the share of errors; an architecture or task that was never decided is empty.
        self.requests = Counter("refrain_requests", "Classifications by status.", ("code", *MODEL), registry=registry)
        self._expect_errors("", "")
        # Alerts on overload: requests turned away or given up.
        self.rejected = Counter("refrain_rejected", "Requests turned away, by reason.", ("reason",), registry=registry)
        # Alerts: answers that are less than what was asked for.
        self.degraded = Counter(
            "refrain_degraded_texts", "Texts whose answer says `degraded`.", ("reason", *MODEL), registry=registry
        )
        # Whoever chooses a cascade's threshold: what share of the texts goes on to the second model.
        self.cascade = Counter(
            "refrain_cascade", "Texts of a cascade, by who answered.", ("decided_by", "task"), registry=registry
        )
        self.durations = DurationMetrics(registry)
        self.batches = BatchMetrics(registry)
        self.shadows = ShadowMetrics(registry)
        self.models = ModelMetrics(registry)

    def exposition(self) -> bytes:
        """Write everything in Prometheus' text format; takes milliseconds, so not on the event loop."""
        return generate_latest(self._shown)

    def loaded(self, model: Model) -> None:
        """Show what is loaded, and that none of its requests has failed yet."""
        self.models.loaded(model)
        self._expect_errors(*model.metric_labels)

    def _expect_errors(self, architecture: str, task: str) -> None:
        for code in ERRORS:
            self.requests.labels(code, architecture, task)  # 0 from the start, or the first burst would be no increase

    def decided(self, models: Iterable[tuple[str, str]]) -> None:
        """Count a cascade's texts by the (architecture, task) that answered each."""
        for model in models:
            self.cascade.labels(*model).inc()


class DurationMetrics:
    """How long answered requests take. Refusals are left out: they are fast just when the service is not."""

    def __init__(self, registry: CollectorRegistry) -> None:
        # Alerts and dashboards of latency.
        self.request = Histogram(
            "refrain_request_duration_seconds",
            "Time of an answered request.",
            MODEL,
            buckets=SECONDS,
            registry=registry,
        )
        # Whoever asks where the time goes.
        self.stage = Histogram(
            "refrain_stage_duration_seconds",
            "Time of an answered request in one stage.",
            ("stage", *MODEL),
            buckets=SECONDS,
            registry=registry,
        )
        self._found: dict[tuple[str, tuple[str, str]], Histogram] = {}

    def answered(self, model: tuple[str, str], timings_ms: Mapping[str, float]) -> None:
        """Take one answered request's times: `total`, and each stage by its name."""
        for stage, milliseconds in timings_ms.items():
            self._of(stage, model).observe(milliseconds / 1000)

    def _of(self, stage: str, model: tuple[str, str]) -> Histogram:
        """Where a stage's time of a model goes, looked up in the library once."""
        found = self._found.get((stage, model))
        if found is None:
            found = self.request.labels(*model) if stage == "total" else self.stage.labels(stage, *model)
            self._found[stage, model] = found
        return found


class BatchMetrics:
    """What batchers do; each reports through a ModelObserver."""

    def __init__(self, registry: CollectorRegistry) -> None:
        # The autoscaler. As of all gauges, what a dead process held is not counted.
        self.queue_depth = Gauge(
            "refrain_queue_depth",
            "Texts waiting or between iterations.",
            MODEL,
            multiprocess_mode="livesum",
            registry=registry,
        )
        # Whoever tunes REFRAIN_MAX_BATCH_TOKENS: how full batches are, and how much of them is padding.
        self.texts = Histogram("refrain_batch_texts", "Texts in one batch.", MODEL, buckets=TEXTS, registry=registry)
        self.tokens = Counter(
            "refrain_batch_tokens", "Tokens run, real or padding.", ("kind", *MODEL), registry=registry
        )
        # Whoever chooses exit thresholds: what early exit saves.
        self.iterations = Histogram(
            "refrain_iterations", "Iterations that a text took.", MODEL, buckets=ITERATIONS, registry=registry
        )
        self.exits = Counter(
            "refrain_exits", "Texts answered, by why they left.", ("reason", *MODEL), registry=registry
        )
        # Whoever checks that nothing runs for those who left.
        self.dropped = Counter(
            "refrain_dropped_texts",
            "Accepted texts that were not run to their end.",
            ("reason", *MODEL),
            registry=registry,
        )


class ShadowMetrics:
    """For whoever decides whether the shadow may answer one day: does it say the same, and how long does it take?"""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.texts = Counter("refrain_shadow", "Texts that a shadow was to run.", ("result", *MODEL), registry=registry)
        self.score_difference = Histogram(
            "refrain_shadow_score_difference",
            "How far the shadow's probability of the answered label lies from the answer's.",
            MODEL,
            buckets=DIFFERENCES,
            registry=registry,
        )
        # Inference alone, to be held against that stage of those who answer: a shadow waits for everybody.
        self.duration = Histogram(
            "refrain_shadow_duration_seconds",
            "Time of a shadowed request in inference.",
            MODEL,
            buckets=SECONDS,
            registry=registry,
        )


class ModelMetrics:
    """What is loaded: for the comparison of architectures, and to see which version a replica runs."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.memory = Gauge(  # each process holds its own
            "refrain_model_memory_bytes",
            "Bytes of the loaded graphs' files, in all processes; run in FP32 they take more than twice that.",
            MODEL,
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.parameters = Gauge(  # the same in each
            "refrain_model_parameters",
            "Parameters, all counted.",
            MODEL,
            multiprocess_mode="livemax",
            registry=registry,
        )
        self.info = Gauge(  # while a reload goes round, both versions have 1
            "refrain_model_info",
            "1 for what is loaded, 0 for what was.",
            ("version", "precision", "provider", *MODEL),
            multiprocess_mode="livemax",
            registry=registry,
        )
        # Alerts on a refusal: a signal has no answer, and one process may refuse what another has taken.
        self.reloads = Counter(
            "refrain_reloads", "Reloads, counted by each process, by their outcome.", ("outcome",), registry=registry
        )
        for outcome in get_args(Reload):
            self.reloads.labels(outcome)  # 0 from the start, or the first would be no increase

    def reloaded(self, outcome: Reload) -> None:
        """Count a reload."""
        self.reloads.labels(outcome).inc()

    def loaded(self, model: Model) -> None:
        """Show what is loaded."""
        self.memory.labels(*model.metric_labels).set(model.engine.model_bytes)
        self.parameters.labels(*model.metric_labels).set(model.manifest.parameters)
        self._info(model).set(1)

    def unloaded(self, model: Model) -> None:
        """Show what has gone: at 0, since files that processes share forget no label."""
        self.memory.labels(*model.metric_labels).set(0)
        self.parameters.labels(*model.metric_labels).set(0)
        self._info(model).set(0)

    def _info(self, model: Model) -> Gauge:
        engine = model.engine
        return self.info.labels(model.manifest.version, engine.precision, engine.provider, *model.metric_labels)


class ModelObserver:
    """What one batcher reports, from its own thread; the label children are found once."""

    def __init__(self, metrics: BatchMetrics, model: tuple[str, str]) -> None:
        self._batch_texts = metrics.texts.labels(*model)
        self._real = metrics.tokens.labels("real", *model)
        self._padding = metrics.tokens.labels("padding", *model)
        self._iterations = metrics.iterations.labels(*model)
        self._exits = {reason: metrics.exits.labels(reason, *model) for reason in get_args(Exit)}
        self._queue_depth = metrics.queue_depth.labels(*model)
        self._queued = 0
        self._dropped = {reason: metrics.dropped.labels(reason, *model) for reason in get_args(Drop)}

    def batch(self, texts: int, real_tokens: int, padding_tokens: int) -> None:
        """Count one run of the engine."""
        self._batch_texts.observe(texts)
        self._real.inc(real_tokens)
        self._padding.inc(padding_tokens)

    def queued(self, texts: int) -> None:
        """Show how many texts wait, beside those of a model that this one takes over from; one thread at a time."""
        self._queue_depth.inc(texts - self._queued)
        self._queued = texts

    def exit(self, reason: Exit, iterations: int) -> None:
        """Count one answered text."""
        self._exits[reason].inc()
        self._iterations.observe(iterations)

    def dropped(self, reason: Drop, texts: int) -> None:
        """Count texts that nobody waits for any more."""
        self._dropped[reason].inc(texts)


class _AllProcesses(Collector):
    """The values of all processes, but for those of one that begins just now: its file is made, and still empty."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def collect(self) -> Iterable[Metric]:
        files = [str(file) for file in self._directory.glob("*.db") if _size(file)]
        metrics: Iterable[Metric] = MultiProcessCollector.merge(files, accumulate=True)  # type: ignore[no-untyped-call]
        return metrics


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # a dead process's, removed meanwhile
        return 0


def _over_processes(directory: Path) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(_AllProcesses(directory))
    registry.register(ProcessTree(directory))
    return registry
