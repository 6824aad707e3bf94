"""The service against whatever a client may think of: the OpenAPI document is true, and nothing gives a 5xx."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.types import Receive, Scope, Send

from tests.service.fakes import fake_app, running
from tests.service.test_schemas import FIELDS, JSON

# What a valid request may still meet: its own time, our tokens, a shape that is not its data's.
BEYOND_SCHEMA = {"deadline", "input_too_long", "invalid_tensor"}
LENIENT = [not_a_server_error, positive_data_acceptance]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with running(fake_app()) as client:
        yield client


@pytest.fixture(scope="module")
def api(client: TestClient) -> BaseSchema:
    async def started(scope: Scope, receive: Receive, send: Send) -> None:
        """The app without its lifespan, which schemathesis would begin again for itself."""
        if scope["type"] != "lifespan":
            return await client.app(scope, receive, send)
        for phase in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{phase}.complete"})

    return schemathesis.openapi.from_asgi("/openapi.json", started)


def paths() -> set[str]:
    of_model = [f"/v2/models/{{name}}{version}" for version in ("", "/versions/{version}")]
    of_models = {f"{path}{what}" for path in of_model for what in ("", "/ready", "/infer")}
    own = {"/", "/classify", "/models", "/reload", "/healthz", "/readyz", "/metrics"}
    return own | {"/v2", "/v2/health/live", "/v2/health/ready"} | of_models


def aim(case: Any) -> None:
    """Have a request reach a model, and the shape of a valid one fit its data, which no schema can say."""
    there = {"name": "sentiment-recurrent", "version": "0123456789ab"}
    case.path_parameters = {name: there[name] for name in case.path_parameters or {}}
    if case.meta.generation.mode is GenerationMode.POSITIVE and "infer" in case.path:
        (tensor,) = case.body["inputs"]
        tensor["shape"] = [len(tensor.get("data") or "1"), 1]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_the_openapi_document_is_true(api: BaseSchema, mode: GenerationMode) -> None:
    operations = [result.ok() for result in api.get_all_operations() if isinstance(result, Ok)]
    assert paths() == {each.path for each in operations}
    if mode is GenerationMode.NEGATIVE:
        operations = [operation for operation in operations if operation.body]  # the others take nothing to get wrong
    for operation in operations:

        @given(operation.as_strategy(generation_mode=mode))
        @settings(max_examples=60 if operation.body else 5, suppress_health_check=list(HealthCheck))
        def check(case: Any) -> None:
            aim(case)
            response = case.call()
            if response.status_code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
                return  # more texts than a request may have: a refusal, though the checks do not know it for one
            told = response.json().get("code") if response.status_code in (422, 504) else None
            case.validate_response(response, excluded_checks=LENIENT if told in BEYOND_SCHEMA else [])

        check()


@given(JSON | FIELDS | FIELDS.map(lambda fields: {"inputs": ["a", "b"], **fields}))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_json_gives_a_5xx(client: TestClient, body: object) -> None:
    answer = client.post("/classify", content=json.dumps(body))
    assert answer.status_code in (200, 400, 404, 422), answer.text


@given(st.lists(st.text().filter(lambda text: text.strip() != ""), min_size=1, max_size=6))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_text_gets_its_own_answer(client: TestClient, texts: list[str]) -> None:
    together = client.post("/classify", json={"inputs": texts})
    assert together.status_code == 200, together.text
    alone = [client.post("/classify", json={"inputs": text}).json()["results"][0] for text in texts]
    assert together.json()["results"] == alone
