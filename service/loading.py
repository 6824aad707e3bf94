"""From bundles on disk to warm engines: the one place that makes engines and batchers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import structlog

from service.batcher import Batcher, Limits, RunsBatches
from service.bundle import Bundle, find_bundles, load_bundle
from service.device_engine import DeviceEngine
from service.engine import Engine, open_engine
from service.engine_thread import EngineThread
from service.errors import BundleError, SettingsError
from service.jobs import CALL_TOKENS, Pace
from service.manifest import Manifest
from service.metrics import Metrics, ModelObserver
from service.settings import Settings

# On a CPU a call of 150 tokens is already as fast, for each token, as one of 2,000, and short turns are good for all.
BATCH_TOKENS = {"cpu": 256, "cuda": 8192}
WARM_UP_LENGTHS = (1, 16, 64)  # tokens; and as many of the longest as fit a batch,
WARM_UP_RUNS = 3  # so often, of which the fastest run tells how fast it is when warm


class ServingEngine(RunsBatches, Protocol):
    """An engine that also says what was chosen for it."""

    precision: Literal["fp32", "fp16", "int8"]
    provider: Literal["cpu", "cuda"]
    model_bytes: int


MakeEngine = Callable[[Bundle, Settings], ServingEngine]


@dataclass(frozen=True)
class Model:
    """A loaded bundle and what runs it."""

    bundle: Bundle
    engine: ServingEngine
    batcher: Batcher

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self.bundle.manifest

    @property
    def metric_labels(self) -> tuple[str, str]:
        """Architecture and task, in the order of the metrics' labels."""
        return self.manifest.architecture, self.manifest.task


def load_bundles(settings: Settings) -> list[Bundle]:
    """Read and verify the bundles asked for; raises BundleError, or SettingsError for an unknown architecture."""
    bundles = [load_bundle(path) for path in find_bundles(settings.models_dir)]
    there = sorted({bundle.manifest.architecture for bundle in bundles})
    if unknown := [name for name in settings.architectures if name not in there]:
        raise SettingsError(
            f"REFRAIN_ARCHITECTURES={','.join(unknown)}: {settings.models_dir} has only {', '.join(there)}"
        )
    wanted = [b for b in bundles if b.manifest.architecture in (settings.architectures or there)]
    decides: dict[tuple[str, str], Bundle] = {}
    named: dict[str, Bundle] = {}
    for bundle in wanted:
        manifest = bundle.manifest
        if (other := decides.setdefault((manifest.task, manifest.architecture), bundle)) is not bundle:
            raise BundleError(f"{other.path} and {bundle.path} are the same task and architecture: keep one of them")
        if (other := named.setdefault(manifest.name, bundle)) is not bundle:  # a path of the protocol would mean both
            raise BundleError(f"{other.path} and {bundle.path} have the same name, {manifest.name}: rename one")
    return wanted


def make_engine(bundle: Bundle, settings: Settings) -> Engine | DeviceEngine:
    """Open a bundle's graphs as the settings have it; raises SettingsError, BundleError."""
    engine = open_engine(bundle, provider=settings.provider, precision=settings.precision, threads=settings.threads)
    # Once more: whoever copies a bundle over this one meanwhile must not have it answer under this one's version.
    if load_bundle(bundle.path).manifest != bundle.manifest:
        raise BundleError(f"{bundle.path} was replaced while it was loaded: reload once all of it is there")
    return DeviceEngine(engine) if engine.provider == "cuda" else engine


def load_model(bundle: Bundle, settings: Settings, metrics: Metrics, thread: EngineThread, make: MakeEngine) -> Model:
    """Open a bundle and run it once over short and long texts; its batcher is not started.

    Raises SettingsError, and BundleError also where its graphs do not run or do not fit its labels.
    """
    started = time.monotonic()
    engine = make(bundle, settings)
    batch_tokens = settings.max_batch_tokens or BATCH_TOKENS[engine.provider]
    pace = _warm_up(engine, bundle, batch_tokens)
    _check_labels(engine, bundle)
    labels = bundle.manifest.architecture, bundle.manifest.task
    limits = Limits(
        batch_tokens=batch_tokens,
        queue_texts=settings.max_queue,
        queue_tokens=settings.max_queue_tokens,
        queue_seconds=settings.max_queue_ms / 1000,
        brown_out_seconds=settings.brown_out_ms / 1000,
    )
    batcher = Batcher(
        engine,
        thread,
        limits=limits,
        observer=ModelObserver(metrics.batches, labels),
        temperatures=bundle.manifest.calibration.temperatures,
        pace=pace,
    )
    seconds = round(time.monotonic() - started, 3)
    structlog.get_logger().info(
        "loaded", model=bundle.id, precision=engine.precision, provider=engine.provider, seconds=seconds
    )
    return Model(bundle, engine, batcher)


def _warm_up(engine: ServingEngine, bundle: Bundle, batch_tokens: int) -> Pace:
    """Run short and long texts; the answer is the pace of full batches, which is that of a queue."""
    manifest = bundle.manifest
    texts = max(1, batch_tokens // manifest.max_tokens)
    try:
        for length in WARM_UP_LENGTHS:
            _seconds_for(engine, manifest, 1, length)
        engine.embed([[bundle.tokenizer.get_vocab_size() - 1]])  # else a text that has it would fail, and its list
        seconds = min(_seconds_for(engine, manifest, texts, manifest.max_tokens) for _ in range(WARM_UP_RUNS))
    except Exception as error:  # the runtime's exceptions share no base class of its own
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise BundleError(f"{bundle.path}: its graphs do not run: {reason}") from error
    return Pace(seconds, texts * manifest.iterations * (manifest.max_tokens + CALL_TOKENS), texts)


def _check_labels(engine: ServingEngine, bundle: Bundle) -> None:
    _states, logits_BC = engine.step(engine.embed([[0]]))
    if logits_BC.shape != (1, len(bundle.manifest.labels)):
        given = logits_BC.shape[-1]
        raise BundleError(
            f"{bundle.path}: its graphs give {given} numbers for a text, its manifest has "
            f"{len(bundle.manifest.labels)} labels"
        )


def _seconds_for(engine: ServingEngine, manifest: Manifest, texts: int, length: int) -> float:
    """Run so many texts of so many tokens, or as long as they can be, to their full depth."""
    started = time.monotonic()
    states = engine.embed([[0] * min(length, manifest.max_tokens)] * texts)
    for _ in range(manifest.iterations):
        states, _logits_BC = engine.step(states)
    return time.monotonic() - started
