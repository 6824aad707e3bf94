"""Every metric in one file, each with who reads it; one registry for each app."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from service.jobs import Exit

SECONDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ITERATIONS = (1, 2, 3, 4, 6, 8, 12, 16)
DIFFERENCES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
MODEL = ("architecture", "task")


class Metrics:
    """The service's metrics. Labels only take values of closed sets: codes, loaded architectures and tasks, reasons."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a series beside every counter that nobody reads
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        # Alerts on the share of errors; an architecture or task that was never decided is empty.
        self.requests = Counter("refrain_requests", "Classifications by status.", ("code", *MODEL), registry=registry)
        # Alerts and dashboards of latency. Refusals are left out: they are fast just when the service is not.
        self.request_duration = Histogram(
            "refrain_request_duration_seconds",
            "Time of an answered request.",
            MODEL,
            buckets=SECONDS,
            registry=registry,
        )
        # Whoever asks where the time goes.
        self.stage_duration = Histogram(
            "refrain_stage_duration_seconds",
            "Time of an answered request in one stage.",
            ("stage", *MODEL),
            buckets=SECONDS,
            registry=registry,
        )
        # The autoscaler.
        self.queue_depth = Gauge(
            "refrain_queue_depth", "Texts waiting or between iterations.", MODEL, registry=registry
        )
        # Whoever tunes REFRAIN_MAX_BATCH_TOKENS: how full batches are, and how much of them is padding.
        self.batch_texts = Histogram(
            "refrain_batch_texts", "Texts in one batch.", MODEL, buckets=TEXTS, registry=registry
        )
        self.batch_tokens = Counter(
            "refrain_batch_tokens", "Tokens run, real or padding.", ("kind", *MODEL), registry=registry
        )
        # Whoever chooses exit thresholds: what early exit saves.
        self.iterations = Histogram(
            "refrain_iterations", "Iterations that a text took.", MODEL, buckets=ITERATIONS, registry=registry
        )
        self.exits = Counter(
            "refrain_exits", "Texts answered, by why they left.", ("reason", *MODEL), registry=registry
        )
        # Whoever chooses a cascade's threshold: what share of the texts goes on to the second model.
        self.cascade = Counter(
            "refrain_cascade", "Texts of a cascade, by who answered.", ("decided_by", "task"), registry=registry
        )
        # Whoever decides whether the shadow may answer one day: does it say the same, and how long does it take?
        # Its time is inference alone, to be held against that stage of those who answer: it waits for everybody.
        self.shadow = Counter(
            "refrain_shadow", "Texts that a shadow was to run.", ("result", *MODEL), registry=registry
        )
        self.shadow_difference = Histogram(
            "refrain_shadow_score_difference",
            "How far the shadow's probability of the answered label lies from the answer's.",
            MODEL,
            buckets=DIFFERENCES,
            registry=registry,
        )
        self.shadow_duration = Histogram(
            "refrain_shadow_duration_seconds",
            "Time of a shadowed request in inference.",
            MODEL,
            buckets=SECONDS,
            registry=registry,
        )
        # Alerts on overload: requests turned away or given up.
        self.rejected = Counter("refrain_rejected", "Requests turned away, by reason.", ("reason",), registry=registry)
        # Whoever checks that nothing runs for those who left.
        self.dropped = Counter(
            "refrain_dropped_texts",
            "Accepted texts that were not run to their end.",
            ("reason", *MODEL),
            registry=registry,
        )
        # The comparison of architectures, and which version a replica runs.
        self.model_memory = Gauge("refrain_model_memory_bytes", "Bytes of the loaded graphs.", MODEL, registry=registry)
        self.model_parameters = Gauge("refrain_model_parameters", "Parameters, all counted.", MODEL, registry=registry)
        self.model_info = Gauge(
            "refrain_model_info", "Always 1.", ("version", "precision", "provider", *MODEL), registry=registry
        )

    def exposition(self) -> bytes:
        """Write everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def loaded(
        self,
        model: tuple[str, str],
        *,
        version: str,
        precision: str,
        provider: str,
        size: int,
        parameters: int,
    ) -> None:
        """Show a loaded model; `model` is (architecture, task), `size` in bytes."""
        self.model_memory.labels(*model).set(size)
        self.model_parameters.labels(*model).set(parameters)
        self.model_info.labels(version, precision, provider, *model).set(1)

    def answered(self, model: tuple[str, str], timings_ms: Mapping[str, float]) -> None:
        """Take one answered request's times: `total`, and each stage by its name."""
        for stage, milliseconds in timings_ms.items():
            if stage == "total":
                self.request_duration.labels(*model).observe(milliseconds / 1000)
            else:
                self.stage_duration.labels(stage, *model).observe(milliseconds / 1000)

    def decided(self, models: Iterable[tuple[str, str]]) -> None:
        """Count a cascade's texts by the (architecture, task) that answered each."""
        for model in models:
            self.cascade.labels(*model).inc()


class ModelObserver:
    """What one batcher reports, from its own thread; the label children are found once."""

    def __init__(self, metrics: Metrics, model: tuple[str, str]) -> None:
        self._batch_texts = metrics.batch_texts.labels(*model)
        self._real = metrics.batch_tokens.labels("real", *model)
        self._padding = metrics.batch_tokens.labels("padding", *model)
        self._iterations = metrics.iterations.labels(*model)
        self._exits = {reason: metrics.exits.labels(reason, *model) for reason in get_args(Exit)}
        self._queue_depth = metrics.queue_depth.labels(*model)
        self._dropped = {reason: metrics.dropped.labels(reason, *model) for reason in ("deadline", "client")}

    def batch(self, texts: int, real_tokens: int, padding_tokens: int) -> None:
        """Count one run of the engine."""
        self._batch_texts.observe(texts)
        self._real.inc(real_tokens)
        self._padding.inc(padding_tokens)

    def queued(self, texts: int) -> None:
        """Show how many texts wait."""
        self._queue_depth.set(texts)

    def exit(self, reason: Exit, iterations: int) -> None:
        """Count one answered text."""
        self._exits[reason].inc()
        self._iterations.observe(iterations)

    def dropped(self, reason: Literal["deadline", "client"], texts: int) -> None:
        """Count texts that nobody waits for any more."""
        self._dropped[reason].inc(texts)
