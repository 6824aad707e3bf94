"""The Open Inference Protocol, version 2, over HTTP, binary tensors included: another way to /classify."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from service import __version__
from service.body import read_body
from service.classify import check_count, decide
from service.errors import UnknownModel
from service.inference_schemas import (
    OUTPUTS,
    InferAnswer,
    InferRequest,
    Live,
    ModelMetadata,
    ModelReady,
    OutputName,
    OutputTensor,
    Ready,
    ServerInfo,
    TensorInfo,
    parse_infer,
    read_texts,
)
from service.loading import Model
from service.openapi import json_body, path_parameters, problems
from service.problems import INFERENCE_PROTOCOL
from service.runtime import runtime_of
from service.schemas import ClassifyAnswer, ClassifyRequest, Options, Result
from service.tensors import HEADER_LENGTH, encode

BINARY = "application/octet-stream"

router = APIRouter(prefix=INFERENCE_PROTOCOL, tags=["Open Inference Protocol"])


@router.get("", summary="Server metadata", responses=problems(401))
async def server() -> ServerInfo:
    """Answer with the server's name, version and extensions."""
    return ServerInfo(name="refrain", version=__version__, extensions=["binary_tensor_data"])


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live", summary="Alive", responses=problems(503))
async def live(request: Request) -> Live:
    """Answer 200 while every engine is alive, as /healthz does."""
    runtime_of(request).check_alive()
    return Live()


@router.head("/health/ready", include_in_schema=False)
@router.get("/health/ready", summary="Ready", responses=problems(503))
async def ready(request: Request) -> Ready:
    """Answer 200 while requests are welcome, as /readyz does."""
    runtime_of(request).check_ready()
    return Ready()


async def metadata(request: Request) -> ModelMetadata:
    """Answer with a model's inputs, outputs and labels."""
    runtime_of(request).check_open()
    manifest = find_model(request).manifest
    width = len(manifest.labels)
    outputs = [
        TensorInfo(name=name, datatype=output.datatype, shape=[-1, width] if output.per_label else [-1])
        for name, output in OUTPUTS.items()
    ]
    return ModelMetadata(
        name=manifest.name,
        versions=[manifest.version],
        platform="refrain_onnx",
        inputs=[TensorInfo(name="text", datatype="BYTES", shape=[-1])],
        outputs=outputs,
        labels=manifest.labels,
    )


async def model_ready(request: Request) -> ModelReady:
    """Answer 200 while requests to this model are welcome."""
    runtime_of(request).check_ready()
    return ModelReady(name=find_model(request).manifest.name)


async def infer(request: Request) -> Response:
    """Answer with the outputs asked for; raises RefrainError for every way that it can go wrong."""
    runtime, settings = runtime_of(request), runtime_of(request).settings
    with runtime.admitted() as take_in:
        body = await read_body(request, take_in, max_bytes=settings.max_body_bytes, seconds=settings.body_seconds)
        asked, binary = parse_infer(body, request.headers.get(HEADER_LENGTH))
        check_count(asked.count, settings, request.state.call)  # before so many texts are read
        texts = read_texts(asked, binary)
        manifest = find_model(request).manifest
        options = {name: getattr(asked.options, name) for name in Options.model_fields}
        meant = ClassifyRequest(inputs=texts, task=manifest.task, architecture=manifest.architecture, **options)
        return write_answer(asked, await decide(meant, request))


def find_model(request: Request) -> Model:
    """Find the model that the path names, and its version if it names one; raises UnknownModel."""
    models = {model.manifest.name: model for model in runtime_of(request).serving.models.values()}
    model = models.get(request.path_params["name"])
    if model is None:
        raise UnknownModel(f"There is no such model; there are {', '.join(sorted(models))}.", available=sorted(models))
    version = model.manifest.version
    if request.path_params.get("version", version) != version:
        raise UnknownModel(f"The model has no such version; it has {version}.", available=[version])
    return model


def write_answer(asked: InferRequest, answer: ClassifyAnswer) -> Response:
    """Write results as tensors: in the JSON, or binary behind it."""
    tensors, parts = [], []
    for name, binary in asked.wanted():
        tensor, part = _tensor(name, answer.results, binary)
        tensors.append(tensor)
        parts.append(part)
    model, _, version = answer.results[0].model.partition("@")
    head = InferAnswer(
        model_name=model,
        model_version=version,
        id=answer.id if asked.id is None else asked.id,
        parameters={f"{stage}_ms": milliseconds for stage, milliseconds in answer.timings_ms.model_dump().items()},
        outputs=tensors,
    ).model_dump_json(exclude_none=True)
    if not any(tensor.parameters for tensor in tensors):
        return Response(head, media_type="application/json")
    encoded = head.encode()
    return Response(b"".join([encoded, *parts]), headers={HEADER_LENGTH: str(len(encoded))}, media_type=BINARY)


def _tensor(name: OutputName, results: list[Result], binary: bool) -> tuple[OutputTensor, bytes]:
    output = OUTPUTS[name]
    values: list[Any] = [output.read(result) for result in results]
    shape = [len(values)]
    if output.per_label:
        shape.append(len(values[0]))
        values = [value for row in values for value in row]
    data = encode(output.datatype, values) if binary else b""
    tensor = OutputTensor(
        name=name,
        datatype=output.datatype,
        shape=shape,
        parameters={"binary_data_size": len(data)} if binary else None,
        data=None if binary else values,
    )
    return tensor, data


def _add_routes(path: str) -> None:
    """Add a model's paths; the handlers read the path themselves, so its parameters are described here."""
    extra = {"parameters": path_parameters(path)}
    router.add_api_route(
        path, metadata, summary="Model metadata", responses=problems(401, 404, 503), openapi_extra=extra
    )
    router.add_api_route(
        f"{path}/ready", model_ready, summary="Model ready", responses=problems(401, 404, 503), openapi_extra=extra
    )
    router.add_api_route(
        f"{path}/infer",
        infer,
        methods=["POST"],
        summary="Classify texts",
        description="The same answers, limits and errors as /classify; an error's `error` repeats its `detail`. "
        f"With binary tensors `{HEADER_LENGTH}` is the length of the JSON, and the tensors follow it.",
        response_model=InferAnswer,
        responses=problems(400, 401, 404, 408, 413, 415, 422, 429, 431, 500, 503, 504)
        | {200: {"content": {BINARY: {"schema": {"type": "string", "format": "binary"}}}}},
        openapi_extra=extra | {"requestBody": json_body("InferRequest")},
    )


_add_routes("/models/{name}")
_add_routes("/models/{name}/versions/{version}")
