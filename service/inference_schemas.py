"""What goes in and what comes out by the Open Inference Protocol, version 2: the models of its JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from service.errors import InvalidTensor
from service.schemas import (
    SHOWN_NAME,
    SHOWN_PROBLEMS,
    Count,
    InputText,
    Options,
    Result,
    check_not_blank,
    refusal,
    whole,
)
from service.tensors import Datatype, decode_texts, split_body

OutputName = Literal["label", "score", "scores", "iterations", "tokens", "truncated", "degraded"]
OUTPUT_NAMES: tuple[OutputName, ...] = get_args(OutputName)
Size = Annotated[int, Field(ge=0), BeforeValidator(whole)]
Texts = Annotated[list[InputText], Field(fail_fast=True)]
Column = Annotated[list[Annotated[list[InputText], Field(min_length=1, max_length=1)]], Field(fail_fast=True)]


@dataclass(frozen=True)
class Output:
    """A tensor of answers: its type, where a result has it, and whether it is one number for each label."""

    datatype: Datatype
    read: Callable[[Result], Any]
    per_label: bool = False


OUTPUTS: dict[OutputName, Output] = {
    "label": Output("BYTES", lambda result: result.label),
    "score": Output("FP32", lambda result: result.score),
    "scores": Output("FP32", lambda result: list(result.scores.values()), per_label=True),
    "iterations": Output("INT32", lambda result: result.iterations),
    "tokens": Output("INT32", lambda result: result.tokens),
    "truncated": Output("BOOL", lambda result: result.truncated),
    "degraded": Output("BOOL", lambda result: result.degraded),
}


class _Lenient(BaseModel):
    """The protocol is open to extensions: members that nothing here depends on are passed over."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class InferParameters(Options):
    """How to classify, the same as in /classify, and how to answer."""

    binary_data_output: bool = Field(False, description="Answer with binary tensors, but for outputs that say else.")


class InputParameters(_Lenient):
    """Where an input's data is, when it is not in the JSON."""

    binary_data_size: Size | None = Field(None, description="Bytes of this input among those that follow the JSON.")


class InferInput(_Lenient):
    """The one input: texts, either in `data` or binary behind the JSON."""

    name: Literal["text"]
    datatype: Literal["BYTES"]
    shape: Annotated[list[Count], Field(min_length=1, max_length=2, description="[n] or [n, 1].", examples=[[1]])]
    parameters: InputParameters | None = None
    data: Texts | Column | None = Field(None, description="The texts; for the shape [n, 1] each may be a list of one.")


class OutputParameters(_Lenient):
    """How to answer with one output. What is asked for in vain would be missed: nothing is passed over here."""

    model_config = ConfigDict(extra="forbid")

    binary_data: bool | None = Field(None, description="As a binary tensor; default: `binary_data_output`.")


class InferOutput(_Lenient):
    """An output that the caller wants."""

    name: OutputName
    parameters: OutputParameters | None = None


class InferRequest(_Lenient):
    """An inference request, up to where binary data may follow it."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["A wonderful film."]}]}
        }
    )

    id: str | None = Field(None, description="Comes back with the answer.")
    parameters: InferParameters | None = None
    inputs: Annotated[list[InferInput], Field(min_length=1, max_length=1)]
    outputs: Annotated[list[InferOutput], Field(max_length=len(OUTPUT_NAMES), fail_fast=True)] | None = Field(
        None, description="Default: all."
    )

    @property
    def options(self) -> InferParameters:
        """The parameters, also when there are none."""
        return self.parameters or InferParameters.model_validate({})

    @property
    def count(self) -> int:
        """How many texts the shape says; raises InvalidTensor."""
        shape = self.inputs[0].shape
        if shape[1:] not in ([], [1]):
            raise InvalidTensor("The shape of `text` must be [n] or [n, 1].")
        return shape[0]

    def wanted(self) -> list[tuple[OutputName, bool]]:
        """The outputs to answer with, and whether each is binary."""
        default = self.options.binary_data_output
        if not self.outputs:
            return [(name, default) for name in OUTPUT_NAMES]
        binary = [output.parameters.binary_data if output.parameters else None for output in self.outputs]
        return [
            (output.name, default if each is None else each) for output, each in zip(self.outputs, binary, strict=True)
        ]


class TensorInfo(BaseModel):
    """A tensor's form; -1 stands for any length."""

    name: str
    datatype: Datatype
    shape: list[int]


class OutputTensor(TensorInfo):
    """One output, its values in row-major order, either in `data` or binary behind the JSON."""

    parameters: dict[str, int] | None = Field(None, description="`binary_data_size`: its bytes behind the JSON.")
    data: list[Any] | None = None


class InferAnswer(BaseModel):
    """An inference answer, up to where binary data may follow it."""

    model_name: str
    model_version: str
    id: str
    parameters: dict[str, float] = Field(description="Times in milliseconds, as in /classify.")
    outputs: list[OutputTensor]


class ServerInfo(BaseModel):
    """Who answers."""

    name: str
    version: str
    extensions: list[str]


class Live(BaseModel):
    """A probe's good answer."""

    live: Literal[True] = True


class Ready(BaseModel):
    """A probe's good answer."""

    ready: Literal[True] = True


class ModelReady(Ready):
    """A model's good answer."""

    name: str


class ModelMetadata(BaseModel):
    """A model's tensors; `labels` is the order of `scores`."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    labels: list[str]


def parse_infer(body: bytes, header_length: str | None) -> tuple[InferRequest, bytes]:
    """Check a request's form, and part it from its binary data; raises InvalidJSON, InvalidRequest, InvalidTensor."""
    head, binary = split_body(body, header_length)
    try:
        return InferRequest.model_validate_json(head), binary
    except ValidationError as error:
        raise refusal(error, _describe) from None


def read_texts(asked: InferRequest, binary: bytes) -> list[str]:
    """Take the texts from the JSON or from what follows it; raises InvalidTensor, InputEmpty."""
    (tensor,) = asked.inputs
    size = tensor.parameters.binary_data_size if tensor.parameters else None
    if (size is None) == (tensor.data is None):
        raise InvalidTensor("`text` must have either `data` or the parameter `binary_data_size`.")
    if (size or 0) != len(binary):
        raise InvalidTensor(f"{len(binary)} bytes follow the JSON, but `binary_data_size` is {size or 0}.")
    texts = decode_texts(binary, asked.count) if tensor.data is None else _flatten(tensor.data, tensor.shape)
    check_not_blank(texts)
    return texts


def _flatten(data: list[str] | list[list[str]], shape: list[int]) -> list[str]:
    texts = [text for item in data for text in ([item] if isinstance(item, str) else item)]
    nested = bool(data) and not isinstance(data[0], str)
    if len(texts) != shape[0] or (nested and len(shape) == 1):
        raise InvalidTensor(f"`data` does not fit the shape: it holds {len(texts)} texts{' in lists' * nested}.")
    return texts


def _describe(problems: Sequence[ErrorDetails]) -> list[dict[str, str]]:
    described: dict[str, str] = {}
    for problem in problems:
        field, message = _field(problem["loc"]), problem["msg"]
        described.setdefault(field, "must be a list of texts" if field.endswith(".data") else message)
    return [{"field": field, "problem": message} for field, message in list(described.items())[:SHOWN_PROBLEMS]]


def _field(loc: tuple[int | str, ...]) -> str:
    """Write a place as `inputs[0].shape[1]`; what follows `data` is how pydantic tried, which tells nobody anything."""
    field = ""
    for part in loc:
        field += f"[{part}]" if isinstance(part, int) else f".{part[:SHOWN_NAME]}"
        if part == "data":
            break
    return field.removeprefix(".") or "(body)"
