"""A client that knows nothing of Refrain, only the Open Inference Protocol, on a real socket: tritonclient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput, InferResult
from tritonclient.utils import InferenceServerException

from service.connections import HEADERS
from service.inference_schemas import OUTPUT_NAMES
from tests.service.live import Live, live

MODEL = "sentiment-recurrent"
TEXTS = ["a film", "ünïcode ✓", "a film that goes on and on and on and on and on"]


@pytest.fixture(scope="module")
def served() -> Iterator[Live]:
    with live() as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Live) -> Iterator[InferenceServerClient]:
    with connect(served) as client:
        yield client


def connect(served: Live) -> InferenceServerClient:
    return InferenceServerClient(f"127.0.0.1:{served.port}", connection_timeout=10, network_timeout=10)


def text_input(texts: list[str], *, column: bool = False, binary: bool = True) -> InferInput:
    array = np.array([text.encode() for text in texts], dtype=object)
    if column:
        array = array.reshape(-1, 1)
    return InferInput("text", list(array.shape), "BYTES").set_data_from_numpy(array, binary_data=binary)


def check(result: InferResult, expected: list[dict[str, Any]], names: tuple[str, ...] = OUTPUT_NAMES) -> None:
    for name in names:
        got = result.as_numpy(name)
        if name == "label":
            # as text in JSON, as bytes in a binary tensor
            assert [str(v, "utf-8") if isinstance(v, bytes) else v for v in got] == [each[name] for each in expected]
        elif name == "scores":
            rows = [list(each["scores"].values()) for each in expected]
            np.testing.assert_array_equal(got, np.array(rows, dtype=np.float32))
        else:
            np.testing.assert_array_equal(got, np.array([each[name] for each in expected], dtype=got.dtype))


def test_it_finds_the_server_and_the_model(client: InferenceServerClient) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.get_server_metadata()["name"] == "refrain"
    assert client.is_model_ready(MODEL) and client.is_model_ready(MODEL, "0123456789ab")
    assert not client.is_model_ready(MODEL, "1") and not client.is_model_ready("nobody")
    assert client.get_model_metadata(MODEL, "0123456789ab")["labels"] == ["negative", "positive"]


@pytest.mark.parametrize("binary_out", [None, True, False], ids=lambda binary: f"out-{binary}")
@pytest.mark.parametrize("binary_in", [True, False], ids=lambda binary: f"in-{binary}")
@pytest.mark.parametrize("column", [True, False], ids=lambda column: f"column-{column}")
def test_its_answers_are_those_of_classify(
    served: Live, client: InferenceServerClient, column: bool, binary_in: bool, binary_out: bool | None
) -> None:
    status, answer = served.ask("POST", "/classify", {"inputs": TEXTS, "max_iterations": 3})
    assert status == 200
    wanted = None  # then it asks for all of them in binary form
    if binary_out is not None:
        wanted = [InferRequestedOutput(name, binary_data=binary_out) for name in reversed(OUTPUT_NAMES)]
    result = client.infer(
        MODEL,
        [text_input(TEXTS, column=column, binary=binary_in)],
        outputs=wanted,
        request_id="mine",
        parameters={"max_iterations": 3},
    )
    check(result, answer["results"])
    assert result.get_response()["id"] == "mine"
    assert result.get_response()["model_version"] == "0123456789ab"


def test_it_gets_the_outputs_that_it_asks_for(served: Live, client: InferenceServerClient) -> None:
    _, answer = served.ask("POST", "/classify", {"inputs": TEXTS})
    wanted = [InferRequestedOutput("scores", binary_data=True), InferRequestedOutput("label", binary_data=False)]
    result = client.infer(MODEL, [text_input(TEXTS)], outputs=wanted, model_version="0123456789ab")
    check(result, answer["results"], ("scores", "label"))
    assert result.as_numpy("tokens") is None


def test_it_reads_our_errors(client: InferenceServerClient) -> None:
    for arguments, status, told in [
        ({"model_name": "nobody", "inputs": [text_input(["a"])]}, "404", "there are sentiment-recurrent"),
        ({"model_name": MODEL, "inputs": [text_input([" "])]}, "422", "Input 0 is empty"),
        ({"model_name": MODEL, "inputs": [text_input(["a"]), text_input(["a"])]}, "422", "inputs"),
        ({"model_name": MODEL, "inputs": [text_input(["a"])], "parameters": {"no": 1}}, "422", "parameters.no"),
        ({"model_name": MODEL, "inputs": [text_input(["a"])], "timeout": 5}, "422", "parameters.timeout"),
        (
            {"model_name": MODEL, "inputs": [text_input(["a"])], "outputs": [InferRequestedOutput("label", True, 2)]},
            "422",
            "outputs[0].parameters.classification",
        ),
    ]:
        with pytest.raises(InferenceServerException) as caught:
            client.infer(**arguments)
        assert caught.value.status() == status
        assert told in caught.value.message()


def test_it_reads_a_refusal_from_before_its_path_was_known(served: Live) -> None:
    many = {f"x-{number}": "a" for number in range(HEADERS)}
    with connect(served) as client, pytest.raises(InferenceServerException) as caught:
        client.get_server_metadata(headers=many)
    assert caught.value.status() == "431"
    assert "headers" in caught.value.message() and "exception" not in caught.value.message()
