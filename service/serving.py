"""Which models answer, and everything that follows from them: put together once, then replaced as a whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from service.bundle import Bundle
from service.errors import SettingsError
from service.loading import Model
from service.metrics import Metrics
from service.routing import Policy, build_policy
from service.settings import Settings

Key = tuple[str, str]
"""Task and architecture."""


@dataclass(frozen=True, eq=False)
class Serving:
    """What answers requests. Whoever took hold of one before it was replaced sees all of it unchanged."""

    architectures: Mapping[str, Sequence[str]]
    """task -> architectures"""
    default_task: str | None
    routing: str
    """The policy as a setting."""
    policy: Policy
    models: Mapping[Key, Model] = field(default_factory=dict)
    """Empty while starting."""


@dataclass(frozen=True)
class Changes:
    """What a new serving brings, by the models' names and versions."""

    loaded: list[str]
    kept: list[str]
    removed: list[str]


def plan(settings: Settings, bundles: Sequence[Bundle]) -> Serving:
    """What is to serve, its models yet to be loaded; raises SettingsError where a setting does not fit them."""
    architectures: dict[str, list[str]] = {}
    for bundle in bundles:
        architectures.setdefault(bundle.manifest.task, []).append(bundle.manifest.architecture)
    routing = _routing(settings, {bundle.manifest.architecture for bundle in bundles})
    return Serving(architectures, _default_task(settings, architectures), routing, build_policy(routing, architectures))


def _default_task(settings: Settings, tasks: Collection[str]) -> str | None:
    """As set; where nothing is set, the only task, or none of several that do not hold the setting's default."""
    if settings.default_task in tasks:
        return settings.default_task
    if "default_task" in settings.model_fields_set:
        known = ", ".join(sorted(tasks))
        raise SettingsError(f"REFRAIN_DEFAULT_TASK={settings.default_task}: must be one of the tasks loaded, {known}")
    return next(iter(tasks)) if len(tasks) == 1 else None


def _routing(settings: Settings, architectures: Collection[str]) -> str:
    """As set; where nothing is set, the only architecture that there is answers."""
    if "routing" in settings.model_fields_set or len(architectures) != 1:
        return settings.routing
    return f"fixed:{next(iter(architectures))}"


def load(planned: Serving, bundles: Sequence[Bundle], before: Serving, load_one: Callable[[Bundle], Model]) -> Serving:
    """Fill a plan with models: those of `before` where the bundle is the same to the last word, else fresh ones."""
    models = {}
    for bundle in bundles:
        key = bundle.manifest.task, bundle.manifest.architecture
        old = before.models.get(key)
        models[key] = old if old is not None and old.manifest == bundle.manifest else load_one(bundle)
    return replace(planned, models=models)


def changes(before: Serving, after: Serving) -> Changes:
    """Which models come, stay and go."""
    old, new = (sorted(model.bundle.id for model in serving.models.values()) for serving in (before, after))
    fresh = {model.bundle.id for key, model in after.models.items() if before.models.get(key) is not model}
    return Changes(
        loaded=[name for name in new if name in fresh],
        kept=[name for name in new if name not in fresh],
        removed=[name for name in old if name not in new],
    )


def take_over(before: Serving, after: Serving, metrics: Metrics) -> list[Model]:
    """Let the new models begin, and show the change in the metrics; the answer is those that are to go."""
    gone = [model for key, model in before.models.items() if after.models.get(key) is not model]
    for model in gone:
        metrics.models.unloaded(model)
    for key, model in after.models.items():
        if before.models.get(key) is not model:
            model.batcher.start()
            metrics.loaded(model)
    return gone
