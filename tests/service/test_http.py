"""The service over HTTP when all goes well: answers, their order and truth, and what one sees of it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from service.classify import _TOKENIZER_THREAD, TURN_CHARACTERS
from tests.service.fakes import MAX_TOKENS, Fake, byte_tokenizer, fake_app, fake_bundle, running

ROOT = Path(__file__).parents[2]
TEXTS = ["a film", "another, longer film", "x", "a film that goes on and on and on and on and on"]


@pytest.fixture(scope="module")
def fake() -> Fake:
    return fake_app()


@pytest.fixture(scope="module")
def client(fake: Fake) -> Iterator[TestClient]:
    with running(fake) as client:
        yield client


def classify(client: TestClient, inputs: str | list[str], **fields: Any) -> dict[str, Any]:
    answer = client.post("/classify", json={"inputs": inputs, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    document: dict[str, Any] = answer.json()
    return document


def expected_logits(fake: Fake, text: str, iterations: int) -> list[float]:
    ids = byte_tokenizer().encode(text).ids[:MAX_TOKENS]
    return fake.recurrent.logits(np.array([[token, iterations] for token in ids], dtype=np.float32))


def test_one_text_and_a_list_mean_the_same_and_keep_their_order(client: TestClient, fake: Fake) -> None:
    together = classify(client, TEXTS)["results"]
    assert together == [classify(client, text)["results"][0] for text in TEXTS]
    assert together[::-1] == classify(client, TEXTS[::-1])["results"]
    for text, result in zip(TEXTS, classify(client, TEXTS, raw_scores=True)["results"], strict=True):
        assert list(result["scores"].values()) == pytest.approx(expected_logits(fake, text, 2), abs=1e-5)


def test_only_who_allows_it_gets_fewer_iterations_and_is_told() -> None:
    with running(fake_app(brown_out_ms=0)) as client:  # any queue is too long
        cut = classify(client, TEXTS, allow_fewer_iterations=True)["results"]
        whole = classify(client, TEXTS)["results"]
    assert {(result["iterations"], result["degraded"]) for result in cut} == {(1, True)}
    assert {(result["iterations"], result["degraded"]) for result in whole} == {(2, False)}


def test_probabilities_sum_to_one_and_the_label_is_the_likeliest(client: TestClient) -> None:
    for result in classify(client, TEXTS)["results"]:
        assert sum(result["scores"].values()) == pytest.approx(1, abs=1e-5)
        assert result["score"] == max(result["scores"].values()) == result["scores"][result["label"]]


def test_an_answer_says_what_was_run(client: TestClient) -> None:
    answer = classify(client, ["abc", "y" * 100])
    short, cut = answer["results"]
    assert answer["task"] == "sentiment" and set(answer["timings_ms"]) == {"tokenize", "queue", "inference", "total"}
    assert (short["architecture"], short["model"]) == ("recurrent", "sentiment-recurrent@0123456789ab")
    assert (short["tokens"], short["truncated"], short["iterations"]) == (4, False, 2)
    assert (cut["tokens"], cut["truncated"]) == (MAX_TOKENS, True)


def test_a_text_is_cut_at_its_end(client: TestClient) -> None:
    kept = "z" * (MAX_TOKENS - 1)
    whole, cut = classify(client, [kept, kept + " and what follows"])["results"]
    assert (whole["truncated"], cut["truncated"]) == (False, True)
    assert whole["scores"] == cut["scores"]


@pytest.mark.parametrize(("architecture", "taken"), [("recurrent", 5), ("baseline", 1)])
def test_iterations_are_the_caller_s_choice_but_a_baseline_has_one(
    client: TestClient, architecture: str, taken: int
) -> None:
    assert classify(client, "a", architecture=architecture, max_iterations=5)["results"][0]["iterations"] == taken
    assert classify(client, "a", architecture=architecture, max_iterations=1)["results"][0]["iterations"] == 1


def test_a_low_threshold_lets_a_text_leave_early(client: TestClient) -> None:
    assert classify(client, "a", exit_threshold=0.01, max_iterations=8)["results"][0]["iterations"] == 1
    assert classify(client, "a", exit_threshold=1.0, max_iterations=8)["results"][0]["iterations"] == 8


def test_the_bundle_s_threshold_is_the_default_and_1_means_never_however_sure_a_text_is() -> None:
    fake = fake_app([fake_bundle(exit_threshold=0.9)])
    fake.recurrent.logits = lambda state_LD: [1e4, 0.0]  # type: ignore[method-assign]
    with running(fake) as client:
        assert classify(client, "a")["results"][0]["score"] == 1.0
        for asked, taken in (
            ({}, 1),
            ({"exit_threshold": None}, 1),
            ({"max_iterations": 5}, 1),
            ({"exit_threshold": 1}, 2),
            ({"exit_threshold": 1, "max_iterations": 5}, 5),
        ):
            assert classify(client, "a", **asked)["results"][0]["iterations"] == taken
        fake.recurrent.logits = lambda state_LD: [1.0, 0.0]  # type: ignore[method-assign]
        assert classify(client, "a")["results"][0]["iterations"] == 2
        assert classify(client, "a", exit_threshold=0.7)["results"][0]["iterations"] == 1


def test_probabilities_are_calibrated_by_the_iteration_that_answered_and_raw_scores_are_not() -> None:
    fake = fake_app([fake_bundle(temperatures=[2.0, 4.0])])
    with running(fake) as client:
        for iterations, temperature in ((1, 2.0), (2, 4.0), (3, 4.0)):
            logits = expected_logits(fake, "a film", iterations)
            result = classify(client, "a film", max_iterations=iterations)["results"][0]
            powers = np.exp(np.array(logits) / temperature)
            assert list(result["scores"].values()) == pytest.approx(powers / powers.sum(), abs=2e-6)
            raw = classify(client, "a film", max_iterations=iterations, raw_scores=True)["results"][0]
            assert list(raw["scores"].values()) == pytest.approx(logits, abs=1e-5)


def test_what_a_text_is_shown_to_be_is_what_lets_it_leave() -> None:
    fake = fake_app([fake_bundle(temperatures=[3.0, 1.0])])
    with running(fake) as client:
        shown = classify(client, "a film", max_iterations=1)["results"][0]["score"]
        for threshold, taken in ((shown - 1e-4, 1), (shown + 1e-4, 2)):
            assert classify(client, "a film", exit_threshold=threshold)["results"][0]["iterations"] == taken


def test_top_k_keeps_the_best_labels(client: TestClient) -> None:
    everything = classify(client, "a film", task="domain")["results"][0]["scores"]
    for k in (1, 2, 3, 99):
        best = classify(client, "a film", task="domain", top_k=k)["results"][0]["scores"]
        assert set(best) == set(sorted(everything, key=everything.__getitem__, reverse=True)[:k])


def test_a_task_s_only_architecture_answers_for_it(client: TestClient) -> None:
    assert classify(client, "a", task="domain")["results"][0]["architecture"] == "baseline"


def test_split_routing_sticks_to_the_caller_s_request_id() -> None:
    with running(fake_app(routing="split:recurrent=1,baseline=1")) as client:
        for key in map(str, range(8)):
            answers = [client.post("/classify", json={"inputs": "a"}, headers={"X-Request-Id": key}) for _ in range(3)]
            assert len({answer.json()["results"][0]["architecture"] for answer in answers}) == 1
        chosen = {classify(client, "a")["results"][0]["architecture"] for _ in range(40)}
        assert chosen == {"recurrent", "baseline"}


def test_the_only_task_is_the_default_whatever_its_name() -> None:
    with running(fake_app([fake_bundle("domain", "baseline")])) as client:
        assert classify(client, "a")["task"] == "domain"
        assert client.get("/models").json()["default_task"] == "domain"


def test_the_only_architecture_answers_unless_a_setting_says_otherwise() -> None:
    with running(fake_app([fake_bundle(architecture="baseline")])) as client:
        assert classify(client, "a")["results"][0]["architecture"] == "baseline"
        assert client.get("/models").json()["routing"] == "fixed:baseline"


def test_a_big_list_is_tokenized_in_turns_with_the_same_answers(client: TestClient) -> None:
    texts = ["a film", "b" * TURN_CHARACTERS, "c d" * TURN_CHARACTERS, "another"]
    assert classify(client, texts)["results"] == [classify(client, text)["results"][0] for text in texts]


def test_a_long_text_does_not_wait_for_one_that_takes_long(client: TestClient) -> None:
    """Of a huge word all must be read; of other texts, however long, their ends will do."""
    over = threading.Event()
    _TOKENIZER_THREAD.submit(over.wait, 30)
    try:
        texts = ["a long film, " * TURN_CHARACTERS, "a"]
        assert [result["truncated"] for result in classify(client, texts)["results"]] == [True, False]
        late = client.post("/classify", json={"inputs": "b" * TURN_CHARACTERS, "deadline_ms": 50})
        assert late.status_code == 504
    finally:
        over.set()
    assert classify(client, "b" * TURN_CHARACTERS)["results"][0]["truncated"]


@pytest.mark.parametrize(("offered", "kept"), [("abc-1", True), ("x" * 129, False), ("a b", False), ("", False)])
def test_a_sane_request_id_is_kept_and_another_replaced(client: TestClient, offered: str, kept: bool) -> None:
    answer = client.post("/classify", json={"inputs": "a"}, headers={"X-Request-Id": offered})
    given = answer.headers["x-request-id"]
    assert answer.json()["id"] == given
    assert (given == offered) is kept and given


def test_times_are_measured_once_and_shown_three_times() -> None:
    with running(fake_app()) as client, capture_logs() as lines:
        answer = client.post("/classify", json={"inputs": ["one", "two"]}, headers={"X-Request-Id": "r1"}).json()
        metrics = samples(client)
        line = next(line for line in lines if line.get("id") == "r1")
    assert line["timings_ms"] == answer["timings_ms"]
    model = {"architecture": "recurrent", "task": "sentiment"}
    assert metrics["refrain_request_duration_seconds_sum", frozenset(model.items())] == pytest.approx(
        answer["timings_ms"]["total"] / 1000
    )
    for stage in ("tokenize", "queue", "inference"):
        stage_sum = metrics["refrain_stage_duration_seconds_sum", frozenset({**model, "stage": stage}.items())]
        assert stage_sum == pytest.approx(answer["timings_ms"][stage] / 1000)
    assert {key: line[key] for key in ("event", "path", "code", "task", "architecture", "texts", "tokens")} == {
        "event": "request",
        "path": "/classify",
        "code": 200,
        **model,
        "texts": 2,
        "tokens": 8,
    }


def samples(client: TestClient) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    scraped = client.get("/metrics")
    assert scraped.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(scraped.text)
        for sample in family.samples
    }


@pytest.mark.parametrize("code", ["500", "503", "504"])
@pytest.mark.parametrize("model", [("recurrent", "sentiment"), ("", "")])
def test_errors_are_at_0_before_the_first_since_a_rate_sees_no_rise_from_nothing(
    code: str, model: tuple[str, str]
) -> None:
    with running(fake_app()) as client:
        counted = samples(client)
    labels = {"architecture": model[0], "task": model[1], "code": code}
    assert counted["refrain_requests_total", frozenset(labels.items())] == 0


def test_metrics_count_what_happened() -> None:
    with running(fake_app()) as client:
        classify(client, ["one", "two"])
        client.post("/classify", json={"inputs": ""})
        counted = samples(client)
    model = {("architecture", "recurrent"), ("task", "sentiment")}
    assert counted["refrain_requests_total", frozenset({("code", "200"), *model})] == 1
    assert counted["refrain_requests_total", frozenset({("code", "422"), ("architecture", ""), ("task", "")})] == 1
    assert counted["refrain_iterations_sum", frozenset(model)] == 4
    assert counted["refrain_exits_total", frozenset({("reason", "depth"), *model})] == 2
    assert counted["refrain_batch_tokens_total", frozenset({("kind", "real"), *model})] == 16
    assert counted["refrain_queue_depth", frozenset(model)] == 0
    assert counted["refrain_model_memory_bytes", frozenset(model)] == 1234
    assert counted["refrain_model_parameters", frozenset(model)] == 1000
    info = {("version", "0123456789ab"), ("precision", "fp32"), ("provider", "cpu"), *model}
    assert counted["refrain_model_info", frozenset(info)] == 1
    assert ("process_resident_memory_bytes", frozenset()) in counted


def test_models_shows_what_is_loaded(client: TestClient) -> None:
    shown = client.get("/models").json()
    assert (shown["default_task"], shown["routing"]) == ("sentiment", "fixed:recurrent")
    names = [model["name"] for model in shown["models"]]
    assert names == ["domain-baseline", "sentiment-baseline", "sentiment-recurrent"]
    assert {model["calibration"]["exit_threshold"] for model in shown["models"]} == {None}
    assert shown["models"][-1]["calibration"]["temperatures"] == [1.0]
    assert shown["models"][-1] | {"labels": ["negative", "positive"], "iterations": 2} == shown["models"][-1]


def test_the_playground_needs_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    assert "http://" not in page.text and "https://" not in page.text and "src=" not in page.text


def test_every_log_line_is_json_on_stdout() -> None:
    program = (
        "import logging; from service.logs import *; configure_logs('info');"
        "write_call(Call('i', 'GET', '/readyz', 0.0, code=200)); write_call(Call('j', 'POST', '/x', 0.0, code=404));"
        "logging.getLogger('uvicorn.error').error('broken', exc_info=ValueError('why'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    request, broken = map(json.loads, done.stdout.splitlines())
    assert (request["event"], request["id"], request["level"]) == ("request", "j", "info")
    assert broken["event"] == "broken" and "ValueError: why" in broken["exception"]
    assert done.stderr == ""


def test_a_log_line_is_ascii_whatever_a_path_holds() -> None:
    program = (
        "import structlog; from service.logs import *; configure_logs('info');"
        "write_call(Call('i', 'GET', '/\\x9b2J\\u2028\\n', 0.0)); write_call(Call('h', 'GET', '/\\x7f', 0.0));"
        "write_call(Call('j', 'GET', '/\\ud800', 0.0));"
        "structlog.get_logger().info('raw', header=b'\\xff\\x9b')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=ROOT, timeout=60)
    control, delete, surrogate, raw = map(json.loads, done.stdout.decode("ascii").splitlines())
    assert (control["path"], surrogate["path"]) == ("/\x9b2J\u2028\n", "/\ud800")
    assert delete["path"] == "/\x7f" and b"\x7f" not in done.stdout
    assert raw["header"] == r"b'\xff\x9b'" and done.stderr == b""
