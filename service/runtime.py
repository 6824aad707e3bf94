"""What this process serves and in which phase it is: starting, ready, draining; down when an engine is."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from service.bundle import Bundle
from service.engine_thread import EngineThread
from service.errors import (
    Draining,
    EngineDown,
    InvalidRequest,
    QueueFull,
    StartError,
    Starting,
    UnknownArchitecture,
    UnknownTask,
)
from service.loading import MakeEngine, Model, load_model
from service.metrics import Metrics
from service.routing import Facts, Plan, build_policy
from service.settings import Settings

LINGER_SECONDS = 1.0  # after the last answer: kept-alive clients meet a 503 with `Connection: close`, not a reset


class Runtime:
    """The loaded models and the phase of the process.

    Loading runs in a thread of its own; its models are published together, when all of them are warm. Everything else
    is for the event loop alone.
    """

    def __init__(self, settings: Settings, bundles: Sequence[Bundle], make: MakeEngine) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.models: dict[tuple[str, str], Model] = {}  # (task, architecture) -> model; empty while starting
        self.failure: StartError | None = None  # why loading failed: the process ends on it
        self.architectures: dict[str, list[str]] = {}  # task -> architectures
        for bundle in bundles:
            self.architectures.setdefault(bundle.manifest.task, []).append(bundle.manifest.architecture)
        only = next(iter(self.architectures)) if len(self.architectures) == 1 else None
        self.default_task = settings.default_task if settings.default_task in self.architectures else only
        self.engine_thread = EngineThread(stuck_seconds=settings.stuck_seconds)
        self._policy = build_policy(settings.routing, self.architectures)
        self._in_flight = 0
        self._idle_since = 0.0
        self._draining_since: float | None = None
        self._loader = threading.Thread(target=self._load, args=(bundles, make), name="load", daemon=True)

    def start(self) -> None:
        """Begin to load."""
        self.engine_thread.start()
        self._loader.start()

    def _load(self, bundles: Sequence[Bundle], make: MakeEngine) -> None:
        models = {}
        try:
            for bundle in bundles:
                if self._draining_since is not None:
                    return
                model = load_model(bundle, self.settings, self.metrics, self.engine_thread, make)
                models[model.manifest.task, model.manifest.architecture] = model
        except StartError as error:
            self.failure = error
        except Exception as error:  # noqa: BLE001  # the thread's edge: whatever it is, the process must end and say it
            self.failure = StartError(f"loading failed: {type(error).__name__}: {error}".replace("\n", " "))
        else:
            for model in models.values():
                model.batcher.start()
            self.models = models

    def check_alive(self) -> None:
        """Raise EngineDown when an engine is dead or stuck, or could not be loaded."""
        if self.failure is not None or not self.engine_thread.alive():
            raise EngineDown

    def check_open(self) -> None:
        """Raise Draining or Starting while new requests are not wanted."""
        if self._draining_since is not None:
            raise Draining
        if not self.models:
            raise Starting

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request as accepted, which the drain waits for; raises what check_open raises, and QueueFull."""
        self.check_open()
        # Each accepted request brings a text at least, so more requests than the queues hold texts have no place there.
        # Said before the body is read, it also bounds the memory that bodies take.
        if self._in_flight >= self.settings.max_queue * len(self.models):
            raise QueueFull(1.0)
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1
            self._idle_since = time.monotonic()

    def choose(self, task: str | None, architecture: str | None, request_id: str, key: str | None) -> Plan[Model]:
        """Find the models for a request: the architecture that it names, or what the policy plans.

        `key` is what a sticky policy sticks to, in place of the request's id.

        Raises InvalidRequest, UnknownTask, UnknownArchitecture, EngineDown.
        """
        task = task if task is not None else self.default_task
        if task is None:
            problem = f"must be one of {', '.join(sorted(self.architectures))}"
            raise InvalidRequest("The request must name a task.", errors=[{"field": "task", "problem": problem}])
        if task not in self.architectures:
            raise UnknownTask("There is no such task.", available=sorted(self.architectures))
        if architecture is None:
            plan = self._policy(Facts(task, request_id, key or request_id, partial(self._seconds_ahead, task)))
        elif architecture in self.architectures[task]:
            plan = Plan(architecture)
        else:
            raise UnknownArchitecture("There is no such architecture.", available=sorted(self.architectures[task]))
        if not self.engine_thread.alive():
            raise EngineDown
        return plan.resolve(lambda name: self.models[task, name])

    def idle_seconds(self, now: float) -> float:
        """Say for how long no accepted request has been in hand; 0 while one is."""
        return 0.0 if self._in_flight else now - self._idle_since

    def _seconds_ahead(self, task: str, name: str) -> float:
        return self.models[task, name].batcher.backlog_seconds

    def drain(self) -> None:
        """Refuse new requests from now on; the first call counts."""
        if self._draining_since is None:
            self._draining_since = time.monotonic()

    def drained(self, now: float) -> bool:
        """Whether the process may end: every accepted request is answered, or the drain has lasted long enough."""
        since = self._draining_since
        if since is None:
            return False
        quiet = self._in_flight == 0 and now >= max(since, self._idle_since) + LINGER_SECONDS
        return quiet or now >= since + self.settings.drain_seconds

    def stop(self) -> None:
        """Stop what is left of loading, then the batchers; blocks for seconds at most."""
        self.drain()
        self._loader.join(timeout=5.0)
        for model in self.models.values():
            model.batcher.stop(timeout=1.0)
        self.engine_thread.end(timeout=1.0)
