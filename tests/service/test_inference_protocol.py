"""The Open Inference Protocol over HTTP: the answers are those of /classify, and so are limits, counts and refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from service.inference_schemas import OUTPUT_NAMES, InferParameters
from service.schemas import ClassifyRequest, Result
from service.tensors import HEADER_LENGTH, encode
from tests.service.fakes import MAX_TOKENS, Fake, fake_app, running, wait_until
from tests.service.test_http_errors import block, count, problem
from tests.service.test_schemas import JSON

MODEL = "/v2/models/sentiment-recurrent"
TEXTS = ["a film", "another, longer film", "ünïcode ✓", "a film that goes on and on and on and on and on"]


@pytest.fixture
def fake() -> Fake:
    return fake_app(max_body_bytes=4096, max_inputs=4, max_queue=4)


@pytest.fixture
def client(fake: Fake) -> Iterator[TestClient]:
    with running(fake) as client:
        yield client


def tensor(texts: list[str], **members: Any) -> dict[str, Any]:
    return {"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": texts, **members}


def infer(client: TestClient, texts: list[str], path: str = MODEL, **members: Any) -> httpx2.Response:
    return client.post(f"{path}/infer", json={"inputs": [tensor(texts)], **members})


def refused(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """Check that an error has its form and the protocol's too."""
    document = problem(answer, status, code)
    assert document["error"] == document["detail"]
    return document


def values(answer: httpx2.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return {output["name"]: output["data"] for output in answer.json()["outputs"]}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_iterations": 5},
        {"max_iterations": 2.0, "exit_threshold": 0.6},
        {"raw_scores": True},
        {"allow_fewer_iterations": True, "truncate": True, "deadline_ms": 5000},
    ],
    ids=str,
)
def test_the_answers_are_those_of_classify(client: TestClient, options: dict[str, Any]) -> None:
    asked = {"inputs": TEXTS, "task": "sentiment", "architecture": "recurrent", **options}
    results = [Result.model_validate(each) for each in client.post("/classify", json=asked).json()["results"]]
    answer = infer(client, TEXTS, parameters=options)
    document = answer.json()
    assert values(answer) == {
        "label": [result.label for result in results],
        "score": [result.score for result in results],
        "scores": [score for result in results for score in (result.scores["negative"], result.scores["positive"])],
        "iterations": [result.iterations for result in results],
        "tokens": [result.tokens for result in results],
        "truncated": [result.truncated for result in results],
        "degraded": [result.degraded for result in results],
    }
    assert [output["shape"] for output in document["outputs"]] == [[4], [4], [4, 2], [4], [4], [4], [4]]
    assert answer.headers["content-type"] == "application/json" and HEADER_LENGTH not in answer.headers


def test_the_model_that_the_path_names_answers(client: TestClient) -> None:
    baseline = infer(client, ["a"], "/v2/models/sentiment-baseline")
    assert values(baseline)["iterations"] == [1]
    assert baseline.json()["model_name"] == "sentiment-baseline"
    domain = infer(client, ["a", "b"], "/v2/models/domain-baseline/versions/0123456789ab").json()
    assert (domain["model_name"], domain["model_version"]) == ("domain-baseline", "0123456789ab")
    assert domain["outputs"][2]["shape"] == [2, 3]


def test_every_choice_of_classify_is_a_parameter_but_what_the_path_or_the_outputs_say() -> None:
    said_elsewhere = {"inputs", "task", "architecture", "routing_key", "top_k"}
    assert (
        InferParameters.model_fields.keys() - {"binary_data_output"}
        == ClassifyRequest.model_fields.keys() - said_elsewhere
    )


@pytest.mark.parametrize(
    ("shape", "data"), [([2], ["a", "b"]), ([2, 1], [["a"], ["b"]]), ([2, 1], ["a", "b"]), ([2.0], ["a", "b"])]
)
def test_texts_may_be_flat_or_nested(client: TestClient, shape: list[int], data: Any) -> None:
    body = {"model_name": "passed over", "inputs": [tensor([], shape=shape, data=data)]}
    answer = client.post(f"{MODEL}/infer", json=body)
    assert values(answer) == values(infer(client, ["a", "b"]))


def test_an_id_comes_back_and_times_are_told(client: TestClient) -> None:
    assert infer(client, ["a"], id="mine ✓").json()["id"] == "mine ✓"
    answer = infer(client, ["a"])
    assert answer.json()["id"] == answer.headers["x-request-id"]
    assert set(answer.json()["parameters"]) == {"tokenize_ms", "queue_ms", "inference_ms", "total_ms"}


def test_outputs_are_chosen_and_each_may_be_binary(client: TestClient) -> None:
    everything = values(infer(client, TEXTS))
    wanted = [
        {"name": "scores", "parameters": {"binary_data": True}},
        {"name": "tokens", "parameters": {"binary_data": False}},
        {"name": "label"},
    ]
    answer = infer(client, TEXTS, outputs=wanted, parameters={"binary_data_output": True})
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers[HEADER_LENGTH])
    scores, tokens, label = json.loads(answer.content[:length])["outputs"]
    assert tokens["data"] == everything["tokens"] and "parameters" not in tokens
    assert "data" not in scores and "data" not in label
    binary = encode("FP32", everything["scores"]), encode("BYTES", everything["label"])
    assert [each["parameters"]["binary_data_size"] for each in (scores, label)] == [len(each) for each in binary]
    assert answer.content[length:] == b"".join(binary)


def binary_request(texts: list[str], **members: Any) -> tuple[bytes, dict[str, str]]:
    data = encode("BYTES", texts)
    described = tensor(texts, parameters={"binary_data_size": len(data)}, **members)
    del described["data"]
    head = json.dumps({"inputs": [described]}).encode()
    return head + data, {HEADER_LENGTH: str(len(head))}


def test_binary_texts_are_read(client: TestClient) -> None:
    content, headers = binary_request(TEXTS)
    assert values(client.post(f"{MODEL}/infer", content=content, headers=headers)) == values(infer(client, TEXTS))


def test_binary_data_must_be_what_is_said_of_it(client: TestClient) -> None:
    content, headers = binary_request(["a", "b"])
    length = int(headers[HEADER_LENGTH])
    cut = content[:-1], headers
    longer = content + b"\0", headers
    no_header: tuple[bytes, dict[str, str]] = content[:length], {}
    beyond = content, {HEADER_LENGTH: str(len(content) + 1)}
    wrong_count = binary_request(["a", "b"], shape=[3])
    wrong_size = content.replace(b'"binary_data_size": 10', b'"binary_data_size": 11'), headers
    not_text = content.replace(b"\0b", b"\0\xff"), headers
    in_json = json.dumps({"inputs": [tensor(["a"])]}).encode()
    unclaimed = in_json + b"\0", {HEADER_LENGTH: str(len(in_json))}
    for body, sent in (cut, longer, no_header, beyond, wrong_count, wrong_size, not_text, unclaimed):
        refused(client.post(f"{MODEL}/infer", content=body, headers=sent), 422, "invalid_tensor")
    assert refused(client.post(f"{MODEL}/infer", content=content), 400, "invalid_json")
    content, headers = binary_request(["a", " "])
    assert refused(client.post(f"{MODEL}/infer", content=content, headers=headers), 422, "input_empty")["index"] == 1


@pytest.mark.parametrize(
    ("members", "field"),
    [
        ({"inputs": None}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"inputs": [tensor(["a"]), tensor(["b"])]}, "inputs"),
        ({"inputs": [tensor(["a"], name="text_input")]}, "inputs[0].name"),
        ({"inputs": [tensor(["a"], datatype="FP32")]}, "inputs[0].datatype"),
        ({"inputs": [tensor(["a"], shape=[])]}, "inputs[0].shape"),
        ({"inputs": [tensor(["a"], shape=[-1])]}, "inputs[0].shape[0]"),
        ({"inputs": [tensor(["a"], shape=[1, 1, 1])]}, "inputs[0].shape"),
        ({"inputs": [tensor(["a"], data="a")]}, "inputs[0].data"),
        ({"inputs": [tensor(["a"], data=["a", 1])]}, "inputs[0].data"),
        ({"inputs": [tensor(["a"], data=[["a", "b"]])]}, "inputs[0].data"),
        (
            {"inputs": [tensor(["a"], parameters={"binary_data_size": -1})]},
            "inputs[0].parameters.binary_data_size",
        ),
        ({"outputs": [{"name": "logits"}]}, "outputs[0].name"),
        ({"outputs": [{"name": "label"}] * (len(OUTPUT_NAMES) + 1)}, "outputs"),
        (
            {"outputs": [{"name": "label", "parameters": {"classification": 1}}]},
            "outputs[0].parameters.classification",
        ),
        ({"parameters": {"max_iterations": 0}}, "parameters.max_iterations"),
        ({"parameters": {"max_iteration": 1}}, "parameters.max_iteration"),
        ({"parameters": {"task": "domain"}}, "parameters.task"),
        ({"parameters": {"top_k": 1}}, "parameters.top_k"),
        ({"id": 1}, "id"),
    ],
)
def test_422_names_the_field(client: TestClient, members: dict[str, Any], field: str) -> None:
    document = refused(infer(client, ["a"], **members), 422, "invalid_request")
    assert field in [error["field"] for error in document["errors"]]
    assert document["errors"][0]["field"] in document["error"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": [2]},
        {"shape": [1, 2]},
        {"shape": [1], "data": [["a"]]},
        {"shape": [10**30]},
        {"data": []},
        {"data": None},
        {"parameters": {"binary_data_size": 0}},
        {"data": None, "parameters": {"binary_data_size": 5}},
        {"data": None, "parameters": {"shared_memory_region": "a", "shared_memory_byte_size": 5}},
    ],
    ids=str,
)
def test_422_when_the_data_does_not_fit(client: TestClient, wrong: dict[str, Any]) -> None:
    with capture_logs() as lines:
        answer = infer(client, ["a"], inputs=[tensor(["a"], **wrong)])
    if wrong == {"shape": [10**30]}:
        problem = refused(answer, 413, "too_many_inputs")
        (line,) = (line for line in lines if line.get("id") == problem["id"])
        assert "texts" not in line
    else:
        refused(answer, 422, "invalid_tensor")


def test_the_limits_are_those_of_classify(client: TestClient) -> None:
    assert refused(infer(client, ["a" * 5000]), 413, "body_too_large")["limit"] == 4096
    assert refused(infer(client, ["a"] * 5), 413, "too_many_inputs")["limit"] == 4
    content, headers = binary_request(["a"] * 5)
    refused(client.post(f"{MODEL}/infer", content=content, headers=headers), 413, "too_many_inputs")
    refused(infer(client, ["b" * MAX_TOKENS], parameters={"truncate": False}), 422, "input_too_long")
    refused(client.post(f"{MODEL}/infer", content=b'{"inputs": "\xff"}'), 400, "invalid_json")


def test_429_and_504_as_of_classify_and_both_are_counted(client: TestClient, fake: Fake) -> None:
    with ThreadPoolExecutor() as pool:
        occupied = block(client, fake.recurrent, pool)
        answer = infer(client, ["a"] * 4)
        refused(answer, 429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        refused(infer(client, ["late"], parameters={"deadline_ms": 30}), 504, "deadline")
        fake.recurrent.gate.set()
        assert occupied.result(timeout=10).status_code == 200
    assert count(fake, "refrain_rejected_total", reason="queue_full") == 1
    assert count(fake, "refrain_rejected_total", reason="deadline") == 1


def test_500_for_the_failed_text(client: TestClient, fake: Fake) -> None:
    fake.recurrent.fail_for("bad text")
    assert refused(infer(client, ["good", "bad text"]), 500, "inference_failed")["index"] == 1


def test_404_names_what_there_is(client: TestClient) -> None:
    names = ["domain-baseline", "sentiment-baseline", "sentiment-recurrent"]
    for path in ("/v2/models/nobody", "/v2/models/nobody/versions/1"):
        answers = [client.get(path), client.get(f"{path}/ready"), infer(client, ["a"], path)]
        assert all(refused(answer, 404, "unknown_model")["available"] == names for answer in answers)
    path = f"{MODEL}/versions/1"
    for answer in (client.get(path), client.get(f"{path}/ready"), infer(client, ["a"], path)):
        assert refused(answer, 404, "unknown_model")["available"] == ["0123456789ab"]
    refused(client.get("/v2/nowhere"), 404, "not_found")
    refused(client.get(f"{MODEL}/infer"), 405, "method_not_allowed")
    assert "error" not in client.get("/nowhere").json()


def test_metrics_and_the_log_line_count_it_like_classify(client: TestClient, fake: Fake) -> None:
    model = {"architecture": "recurrent", "task": "sentiment"}
    with capture_logs() as lines:
        infer(client, ["one", "two"])
        infer(client, ["a"], f"{MODEL}/versions/0123456789ab")
        infer(client, ["a"], "/v2/models/nobody")
        client.get(MODEL)
    assert count(fake, "refrain_requests_total", code="200", **model) == 2
    assert count(fake, "refrain_requests_total", code="404", architecture="", task="") == 1
    assert count(fake, "refrain_request_duration_seconds_count", **model) == 2
    line = lines[0]
    assert {key: line[key] for key in ("code", "texts", "tokens", *model)} == {
        "code": 200,
        "texts": 2,
        "tokens": 8,
        **model,
    }


def test_metadata_tells_what_an_answer_has(client: TestClient) -> None:
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    told = client.get("/v2/models/domain-baseline").json()
    assert (told["name"], told["versions"]) == ("domain-baseline", ["0123456789ab"])
    assert told["labels"] == ["movies", "local business", "online shopping"]
    assert told["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
    answered = infer(client, ["a", "b"], "/v2/models/domain-baseline").json()["outputs"]
    for output, was in zip(told["outputs"], answered, strict=True):
        assert output == {"name": was["name"], "datatype": was["datatype"], "shape": [-1, *was["shape"][1:]]}
    assert client.get("/v2/models/domain-baseline/versions/0123456789ab").json() == told


def test_503_while_starting_and_while_draining() -> None:
    fake = fake_app()
    fake.recurrent.gate.clear()
    paths = ("/v2/health/ready", MODEL, f"{MODEL}/ready")
    with TestClient(fake.app) as client:
        for answer in (*map(client.get, paths), infer(client, ["a"])):
            refused(answer, 503, "starting")
        assert client.get("/v2/health/live").json() == {"live": True}
        fake.recurrent.gate.set()
        wait_until(lambda: client.get("/v2/health/ready").status_code == 200)
        assert client.get("/v2/health/ready").json() == {"ready": True}
        assert client.get(f"{MODEL}/ready").json() == {"ready": True, "name": "sentiment-recurrent"}
        assert infer(client, ["a"]).status_code == 200
        fake.app.state.runtime.drain()
        for answer in (*map(client.get, paths), infer(client, ["a"])):
            refused(answer, 503, "draining")
        assert client.get("/v2/health/live").status_code == 200


def test_401_without_a_key_for_all_but_probes() -> None:
    fake = fake_app(api_keys=("right-key",))
    with running(fake) as client:
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert client.get(path).status_code == 200
        for path in ("/v2", MODEL, f"{MODEL}/ready"):
            refused(client.get(path), 401, "unauthorized")
            assert client.get(path, headers={"X-API-Key": "right-key"}).status_code == 200
        refused(infer(client, ["a"]), 401, "unauthorized")
        assert count(fake, "refrain_requests_total", code="401", architecture="", task="") == 1
        paths = client.get("/openapi.json", headers={"X-API-Key": "right-key"}).json()["paths"]
        open_paths = {path for path, item in paths.items() for each in item.values() if "security" not in each}
        assert open_paths == {"/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the death is the test
def test_health_turns_red_with_a_dead_engine(client: TestClient, fake: Fake) -> None:
    fake.recurrent.die = True
    refused(infer(client, ["a"]), 503, "engine_down")
    for path in ("/v2/health/live", "/v2/health/ready", f"{MODEL}/ready"):
        refused(client.get(path), 503, "engine_down")


MEMBERS = st.dictionaries(st.sampled_from(["id", "parameters", "outputs", "inputs"]), JSON)
OF_TENSOR = st.sampled_from(["name", "shape", "datatype", "data", "parameters", "other"])


@given(MEMBERS, OF_TENSOR, JSON)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_json_gives_a_5xx(client: TestClient, members: dict[str, Any], member: str, value: object) -> None:
    for body in (members, {"inputs": [tensor(["a"])], **members}, {"inputs": [tensor(["a"], **{member: value})]}):
        answer = client.post(f"{MODEL}/infer", content=json.dumps(body))
        assert answer.status_code in (200, 400, 413, 422), answer.text
