"""What goes in and what comes out over HTTP: the models that check a request and that draw the OpenAPI document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails

from service.errors import InputEmpty, InvalidJSON, InvalidRequest, RefrainError
from service.manifest import Calibration, Card

MAX_ITERATIONS = 16  # a recurrent model may run deeper than it was trained for, within reason
SHOWN_PROBLEMS = 10  # of a request with more wrong fields than this, the first are named
SHOWN_NAME = 40  # characters of an unknown field's name that an answer repeats


def whole(value: object) -> object:
    """JSON knows one kind of number, and to JSON Schema 2.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Depth = Annotated[int, Field(ge=1, le=MAX_ITERATIONS), BeforeValidator(whole)]
Count = Annotated[int, Field(ge=1), BeforeValidator(whole)]
InputText = Annotated[str, WithJsonSchema({"type": "string", "pattern": r"[^\s]"})]


class Options(BaseModel):
    """How to classify, whatever the protocol."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    max_iterations: Depth | None = Field(
        None,
        description="Most passes of a recurrent model. Default: as it was trained. A baseline always takes one.",
    )
    exit_threshold: float | None = Field(
        None,
        gt=0,
        le=1,
        description="A text is answered as soon as its best probability reaches this; 1: never, however sure it is. "
        "Default: the model's own, which /models shows under `calibration`: where it was chosen it cost 0.2 points of "
        "accuracy at most.",
    )
    allow_fewer_iterations: bool = Field(
        False,
        description="Rather be answered with fewer iterations, or by a cascade's first model alone, than wait long, "
        "be refused or miss the deadline; `degraded` tells.",
    )
    raw_scores: bool = Field(False, description="Answer with logits, uncalibrated, in place of probabilities.")
    truncate: bool = Field(
        True, description="Cut a text that is too long as /models says of its model; false: refuse it."
    )
    deadline_ms: float | None = Field(
        None, gt=0, description="Time for the answer in milliseconds. The service's own limit holds if it is shorter."
    )


class ClassifyRequest(Options):
    """One text or a list of texts, and how to classify them; `null` means the same as leaving a field out."""

    model_config = ConfigDict(json_schema_extra={"example": {"inputs": "A wonderful film.", "task": "sentiment"}})

    # fail_fast: a body of half a million wrong items must not cost half a million errors.
    inputs: InputText | Annotated[list[InputText], Field(min_length=1, fail_fast=True)] = Field(
        description="One text, or a list of texts. None may be empty or only blanks."
    )
    task: str | None = Field(None, description="What to decide. Default: the service's default task.")
    architecture: str | None = Field(
        None, description="Who answers, as /models names them. Default: the service's routing decides."
    )
    routing_key: str | None = Field(
        None,
        min_length=1,
        max_length=128,
        description="Where routing splits requests, those with the same key are answered by the same model.",
    )
    top_k: Count | None = Field(None, description="How many of the best labels `scores` names. Default: all.")

    @property
    def texts(self) -> list[str]:
        """The texts as a list, also when there is one."""
        return [self.inputs] if isinstance(self.inputs, str) else self.inputs


class Result(BaseModel):
    """One text's answer."""

    label: str
    score: float = Field(description="The label's calibrated probability, or its logit with `raw_scores`.")
    scores: dict[str, float] = Field(description="Per label; all of them, or the best `top_k`.")
    architecture: str
    model: str = Field(description="The bundle's name and version.")
    iterations: int = Field(description="Passes taken.")
    tokens: int = Field(description="Tokens run, the first one, the class token, included.")
    truncated: bool = Field(description="Whether the text was cut to fit the model.")
    degraded: bool = Field(
        description="Whether load or the deadline cost it iterations, or a second model, as the request allowed."
    )


class Timings(BaseModel):
    """Milliseconds; for a list, queue and inference are those of its slowest text."""

    tokenize: float
    queue: float
    inference: float
    total: float


class ClassifyAnswer(BaseModel):
    """One result per input, in order."""

    id: str
    task: str
    results: list[Result]
    timings_ms: Timings


class Problem(BaseModel):
    """An error, as RFC 9457 has it; some codes add members of their own, such as `index` or `available`."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str = Field(description="Stable; for programs.")
    id: str = Field(description="The request's id.")


class Status(BaseModel):
    """A probe's good answer."""

    status: Literal["ok", "ready"]


class ModelInfo(BaseModel):
    """A loaded bundle and how it runs."""

    name: str
    version: str
    task: str
    architecture: str
    labels: list[str]
    max_tokens: int = Field(description="A text that has more is cut to so many.")
    tail_tokens: int = Field(description="How many of these are then its last ones; the others are its first.")
    parameters: int
    iterations: int
    precision: str
    provider: str
    model_bytes: int
    quality: Any
    calibration: Calibration
    card: Card


class ModelsAnswer(BaseModel):
    """What is loaded and who answers a request that names no architecture."""

    default_task: str | None
    routing: str
    models: list[ModelInfo]


class ReloadAnswer(BaseModel):
    """What a reload changed, by the models' names and versions."""

    loaded: list[str]
    kept: list[str]
    removed: list[str]


def parse_request(body: bytes) -> ClassifyRequest:
    """Check a body's form; raises InvalidJSON, InputEmpty or InvalidRequest, none of which repeats what was sent."""
    try:
        request = ClassifyRequest.model_validate_json(body)
    except ValidationError as error:
        raise refusal(error, describe_problems) from None
    check_not_blank(request.texts)
    return request


def check_not_blank(texts: Sequence[str]) -> None:
    """Raise InputEmpty for the first text that holds nothing."""
    for index, text in enumerate(texts):
        if not text or text.isspace():
            raise InputEmpty(f"Input {index} is empty.", index=index)


def refusal(error: ValidationError, describe: Callable[[Sequence[ErrorDetails]], list[dict[str, str]]]) -> RefrainError:
    """Say what is wrong with a body, the first wrong field in a sentence, `describe` naming them all."""
    problems = error.errors(include_url=False, include_input=False)
    if problems[0]["type"] == "json_invalid":
        return InvalidJSON(f"The body is not JSON: {problems[0]['msg'].removeprefix('Invalid JSON: ')}.")
    described = describe(problems)
    first = f"{described[0]['field']}: {described[0]['problem']}"
    return InvalidRequest(f"The request has wrong fields; {first}.", errors=described)


def describe_problems(problems: Sequence[ErrorDetails]) -> list[dict[str, str]]:
    """Name the wrong fields, each once, with what would be right; at most SHOWN_PROBLEMS of them."""
    described: dict[str, str] = {}
    for problem in problems:
        field = _field(problem["loc"])
        described.setdefault(
            field, "must be a text or a list of texts, one at least" if field == "inputs" else problem["msg"]
        )
    if any(
        problem["loc"][0] == "inputs" and isinstance(problem["loc"][-1], int) for problem in problems if problem["loc"]
    ):
        del described["inputs"]  # which says no more than that a list is no single text
    return [{"field": field, "problem": message} for field, message in list(described.items())[:SHOWN_PROBLEMS]]


def _field(loc: tuple[int | str, ...]) -> str:
    if not loc:
        return "(body)"
    index = next((f"[{part}]" for part in loc[1:] if isinstance(part, int)), "")
    return str(loc[0])[:SHOWN_NAME] + index
