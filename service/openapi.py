"""What FastAPI cannot know for the OpenAPI document: bodies that handlers read themselves, and errors, all problems."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from service.front import OPEN_PATHS
from service.inference_schemas import InferRequest
from service.problems import MEDIA_TYPE
from service.runtime import Runtime
from service.schemas import ClassifyRequest, Problem

MEANINGS = {
    400: "The body is not JSON, or the request not HTTP/1.1.",
    401: "API keys are set, and none that came is right.",
    403: "No API keys are set, and without them nobody may do this.",
    404: "There is no such task, architecture or model; `available` names those there are.",
    408: "The headers or the body came too slowly.",
    409: "Something is wrong with what a reload found, and nothing was changed.",
    413: "The body or the list is too large, or has more tokens than the queue takes.",
    415: "The body has a Content-Encoding.",
    422: "A field is wrong, an input is empty, or too long with `truncate: false`.",
    429: "The queue is full.",
    431: "The headers are too large.",
    500: "Inference failed for a text, or the service met a bug.",
    503: "Starting, draining, an engine is down, or too many connections are open.",
    504: "The deadline passed, waiting or running.",
}
REF = "#/components/schemas/{model}"
RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}


def json_body(model: str) -> dict[str, Any]:
    """Describe a body that the handler reads itself; `document` adds the model's schema."""
    return {"required": True, "content": {"application/json": {"schema": {"$ref": REF.format(model=model)}}}}


def path_parameters(path: str) -> list[dict[str, Any]]:
    """Describe the parameters of a path whose handler reads them itself."""
    names = re.findall(r"{(\w+)}", path)
    return [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the errors that an operation can answer with."""
    return {status: _problem(status) for status in statuses}


def document(app: FastAPI, runtime: Runtime) -> dict[str, Any]:
    """Write the OpenAPI document: with the request's schema, the limits and tasks of this very service."""
    if app.openapi_schema is None:
        drawn = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        _, definitions = models_json_schema(
            [(ClassifyRequest, "validation"), (InferRequest, "validation"), (Problem, "serialization")],
            ref_template=REF,
        )
        schemas = definitions["$defs"]
        properties = schemas["ClassifyRequest"]["properties"]
        properties["inputs"]["description"] += f" At most {runtime.settings.max_inputs} texts: more get 413."
        drawn.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
        if runtime.settings.api_keys:
            _ask_for_keys(drawn)
        app.openapi_schema = drawn
    task = app.openapi_schema["components"]["schemas"]["ClassifyRequest"]["properties"]["task"]
    task["examples"] = sorted(runtime.serving.architectures)  # a reload may bring others
    return app.openapi_schema


def _ask_for_keys(drawn: dict[str, Any]) -> None:
    drawn["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    for path in drawn["paths"].keys() - OPEN_PATHS:
        for operation in drawn["paths"][path].values():
            operation["security"] = [{"bearer": []}, {"header": []}]


def _problem(status: int) -> dict[str, Any]:
    schema = {"$ref": REF.format(model="Problem")}
    described: dict[str, Any] = {"description": MEANINGS[status], "content": {MEDIA_TYPE: {"schema": schema}}}
    return described | ({"headers": RETRY_AFTER} if status in (429, 503) else {})
