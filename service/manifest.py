"""A bundle's manifest: its schema, the files it names, and the version that follows from what it says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

SCHEMA_VERSION: Final = 4
VERSION_DIGITS = 12
MOST_TOKENS = 8192
"""Of a text; a process runs one as long as that when it loads a bundle, and attention takes memory by its square."""
ANSWERING: Mapping[str, bool | set[str]] = {
    "task": True,
    "architecture": True,
    "labels": True,
    "max_tokens": True,
    "tail_tokens": True,
    "iterations": True,
    "tokenizer": True,
    "precisions": True,
    "calibration": {"temperatures", "exit_threshold"},
}
"""The fields of a manifest that decide what is answered; the others say where the bundle comes from, how good it is."""

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Label = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Share = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(strict=True, ge=0.01, le=100)]
GraphRole = Literal["embed", "step"]
StoredPrecision = Literal["fp16", "int8"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StoredFile(_Strict):
    """A file of the bundle. `file` is relative to the manifest and cannot leave its directory."""

    file: Annotated[str, StringConstraints(pattern=r"^([a-z0-9_-]+/)?[a-z0-9_-]+\.(onnx|json)$")]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(gt=0)]


class Graph(StoredFile):
    """An ONNX graph; `inputs` and `outputs` map names to element types and axes, as in `float[batch,length,256]`."""

    inputs: dict[str, str]
    outputs: dict[str, str]


class Precision(_Strict):
    """One precision's graphs: `embed` (ids -> hidden) and `step` (hidden, mask -> next_hidden, logits).

    That it is in the bundle means that its accuracy was within the export's tolerance of FP32.
    `portable`: one self-contained graph (ids, mask -> logits), for those who serve it elsewhere.
    """

    graphs: Annotated[dict[GraphRole, Graph], Field(min_length=2)]
    portable: Graph | None = None


def _is_none(value: object) -> bool:
    return value is None


class Quality(_Strict):
    """Scores after one iteration."""

    accuracy: Share
    macro_f1: Share
    macro_precision: Share | None = Field(default=None, exclude_if=_is_none)  # bundles that are older have neither
    macro_recall: Share | None = Field(default=None, exclude_if=_is_none)


class Training(_Strict):
    """Where the weights come from; `initialised_from` is the run that this one started from."""

    run_id: str
    dataset: str
    initialised_from: str | None
    texts: dict[str, int]
    commit: str | None
    seed: int


class Origin(_Strict):
    """A public data set among those that a model learned from; files given in its place may differ from it."""

    name: str
    hub: str
    kind: str
    """what sort of texts it holds"""
    language: str


class Lengths(_Strict):
    """Tokens of the training texts; of those that were longer than training took, the rest was cut off."""

    median: int
    percentile_95: int
    share_cut: Share


class Weakness(_Strict):
    """The label that a split's texts of it get least often; at the last iteration, in FP32."""

    split: str
    label: str
    recall: Share
    texts: int


class LengthQuarter(_Strict):
    """A quarter of the validation split's texts, by length; accuracy at the last iteration, in FP32."""

    shortest: int
    longest: int
    texts: int
    accuracy: Share


class Card(_Strict):
    """What one should know before one relies on a model; everything with a number in it was measured by the export."""

    data: list[Origin]
    """empty where the data set is one's own"""
    recipe: dict[str, str | int | float | bool | list[str] | None]
    """the training's options"""
    lengths: Lengths
    weakest: list[Weakness]
    by_length: list[LengthQuarter]
    limits: list[str]


class Difference(_Strict):
    """How far one precision's answers are from FP32's, on the named split and at the last iteration."""

    split: str
    texts: int
    labels_agree: Share
    accuracy_lost: float
    max_logit_difference: float


class Parity(_Strict):
    """What the export proved with the serving engine; differences are the largest absolute ones of logits."""

    fp32_against_pytorch: float
    fp32_cases: int
    fp32_tolerance: float
    against_fp32: dict[StoredPrecision, list[Difference]]
    """one entry for each split that quality is reported on"""


class Bin(_Strict):
    """The texts whose best probability lies in one fifteenth of 0 to 1: its mean there, and the share that is right."""

    texts: Annotated[int, Field(gt=0)]
    confidence: Share
    accuracy: Share


class Reliability(_Strict):
    """The bins that hold texts, before and after the temperature."""

    before: list[Bin]
    after: list[Bin]


class CalibrationError(_Strict):
    """Expected calibration error over 15 bins, before and after the temperature."""

    before: Share
    after: Share


class ExitPoint(_Strict):
    """What a threshold brings: accuracy, mean iterations, and how many texts it makes right or wrong."""

    threshold: Annotated[float, Field(gt=0, le=1)]
    accuracy: Share
    mean_iterations: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    changed: Annotated[int, Field(ge=0)]


class Calibration(_Strict):
    """How logits become probabilities, and how sure a text must be to leave early; measured on the named split.

    Probabilities are softmax(logits / temperature of the iteration), whatever the precision.
    """

    split: str
    texts: Annotated[int, Field(gt=0)]
    temperatures: Annotated[list[Temperature], Field(min_length=1)]
    """one per iteration"""
    exit_threshold: Annotated[float, Field(strict=True, gt=0, lt=1)] | None
    """the default of requests; null: every text takes all its iterations"""
    ece: dict[str, list[CalibrationError]]
    """precision (also fp32) -> one entry per iteration"""
    reliability: list[Reliability]
    """one entry per iteration, at fp32"""
    exit_curve: dict[str, list[ExitPoint]]
    """precision (also fp32) -> by rising threshold, 1 being full depth; empty for a model of one iteration"""


class Manifest(_Strict):
    """`manifest.json`. `iterations` is how often the model was trained to run its step (the baseline: once)."""

    schema_version: Literal[4]
    name: Name
    task: Name
    architecture: Name
    version: Annotated[str, StringConstraints(pattern=rf"^[0-9a-f]{{{VERSION_DIGITS}}}$")]
    labels: Annotated[list[Label], Field(min_length=2)]
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)]
    """a text that has more is cut to so many"""
    tail_tokens: Annotated[int, Field(ge=0)]
    """how many of these are then its last ones, the others its first"""
    parameters: Annotated[int, Field(ge=1)]
    iterations: Annotated[int, Field(ge=1)]
    tokenizer: StoredFile
    opset: int
    custom_op_domain: str
    custom_op_version: int
    precisions: Annotated[dict[StoredPrecision, Precision], Field(min_length=1)]
    left_out: dict[StoredPrecision, str]
    """precision -> why the export left it out: on which split it was too far from FP32"""
    training: Training
    card: Card
    quality: dict[str, dict[str, list[Quality]]]
    """split -> precision (also fp32) -> one entry per iteration"""
    calibration: Calibration
    parity: Parity

    @field_validator("schema_version", mode="before")
    @classmethod
    def _is_ours(cls, found: object) -> object:
        if found != SCHEMA_VERSION:
            said = "the bundle's is {found}, this release reads {ours}: export its run again"
            raise PydanticCustomError("schema_version", said, {"found": str(found)[:20], "ours": SCHEMA_VERSION})
        return found

    @field_validator("labels")
    @classmethod
    def _are_different(cls, labels: list[str]) -> list[str]:
        if len(set(labels)) < len(labels):  # an answer's scores are by label
            raise ValueError("each label comes once")
        return labels

    @model_validator(mode="after")
    def _reads_a_beginning(self) -> Self:
        if self.tail_tokens >= self.max_tokens:
            raise ValueError(f"tail_tokens is {self.tail_tokens}: less than max_tokens, {self.max_tokens}, is needed")
        return self

    @model_validator(mode="after")
    def _is_calibrated(self) -> Self:
        if len(self.calibration.temperatures) != self.iterations:
            found, wanted = len(self.calibration.temperatures), self.iterations
            raise ValueError(f"calibration.temperatures has {found} of them, the model {wanted} iterations")
        return self


def content_version(manifest: Manifest) -> str:
    """A version that follows from what decides the answers: two bundles that answer differently never share one."""
    deciding = manifest.model_dump(mode="json", include=ANSWERING)
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:VERSION_DIGITS]


def stored_files(manifest: Manifest) -> list[StoredFile]:
    """Every file that a manifest names."""
    graphs = [graph for precision in manifest.precisions.values() for graph in precision.graphs.values()]
    portable = [precision.portable for precision in manifest.precisions.values() if precision.portable]
    return [manifest.tokenizer, *graphs, *portable]


def first_problem(error: ValidationError) -> str:
    """Where a manifest is wrong first, and what would be right there."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the document'}: {first['msg']}"
