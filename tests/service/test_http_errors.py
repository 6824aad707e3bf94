"""The service over HTTP when something is wrong: every status of the table, as a problem document with its code."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry

from service.bundle import Bundle
from service.errors import SettingsError
from service.schemas import Problem
from tests.service.fakes import MAX_TOKENS, Fake, FakeEngine, fake_app, fake_bundle, running, wait_until


@pytest.fixture
def fake() -> Fake:
    return fake_app(max_body_bytes=4096, max_inputs=4, max_queue=4, deadline_ms=5000)


@pytest.fixture
def client(fake: Fake) -> Iterator[TestClient]:
    with running(fake) as client:
        yield client


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def classify(client: TestClient, inputs: Any, **fields: Any) -> httpx2.Response:
    return client.post("/classify", json={"inputs": inputs, **fields})


def block(client: TestClient, engine: FakeEngine, pool: ThreadPoolExecutor) -> Future[httpx2.Response]:
    """Have the engine stand still in the middle of a text of its own."""
    engine.gate.clear()
    answer = pool.submit(classify, client, "occupied")
    assert engine.entered.wait(timeout=10)
    return answer


def problem(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """Check the form that every error has."""
    document: dict[str, Any] = answer.json()
    assert (answer.status_code, document["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"
    Problem.model_validate(document)
    assert document["status"] == status
    assert document["id"] == answer.headers["x-request-id"]
    return document


def count(fake: Fake, name: str, **labels: str) -> float:
    registry: CollectorRegistry = fake.app.state.runtime.metrics.registry
    return registry.get_sample_value(name, labels) or 0.0


@pytest.mark.parametrize("body", [b"", b"inputs=a", b'{"inputs": "\xff"}', b"[" * 4000])
def test_400_when_it_is_not_json(client: TestClient, body: bytes) -> None:
    problem(client.post("/classify", content=body), 400, "invalid_json")


def test_413_when_the_body_or_the_list_is_too_large(client: TestClient) -> None:
    assert problem(classify(client, "a" * 5000), 413, "body_too_large")["limit"] == 4096
    assert problem(classify(client, ["a"] * 5), 413, "too_many_inputs")["limit"] == 4


def test_413_when_the_queue_could_never_hold_the_list() -> None:
    with running(fake_app(max_queue_tokens=20)) as client:
        assert classify(client, ["a" * 9, "b" * 9]).status_code == 200
        assert problem(classify(client, ["a" * 9, "b" * 10]), 413, "too_many_inputs")["limit"] == 20


@pytest.mark.parametrize("path", ["/classify", "/v2/models/sentiment-recurrent/infer"])
@pytest.mark.parametrize("coding", ["gzip", "GZIP", "identity, br", "zstd"])
def test_415_when_the_body_is_encoded(client: TestClient, path: str, coding: str) -> None:
    body = gzip.compress(b'{"inputs": "a film"}')
    answer = client.post(path, content=body, headers={"Content-Encoding": coding})
    problem(answer, 415, "encoded_body")
    assert (answer.headers["accept-encoding"], answer.headers["connection"]) == ("identity", "close")


def test_a_body_may_say_that_it_is_not_encoded(client: TestClient) -> None:
    headers = {"Content-Encoding": "Identity"}
    assert client.post("/classify", json={"inputs": "a film"}, headers=headers).status_code == 200


def test_422_names_the_field_and_repeats_nothing(client: TestClient) -> None:
    answer = classify(client, "my secret text", max_iterations="my secret number")
    document = problem(answer, 422, "invalid_request")
    assert [error["field"] for error in document["errors"]] == ["max_iterations"]
    assert "secret" not in answer.text


def test_422_when_an_input_is_empty_or_too_long(client: TestClient) -> None:
    assert problem(classify(client, ["a", " \n"]), 422, "input_empty")["index"] == 1
    document = problem(classify(client, ["a", "b" * MAX_TOKENS], truncate=False), 422, "input_too_long")
    assert (document["index"], document["limit"]) == (1, MAX_TOKENS)
    assert classify(client, "b" * (MAX_TOKENS - 1), truncate=False).status_code == 200


def test_422_when_a_task_must_be_named() -> None:
    movie = fake_bundle("domain", "baseline")
    mood = Bundle(movie.path, movie.manifest.model_copy(update={"task": "mood"}), movie.tokenizer)
    with running(fake_app([movie, mood])) as client:  # neither is the task that the setting has by default
        (error,) = problem(classify(client, "a"), 422, "invalid_request")["errors"]
        assert error == {"field": "task", "problem": "must be one of domain, mood"}


def test_404_names_what_there_is(client: TestClient) -> None:
    task = problem(classify(client, "a", task="mood"), 404, "unknown_task")
    assert task["available"] == ["domain", "sentiment"]
    architecture = problem(classify(client, "a", task="domain", architecture="recurrent"), 404, "unknown_architecture")
    assert architecture["available"] == ["baseline"]


def test_404_and_405_of_paths_have_the_same_form(client: TestClient) -> None:
    problem(client.get("/nowhere"), 404, "not_found")
    problem(client.post("/classify/"), 404, "not_found")
    answer = client.get("/classify")
    problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


def test_401_without_a_key_for_all_but_probes_and_scrapes() -> None:
    with running(fake_app(api_keys=("right-key", "other-key"))) as client:
        for path in ("/", "/models", "/docs", "/openapi.json", "/nowhere"):
            answer = client.get(path)
            problem(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/healthz", "/readyz", "/metrics"):
            assert client.get(path).status_code == 200
        wrong: list[dict[str, str]] = [
            {},
            {"X-API-Key": "right-ke"},
            {"Authorization": "Bearer "},
            {"Authorization": "right-key"},
        ]
        right = [{"X-API-Key": "right-key"}, {"Authorization": "bearer other-key"}, {"X-API-Key": "other-key"}]
        right += [{"Authorization": "Bearer   right-key"}]
        right += [{"X-API-Key": "wrong", "Authorization": "Bearer right-key"}]  # either will do
        for headers, status in [*((key, 401) for key in wrong), *((key, 200) for key in right)]:
            assert client.post("/classify", json={"inputs": "a"}, headers=headers).status_code == status
        assert client.post("/classify", json={"inputs": "a"}, headers={b"X-API-Key": b"\xff"}).status_code == 401


def test_429_when_the_queue_is_full(client: TestClient, fake: Fake, pool: ThreadPoolExecutor) -> None:
    occupied = block(client, fake.recurrent, pool)
    answer = classify(client, ["a", "b", "c", "d"])
    problem(answer, 429, "queue_full")
    assert int(answer.headers["retry-after"]) >= 1
    other = pool.submit(classify, client, "a", architecture="baseline")  # its queue is its own
    model = {"architecture": "baseline", "task": "sentiment"}
    wait_until(lambda: count(fake, "refrain_queue_depth", **model) == 1)
    fake.recurrent.gate.set()
    assert other.result(timeout=10).status_code == 200
    assert occupied.result(timeout=10).status_code == 200
    assert classify(client, ["a", "b", "c", "d"]).status_code == 200
    assert count(fake, "refrain_rejected_total", reason="queue_full") == 1


def test_504_when_the_deadline_passes_and_its_text_never_runs(
    client: TestClient, fake: Fake, pool: ThreadPoolExecutor
) -> None:
    occupied = block(client, fake.recurrent, pool)
    problem(classify(client, "late", deadline_ms=30), 504, "deadline")
    fake.recurrent.gate.set()
    assert occupied.result(timeout=10).status_code == 200
    assert fake.recurrent.steps == 2  # the occupying text's two iterations, and nothing more
    assert count(fake, "refrain_rejected_total", reason="deadline") == 1
    model = {"architecture": "recurrent", "task": "sentiment"}
    assert count(fake, "refrain_dropped_texts_total", reason="deadline", **model) == 1


def test_the_service_s_deadline_holds_for_those_who_ask_for_a_longer_one(pool: ThreadPoolExecutor) -> None:
    fake = fake_app(deadline_ms=50)
    with running(fake) as client:
        fake.recurrent.gate.clear()
        problem(classify(client, "a", deadline_ms=1e12), 504, "deadline")


def test_500_for_the_failed_text_alone(client: TestClient, fake: Fake, pool: ThreadPoolExecutor) -> None:
    fake.recurrent.fail_for("bad text")
    occupied = block(client, fake.recurrent, pool)
    bad = pool.submit(classify, client, "bad text")
    mate = pool.submit(classify, client, "mate text")
    wait_until(lambda: fake.app.state.runtime.serving.models["sentiment", "recurrent"].batcher.queue_depth == 3)
    fake.recurrent.gate.set()
    document = problem(bad.result(timeout=10), 500, "inference_failed")
    assert "poisoned" not in str(document)
    assert (mate.result(timeout=10).status_code, occupied.result(timeout=10).status_code) == (200, 200)
    assert problem(classify(client, ["good", "bad text"]), 500, "inference_failed")["index"] == 1
    assert classify(client, "good").status_code == 200


def test_500_for_a_bug_of_ours_tells_only_the_request_s_id(
    client: TestClient, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object) -> None:
        raise ValueError("an inner secret")

    monkeypatch.setattr(fake.app.state.runtime, "choose", bug)
    answer = classify(client, "a")
    problem(answer, 500, "internal")
    assert "secret" not in answer.text
    assert count(fake, "refrain_requests_total", code="500", architecture="", task="") == 1


def test_503_while_starting() -> None:
    fake = fake_app()
    fake.recurrent.gate.clear()
    with TestClient(fake.app) as client:
        for answer in (client.get("/readyz"), classify(client, "a"), client.get("/models")):
            problem(answer, 503, "starting")
            assert int(answer.headers["retry-after"]) >= 1
        assert client.get("/healthz").status_code == 200
        fake.recurrent.gate.set()
        wait_until(lambda: client.get("/readyz").status_code == 200)
        assert classify(client, "a").status_code == 200


def test_503_while_draining_and_accepted_requests_are_answered(
    client: TestClient, fake: Fake, pool: ThreadPoolExecutor
) -> None:
    accepted = block(client, fake.recurrent, pool)
    fake.app.state.runtime.drain()
    problem(client.get("/readyz"), 503, "draining")
    answer = classify(client, "a")
    problem(answer, 503, "draining")
    assert answer.headers["connection"] == "close" and int(answer.headers["retry-after"]) >= 1
    assert client.get("/healthz").status_code == 200
    fake.recurrent.gate.set()
    assert accepted.result(timeout=10).status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the death is the test
def test_503_once_an_engine_is_dead(client: TestClient, fake: Fake) -> None:
    fake.recurrent.die = True
    problem(classify(client, "a"), 503, "engine_down")
    wait_until(lambda: client.get("/healthz").status_code == 503)
    for path in ("/healthz", "/readyz"):
        problem(client.get(path), 503, "engine_down")
    problem(classify(client, "a"), 503, "engine_down")


def test_503_once_an_engine_is_stuck(pool: ThreadPoolExecutor) -> None:
    fake = fake_app(stuck_seconds=0.05)
    with running(fake) as client:
        occupied = block(client, fake.recurrent, pool)
        wait_until(lambda: client.get("/healthz").status_code == 503)
        problem(classify(client, "a"), 503, "engine_down")
        fake.recurrent.gate.set()
        assert occupied.result(timeout=10).status_code == 200
        wait_until(lambda: client.get("/healthz").status_code == 200)


def test_a_routing_that_cannot_work_stops_the_start() -> None:
    with pytest.raises(SettingsError, match="REFRAIN_ROUTING"):
        fake_app(routing="fixed:recurent")


def test_a_default_task_that_is_not_there_stops_the_start() -> None:
    with pytest.raises(SettingsError, match=r"^REFRAIN_DEFAULT_TASK=mood: must be .* loaded, domain, sentiment$"):
        fake_app(default_task="mood")
    with pytest.raises(SettingsError, match=r"loaded, domain$"):
        fake_app([fake_bundle("domain", "baseline")], default_task="sentiment")
