"""What this process serves and in which phase it is: starting, ready, draining; down when an engine is."""

from __future__ import annotations

import ctypes
import gc
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import Literal, TypeVar

import structlog
from starlette.requests import Request

from service.bundle import Bundle
from service.engine_thread import EngineThread
from service.errors import (
    Draining,
    EngineDown,
    InvalidRequest,
    QueueFull,
    ReloadFailed,
    StartError,
    Starting,
    UnknownArchitecture,
    UnknownTask,
)
from service.loading import MakeEngine, Model, load_model
from service.metrics import Metrics
from service.routing import Facts, Plan
from service.serving import Changes, Serving, changes, load, plan, take_over
from service.settings import Settings

LOAD_SECONDS = 110.0  # to find and load all bundles; the supervisor waits longer for one that loads before it speaks
LINGER_SECONDS = 1.0  # after the last answer: kept-alive clients meet a 503 with `Connection: close`, not a reset
LONGEST_BODIES = 64  # that may be in memory at once; of shorter ones more
RETIRE_SECONDS = 0.05  # between two looks whether a model that was replaced is still needed

GARBAGE = 200_000  # objects more than before, at which it is looked for: requests leave next to none

Done = TypeVar("Done")
FindBundles = Callable[[], Sequence[Bundle]]
TakeIn = Callable[[int], None]
"""Counts so many bytes more of a request's body as in memory; QueueFull where there is no room for them."""


class Runtime:
    """What is being served, and the phase of the process.

    Loading runs in threads of their own; its models are published together, when all of them are warm. Everything else
    is for the event loop alone.
    """

    def __init__(self, settings: Settings, find: FindBundles, make: MakeEngine) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.failure: StartError | None = None  # why loading failed: the process ends on it
        self.others_ready = True  # whether the other processes have loaded theirs; for probes
        self.engine_thread = EngineThread(stuck_seconds=settings.stuck_seconds)
        self.gave_up = False
        self.port_is_left = False  # whether new connections are for other processes, or for another service
        self._find, self._make = find, make
        self._hanging: threading.Thread | None = None  # the finding or loading that was given up
        began = time.monotonic()
        bundles = self._in_time(find, LOAD_SECONDS)
        seconds_left = LOAD_SECONDS - (time.monotonic() - began)
        self.serving = plan(settings, bundles)
        self._in_flight: Counter[Serving] = Counter()  # requests by what was served when they came
        self._body_bytes = 0  # of the requests in flight, as far as they have come
        self._idle_since = 0.0
        self._drain_begins = math.inf
        self._reloading = threading.Lock()
        self._loader = threading.Thread(target=self._load_first, args=(bundles, seconds_left), name="load", daemon=True)
        self._retirement: threading.Thread | None = None

    def start(self) -> None:
        """Begin to load, if that has not begun."""
        if self._loader.ident is None:
            self.engine_thread.start()
            self._loader.start()

    def wait_loaded(self) -> None:
        """Block until the models are there or have failed to load."""
        self._loader.join()

    @property
    def phase(self) -> Literal["starting", "ready", "draining"]:
        """Whether requests are welcome, and if not, why."""
        if time.monotonic() >= self._drain_begins:
            return "draining"
        return "ready" if self.serving.models else "starting"

    @property
    def leaving(self) -> bool:
        """Whether requests are still welcome, but not for long."""
        return time.monotonic() < self._drain_begins < math.inf

    def _load_first(self, bundles: Sequence[Bundle], seconds: float) -> None:
        try:
            self._take_over(self._in_time(lambda: self._load(bundles), seconds))
            _tidy_memory()
        except StartError as error:
            self.failure = error
        except Draining:
            pass

    def _in_time(self, work: Callable[[], Done], seconds: float) -> Done:
        """Find or load on a thread that can be given up: a disk or a graph may hang for good.

        Raises StartError, Draining.
        """
        if self._hanging is not None and self._hanging.is_alive():
            raise StartError("an earlier loading hangs, and was given up: only a restart ends it")
        done: Future[Done] = Future()

        def run() -> None:
            # New errors: those that were raised hold the frames that hold the models loaded so far.
            try:
                done.set_result(work())
            except Draining:
                done.set_exception(Draining())
            except StartError as error:
                done.set_exception(type(error)(str(error)))
            except BaseException as error:  # noqa: BLE001  # whatever it is, the process must say it in a line
                reason = f"loading failed: {type(error).__name__}: {error}".replace("\n", " ")
                done.set_exception(StartError(reason))

        thread = threading.Thread(target=run, name="load bundles", daemon=True)
        thread.start()
        try:
            return done.result(seconds)
        except TimeoutError:
            self._hanging = thread
            raise StartError(f"loading has not ended after {LOAD_SECONDS:g} s: given up") from None

    def _load(self, bundles: Sequence[Bundle]) -> Serving:
        return load(plan(self.settings, bundles), bundles, self.serving, self._load_one)

    def _load_one(self, bundle: Bundle) -> Model:
        if self._drain_begins < math.inf:
            raise Draining
        return load_model(bundle, self.settings, self.metrics, self.engine_thread, self._make)

    def reload(self) -> Changes:
        """Serve what the models directory holds now; whatever is wrong with it, nothing changes then.

        Blocks while models load, and while another reload does, so it is for a thread. Raises Starting, Draining,
        ReloadFailed.
        """
        with self._reloading:
            self.check_open()
            if self._retirement is not None:
                self._retirement.join()  # so that there are never three generations in memory
            try:
                after = self._in_time(lambda: self._load(self._find()), LOAD_SECONDS)
            except StartError as error:
                self.metrics.models.reloaded("refused")
                structlog.get_logger().error("reload failed", reason=str(error))
                raise ReloadFailed(str(error)) from error
            changed = changes(self.serving, after)
            same = (self.serving.routing, self.serving.default_task) == (after.routing, after.default_task)
            self._take_over(after)
        self.metrics.models.reloaded("taken" if changed.loaded or changed.removed else "unchanged")
        log = structlog.get_logger()
        log.info("reloaded", **asdict(changed))
        if not same:
            log.warning("others answer by default", routing=after.routing, default_task=after.default_task)
        return changed

    def _take_over(self, after: Serving) -> None:
        gone = take_over(self.serving, after, self.metrics)
        self.serving = after
        if gone:
            self._retirement = threading.Thread(target=self._retire, args=(gone,), name="retire", daemon=True)
            self._retirement.start()

    def _retire(self, gone: list[Model]) -> None:
        """Stop models once the requests that came before they were replaced are answered, and free them."""
        longest = self.settings.body_seconds + self.settings.deadline_ms / 1000
        until = time.monotonic() + longest + LINGER_SECONDS
        while any(serving is not self.serving for serving in list(self._in_flight)) and time.monotonic() < until:
            time.sleep(RETIRE_SECONDS)
        for model in gone:
            model.batcher.stop(timeout=LINGER_SECONDS)
        del model
        gone.clear()  # this thread was the last to hold them
        _tidy_memory()

    def check_alive(self) -> None:
        """Raise EngineDown when an engine is dead or stuck, or could not be loaded."""
        if self.failure is not None or not self.engine_thread.alive():
            raise EngineDown

    def check_ready(self) -> None:
        """Raise what check_alive and check_open raise, Draining also while leaving, and Starting while another is."""
        self.check_alive()
        self.check_open()
        if self.leaving:
            raise Draining
        if not self.others_ready:
            raise Starting

    def check_open(self) -> None:
        """Raise Draining or Starting while new requests are not wanted."""
        if time.monotonic() >= self._drain_begins:
            raise Draining
        if not self.serving.models:
            raise Starting

    @contextmanager
    def admitted(self) -> Iterator[TakeIn]:
        """Count a request as accepted, which the drain waits for, before its body is read; then what has come of that.

        Raises what check_open raises, and QueueFull. What is only announced takes no room: a few clients that announce
        much and send nothing would keep all others out.
        """
        self.check_open()
        # Each accepted request brings a text at least, so more requests than the queues hold texts have no place there.
        serving, held = self.serving, 0
        if self._in_flight.total() >= self.settings.max_queue * len(serving.models):
            raise QueueFull(1.0)

        def take_in(size: int) -> None:
            nonlocal held
            if self._body_bytes + size > LONGEST_BODIES * self.settings.max_body_bytes:
                raise QueueFull(1.0)
            self._body_bytes += size
            held += size

        self._in_flight[serving] += 1
        try:
            yield take_in
        finally:
            self._body_bytes -= held
            self._in_flight[serving] -= 1
            if not self._in_flight[serving]:
                del self._in_flight[serving]  # it would keep its models in memory
            self._idle_since = time.monotonic()

    def choose(self, task: str | None, architecture: str | None, request_id: str, key: str | None) -> Plan[Model]:
        """Find the models for a request: the architecture that it names, or what the policy plans.

        `key` is what a sticky policy sticks to, in place of the request's id.

        Raises InvalidRequest, UnknownTask, UnknownArchitecture, EngineDown.
        """
        serving = self.serving
        task = task if task is not None else serving.default_task
        if task is None:
            problem = f"must be one of {', '.join(sorted(serving.architectures))}"
            raise InvalidRequest("The request must name a task.", errors=[{"field": "task", "problem": problem}])
        if task not in serving.architectures:
            raise UnknownTask("There is no such task.", available=sorted(serving.architectures))
        if architecture is None:
            plan = serving.policy(Facts(task, request_id, key or request_id, partial(_seconds_ahead, serving, task)))
        elif architecture in serving.architectures[task]:
            plan = Plan(architecture)
        else:
            raise UnknownArchitecture("There is no such architecture.", available=sorted(serving.architectures[task]))
        if not self.engine_thread.alive():
            raise EngineDown
        return plan.resolve(lambda name: serving.models[task, name])

    def idle_seconds(self, now: float) -> float:
        """Say for how long no accepted request has been in hand; 0 while one is."""
        return 0.0 if self._in_flight else now - self._idle_since

    def give_up(self) -> None:
        """Fail what hangs on the engines and refuse the rest: they are dead or stuck, and the process is to end."""
        structlog.get_logger().error("the engines are dead or stuck: this process ends")
        self.gave_up = True
        self.leave_port()
        self.engine_thread.give_up()

    def leave_port(self) -> None:
        """Drain, and leave new connections to other processes or to another service; may be called from any thread."""
        self.port_is_left = True
        self.drain()

    def leave(self) -> None:
        """Drain after the delay, in which only probes learn of it; the first call counts."""
        self.drain(self.settings.drain_delay_seconds if self.phase == "ready" else 0.0)

    def drain(self, delay: float = 0.0) -> None:
        """Refuse new requests in so many seconds; what would be later than an earlier call counts for nothing."""
        self._drain_begins = min(self._drain_begins, time.monotonic() + delay)

    def drained(self, now: float) -> bool:
        """Whether the process may end: every accepted request is answered, or the drain has lasted long enough."""
        quiet = not self._in_flight and now >= max(self._drain_begins, self._idle_since) + LINGER_SECONDS
        return quiet or now >= self._drain_begins + self.settings.drain_seconds

    def stop(self) -> None:
        """Stop what is left of loading, then the batchers; blocks for seconds at most."""
        self.drain()
        self._loader.join(timeout=5.0)
        for model in self.serving.models.values():
            model.batcher.stop(timeout=1.0)
        self.engine_thread.end(timeout=1.0)


def runtime_of(request: Request) -> Runtime:
    """The runtime of the application that answers a request."""
    runtime: Runtime = request.app.state.runtime
    return runtime


def _seconds_ahead(serving: Serving, task: str, name: str) -> float:
    return serving.models[task, name].batcher.backlog_seconds


def _tidy_memory() -> None:
    """Take what has been loaded out of the garbage collector's sight, and have the C library return what was freed.

    With hundreds of requests in hand the collector took a quarter of the event loop. Left to itself the C library
    keeps the gaps, and reloads would add them up.
    """
    gc.unfreeze()  # what a reload replaced
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE)
    with suppress(AttributeError):  # not every C library has it
        ctypes.CDLL(None).malloc_trim(0)
