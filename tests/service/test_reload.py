"""Reloading the bundles: what is kept, what takes over, what goes, and that a bad one changes nothing."""

from __future__ import annotations

import gc
import json
import shutil
import signal
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, get_args

import httpx2
import pytest
import structlog
from fastapi.testclient import TestClient

from service.app import create_app
from service.bundle import MANIFEST, Bundle
from service.errors import BundleError, Draining, StartError
from service.jobs import Answer, Text
from service.loading import Model
from service.manifest import Manifest, content_version
from service.metrics import Reload
from service.runtime import Runtime
from service.settings import Settings
from tests import tiny
from tests.service.fakes import CLASS_TOKEN, FakeEngine, fake_bundle, wait_until
from tests.serving import Process, serving

KEY = {"X-API-Key": "key"}
RELOADS = "refrain_reloads_total"


def bundle(architecture: str = "recurrent", task: str = "sentiment", **changed: Any) -> Bundle:
    made = fake_bundle(task, architecture)
    return Bundle(made.path, made.manifest.model_copy(update=changed), made.tokenizer)


@dataclass
class Shelf:
    """An app, the bundles that it finds at a reload, and the engines that it made, the latest last."""

    bundles: list[Bundle]
    engines: list[FakeEngine] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)  # versions whose graphs do not load
    hang: dict[str, Event] = field(default_factory=dict)  # and those that load once it is set
    others_told: int = 0

    @contextmanager
    def serve(self, **settings: Any) -> Iterator[TestClient]:
        app = create_app(
            Settings(**{"api_keys": ("key",)} | settings),
            self.bundles,
            lambda bundle, settings: self.make(bundle),
            self.tell,
        )
        self.state = app.state
        self.runtime: Runtime = app.state.runtime
        with TestClient(app, raise_server_exceptions=False, headers=KEY) as client:
            try:
                wait_until(lambda: client.get("/readyz").status_code == 200)
                yield client
            finally:
                for engine in self.engines:
                    engine.gate.set()

    def reloading(self) -> bool:
        """Whether a reload that was asked for over HTTP has begun."""
        return self.state.reload is not None and self.state.reload.running()

    def make(self, bundle: Bundle) -> FakeEngine:
        if bundle.manifest.version in self.bad:
            raise BundleError(f"{bundle.manifest.version} does not load")
        if hanging := self.hang.get(bundle.manifest.version):
            assert hanging.wait(timeout=60)
        self.engines.append(FakeEngine(len(bundle.manifest.labels)))
        return self.engines[-1]

    def tell(self) -> None:
        self.others_told += 1

    def sample(self, name: str, **labels: str) -> float | None:
        return self.runtime.metrics.registry.get_sample_value(name, labels)


def outcomes(shelf: Shelf) -> dict[str, float | None]:
    """How often reloads ended in which way."""
    return {outcome: shelf.sample(RELOADS, outcome=outcome) for outcome in get_args(Reload)}


def classify(client: TestClient, **fields: Any) -> httpx2.Response:
    return client.post("/classify", json={"inputs": "a film", **fields})


def answering(client: TestClient) -> str:
    """The model that answers now."""
    name: str = classify(client).json()["results"][0]["model"]
    return name


def block(client: TestClient, engine: FakeEngine, pool: ThreadPoolExecutor) -> Future[httpx2.Response]:
    engine.entered.clear()
    engine.gate.clear()
    answer = pool.submit(classify, client)
    assert engine.entered.wait(timeout=10)
    return answer


def test_what_is_unchanged_keeps_its_engine() -> None:
    shelf = Shelf([bundle(), bundle("baseline")])
    with shelf.serve() as client:
        answer = client.post("/reload")
        assert answer.status_code == 200
        kept = ["sentiment-baseline@0123456789ab", "sentiment-recurrent@0123456789ab"]
        assert answer.json() == {"loaded": [], "kept": kept, "removed": []}
        assert len(shelf.engines) == 2
        assert shelf.others_told == 1
        assert outcomes(shelf) == {"taken": 0, "unchanged": 1, "refused": 0}


def test_a_new_version_takes_over_and_the_old_one_finishes_what_it_began() -> None:
    shelf = Shelf([bundle(version="a" * 12, labels=["bad", "good"])])
    with shelf.serve() as client, ThreadPoolExecutor() as pool:
        begun = block(client, shelf.engines[0], pool)
        shelf.bundles[:] = [bundle(version="b" * 12, labels=["no", "yes"])]
        answer = client.post("/reload").json()
        assert answer == {
            "loaded": ["sentiment-recurrent@" + "b" * 12],
            "kept": [],
            "removed": ["sentiment-recurrent@" + "a" * 12],
        }
        assert [model["version"] for model in client.get("/models").json()["models"]] == ["b" * 12]
        waiting = pool.submit(answering, client)  # its model is there; the engines' thread is busy with the old one
        wait_until(lambda: shelf.sample("refrain_queue_depth", architecture="recurrent", task="sentiment") == 2)
        shelf.engines[0].gate.set()
        result = begun.result(timeout=10).json()["results"][0]
        assert result["model"] == "sentiment-recurrent@" + "a" * 12
        assert set(result["scores"]) == {"bad", "good"}
        assert waiting.result(timeout=10) == "sentiment-recurrent@" + "b" * 12
        wait_until(lambda: shelf.sample("refrain_queue_depth", architecture="recurrent", task="sentiment") == 0)


def test_a_bundle_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf([bundle(version="a" * 12)])
    with shelf.serve() as client:
        monkeypatch.setattr("service.runtime.LOAD_SECONDS", 0.3)  # of the reloads: a busy machine starts in more
        hanging = Event()
        shelf.hang["b" * 12] = hanging
        shelf.bundles[:] = [bundle(version="b" * 12)]
        answer = client.post("/reload")
        assert answer.status_code == 409
        assert answer.json()["detail"] == "Nothing was changed: loading has not ended after 0.3 s: given up"
        assert answering(client) == "sentiment-recurrent@" + "a" * 12
        shelf.bundles[:] = [bundle(version="c" * 12)]
        assert "an earlier loading hangs" in client.post("/reload").json()["detail"]
        hanging.set()
        monkeypatch.setattr("service.runtime.LOAD_SECONDS", 60)
        wait_until(lambda: client.post("/reload").status_code == 200)
        assert answering(client) == "sentiment-recurrent@" + "c" * 12
        assert outcomes(shelf)["taken"] == 1


def test_a_refused_reload_keeps_nothing_that_it_had_loaded() -> None:
    shelf = Shelf([bundle(version="a" * 12)])
    with shelf.serve() as client:
        shelf.bundles[:] = [bundle("baseline", version="b" * 12), bundle(version="c" * 12)]
        shelf.bad.add("c" * 12)
        gc.disable()  # it comes rarely in the service, too
        try:
            assert client.post("/reload").status_code == 409
            loaded = weakref.ref(shelf.engines.pop())
            wait_until(lambda: loaded() is None, seconds=5)
        finally:
            gc.enable()
    shelf.engines.clear()


def test_a_disk_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf([bundle()])
    with shelf.serve() as client:
        monkeypatch.setattr("service.runtime.LOAD_SECONDS", 0.3)
        hanging = Event()
        monkeypatch.setattr(shelf.runtime, "_find", lambda: hanging.wait(60) and shelf.bundles)
        assert "loading has not ended" in client.post("/reload").json()["detail"]
        hanging.set()


def test_a_disk_that_hangs_at_a_start_is_given_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.runtime.LOAD_SECONDS", 0.3)
    hanging = Event()
    with pytest.raises(StartError, match=r"^loading has not ended after 0\.3 s: given up$"):
        Runtime(Settings(), lambda: hanging.wait(60) and [], lambda bundle, settings: FakeEngine())
    hanging.set()


def test_a_start_that_hangs_is_given_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.runtime.LOAD_SECONDS", 0.3)
    shelf = Shelf([bundle(version="a" * 12)])
    shelf.hang["a" * 12] = hanging = Event()
    runtime: Runtime = create_app(Settings(), shelf.bundles, lambda bundle, settings: shelf.make(bundle)).state.runtime
    runtime.start()
    try:
        runtime.wait_loaded()
        assert str(runtime.failure) == "loading has not ended after 0.3 s: given up"
    finally:
        hanging.set()
        runtime.stop()


def test_a_request_that_came_before_is_never_refused_for_a_reload() -> None:
    """It has chosen its model, and its texts reach the engine only after the model was replaced."""
    shelf = Shelf([bundle(version="a" * 12)])
    with shelf.serve() as client:
        with shelf.runtime.admitted():
            model = shelf.runtime.choose(None, None, "id", None).first
            for version in ("a" * 12, "b" * 12):  # the first changes nothing, the second does
                shelf.bundles[:] = [bundle(version=version)]
                assert client.post("/reload").status_code == 200
            time.sleep(0.3)  # in which the model would be stopped, if nobody cared
            assert isinstance(run_text(model), Answer)
        wait_until(lambda: isinstance(run_text(model), Draining))


def run_text(model: Model) -> Answer | Draining:
    try:
        job = model.batcher.submit([Text([CLASS_TOKEN, 1], 1)], time.monotonic() + 10)
    except Draining as refusal:
        return refusal
    (result,) = job.future.result(timeout=10)
    assert isinstance(result, Answer | Draining)
    return result


def test_what_was_replaced_is_freed() -> None:
    shelf = Shelf([bundle(version="a" * 12)])
    alive: weakref.WeakSet[FakeEngine] = weakref.WeakSet()

    class Watched(FakeEngine):
        __hash__ = object.__hash__

    def make(bundle: Bundle) -> FakeEngine:
        engine = Watched()
        alive.add(engine)
        return engine

    shelf.make = make  # type: ignore[method-assign]
    with shelf.serve() as client:
        for version in ("b" * 12, "a" * 12) * 3:
            shelf.bundles[:] = [bundle(version=version)]
            assert client.post("/reload").status_code == 200
            assert answering(client).endswith(version)
            assert len(alive) <= 2
        wait_until(lambda: len(alive) == 1)  # without the garbage collector's help, which may come late


def test_the_metrics_show_what_is_loaded() -> None:
    shelf = Shelf([bundle(version="a" * 12), bundle("baseline")])
    model = {"architecture": "recurrent", "task": "sentiment"}
    info = {"precision": "fp32", "provider": "cpu", **model}
    with shelf.serve() as client:
        shelf.bundles[:] = [bundle(version="b" * 12)]
        assert client.post("/reload").status_code == 200
        assert shelf.sample("refrain_model_info", version="a" * 12, **info) == 0
        assert shelf.sample("refrain_model_info", version="b" * 12, **info) == 1
        assert shelf.sample("refrain_model_memory_bytes", **model) == 1234
        assert shelf.sample("refrain_model_memory_bytes", architecture="baseline", task="sentiment") == 0


def test_models_come_and_go() -> None:
    shelf = Shelf([bundle(), bundle("baseline")])
    with shelf.serve() as client:
        shelf.bundles[:] = [bundle(), bundle("baseline", "domain")]
        assert client.post("/reload").json() == {
            "loaded": ["domain-baseline@0123456789ab"],
            "kept": ["sentiment-recurrent@0123456789ab"],
            "removed": ["sentiment-baseline@0123456789ab"],
        }
        assert classify(client, architecture="baseline").status_code == 404
        assert classify(client, task="domain").status_code == 200
        schema = client.get("/openapi.json").json()["components"]["schemas"]["ClassifyRequest"]
        assert schema["properties"]["task"]["examples"] == ["domain", "sentiment"]
        shelf.bundles[:] = [bundle()]
        assert client.post("/reload").json()["removed"] == ["domain-baseline@0123456789ab"]
        assert outcomes(shelf) == {"taken": 2, "unchanged": 0, "refused": 0}


def test_a_changed_word_of_the_manifest_is_noticed() -> None:
    shelf = Shelf([bundle()])
    with shelf.serve() as client:
        shelf.bundles[:] = [bundle(labels=["no", "yes"])]
        assert client.post("/reload").json()["loaded"] == ["sentiment-recurrent@0123456789ab"]
        assert set(classify(client).json()["results"][0]["scores"]) == {"no", "yes"}


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ([bundle(version="c" * 12)], "c" * 12 + " does not load"),
        ([bundle("baseline", version="d" * 12), bundle(version="c" * 12)], "c" * 12 + " does not load"),
        ([bundle("baseline"), bundle("third")], "REFRAIN_ROUTING names recurrent, but loaded are baseline, third"),
    ],
)
def test_what_is_bad_changes_nothing_and_is_said(found: list[Bundle], why: str) -> None:
    shelf = Shelf([bundle(), bundle("baseline")], bad={"c" * 12})
    with shelf.serve() as client:
        before = client.get("/models").json()
        shelf.bundles[:] = found
        answer = client.post("/reload")
        assert (answer.status_code, answer.json()["code"]) == (409, "reload_failed")
        assert why in answer.json()["detail"]
        assert client.get("/models").json() == before
        assert answering(client) == "sentiment-recurrent@0123456789ab"
        assert client.get("/healthz").status_code == 200
        assert shelf.others_told == 0
        assert outcomes(shelf) == {"taken": 0, "unchanged": 0, "refused": 1}


@pytest.mark.parametrize(
    ("setting", "found", "why"),
    [
        (
            {"routing": "fixed:recurrent"},
            bundle("baseline"),
            "REFRAIN_ROUTING names recurrent, but loaded are baseline",
        ),
        ({"default_task": "sentiment"}, bundle(task="domain"), "REFRAIN_DEFAULT_TASK=sentiment: must be one of"),
    ],
)
def test_what_a_setting_names_may_not_go(setting: dict[str, str], found: Bundle, why: str) -> None:
    shelf = Shelf([bundle(), bundle("baseline")])
    with shelf.serve(**setting) as client:
        shelf.bundles[:] = [found]
        answer = client.post("/reload")
        assert (answer.status_code, answer.json()["code"]) == (409, "reload_failed")
        assert why in answer.json()["detail"]
        assert answering(client) == "sentiment-recurrent@0123456789ab"


def test_where_nothing_is_set_the_only_model_answers_as_at_a_start() -> None:
    shelf = Shelf([bundle(), bundle("baseline")])
    with shelf.serve() as client:
        shelf.bundles[:] = [bundle("baseline", "domain")]
        with structlog.testing.capture_logs() as logged:
            assert client.post("/reload").status_code == 200
        assert answering(client) == "domain-baseline@0123456789ab"
        (warning,) = [line for line in logged if line["log_level"] == "warning"]
        assert (warning["routing"], warning["default_task"]) == ("fixed:baseline", "domain")


def test_who_asks_while_a_reload_runs_shares_one_that_comes_after_it() -> None:
    shelf = Shelf([bundle(version="a" * 12)])
    with shelf.serve() as client, ThreadPoolExecutor(max_workers=6) as pool:
        hanging = shelf.hang["b" * 12] = Event()
        shelf.bundles[:] = [bundle(version="b" * 12)]
        first = pool.submit(client.post, "/reload")
        wait_until(shelf.reloading)
        later = [pool.submit(client.post, "/reload") for _ in range(5)]
        time.sleep(1.0)  # until all have asked
        hanging.set()
        assert first.result(timeout=10).json()["loaded"] == ["sentiment-recurrent@" + "b" * 12]
        for answer in later:
            assert answer.result(timeout=10).json()["kept"] == ["sentiment-recurrent@" + "b" * 12]
        assert outcomes(shelf) == {"taken": 1, "unchanged": 1, "refused": 0}


def test_one_reload_after_the_other() -> None:
    shelf = Shelf([bundle(version="a" * 12)])
    slow = FakeEngine()
    with shelf.serve() as client, ThreadPoolExecutor() as pool:
        shelf.engines.append(slow)
        shelf.make = lambda bundle: slow  # type: ignore[method-assign]
        slow.gate.clear()
        shelf.bundles[:] = [bundle(version="b" * 12)]
        first = pool.submit(client.post, "/reload")
        assert slow.entered.wait(timeout=10)
        second = pool.submit(client.post, "/reload")
        assert answering(client).endswith("a" * 12)  # while the new one warms up
        slow.gate.set()
        assert first.result(timeout=10).json()["loaded"] == ["sentiment-recurrent@" + "b" * 12]
        assert second.result(timeout=10).json()["kept"] == ["sentiment-recurrent@" + "b" * 12]
        assert answering(client).endswith("b" * 12)


def test_nobody_reloads_without_a_key() -> None:
    shelf = Shelf([bundle()])
    with shelf.serve(api_keys=()) as client:
        answer = client.post("/reload")
        assert (answer.status_code, answer.json()["code"]) == (403, "reload_forbidden")
        assert "REFRAIN_API_KEYS" in answer.json()["detail"]
    with shelf.serve() as client:
        assert client.post("/reload", headers={"X-API-Key": "wrong"}).status_code == 401


@pytest.fixture
def models(models_dir: Path, tmp_path: Path) -> Path:
    """Bundles that may be changed."""
    return shutil.copytree(models_dir, tmp_path / "models")


def relabel(models: Path, *labels: str) -> None:
    path = models / f"{tiny.DATASET}-recurrent" / MANIFEST
    manifest = Manifest.model_validate_json(path.read_bytes()).model_copy(update={"labels": list(labels)})
    path.write_text(manifest.model_copy(update={"version": content_version(manifest)}).model_dump_json())


def labels(served: Process) -> set[str]:
    """Those that are given by any of the processes, asked often enough to have met all of them."""
    found = set()
    for _ in range(20):
        status, body = served.ask("POST", "/classify", {"inputs": "a wonderful film"}, KEY)
        assert status == 200
        found |= set(json.loads(body)["results"][0]["scores"])
    return found


def test_all_processes_follow_a_signal_and_a_call(models: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "log", models_dir=models, api_keys="key") as served:
        relabel(models, "no", "yes")
        served.process.send_signal(signal.SIGHUP)
        wait_until(lambda: labels(served) == {"no", "yes"}, 60)
        relabel(models, "never", "always")
        assert served.ask("POST", "/reload", None, KEY)[0] == 200
        wait_until(lambda: labels(served) == {"never", "always"}, 60)
        relabel(models, "one")
        served.process.send_signal(signal.SIGHUP)
        failures = lambda: [line for line in served.log_lines() if line["event"] == "reload failed"]  # noqa: E731
        wait_until(lambda: len(failures()) == 2, 60)
        assert all("labels" in line["reason"] for line in failures())
        reloads = {next(iter(labels))[1]: n for (name, labels), n in served.metrics().items() if name == RELOADS}
        assert reloads == {"taken": 4, "unchanged": 0, "refused": 2}
        assert labels(served) == {"never", "always"}
        assert served.process.poll() is None
