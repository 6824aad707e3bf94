"""A bundle: the directory that is served. Its manifest's schema, and reading it with every hash checked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from tokenizers import Tokenizer

from service.errors import BundleError

MANIFEST = "manifest.json"
VERSION_DIGITS = 12

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Label = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Share = Annotated[float, Field(ge=0, le=1)]
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


class Quality(_Strict):
    """Scores after one iteration."""

    accuracy: Share
    macro_f1: Share


class Training(_Strict):
    """Where the weights come from; `initialised_from` is the run that this one started from."""

    run_id: str
    dataset: str
    initialised_from: str | None
    texts: dict[str, int]
    commit: str | None
    seed: int


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
    against_fp32: dict[StoredPrecision, Difference]


class Manifest(_Strict):
    """`manifest.json`. `iterations` is how often the model was trained to run its step (the baseline: once)."""

    schema_version: Literal[1]
    name: Name
    task: Name
    architecture: Name
    version: Annotated[str, StringConstraints(pattern=rf"^[0-9a-f]{{{VERSION_DIGITS}}}$")]
    labels: Annotated[list[Label], Field(min_length=2)]
    max_tokens: Annotated[int, Field(ge=1)]
    parameters: Annotated[int, Field(ge=1)]
    iterations: Annotated[int, Field(ge=1)]
    tokenizer: StoredFile
    opset: int
    custom_op_domain: str
    custom_op_version: int
    precisions: Annotated[dict[StoredPrecision, Precision], Field(min_length=1)]
    training: Training
    quality: dict[str, dict[str, list[Quality]]]
    """split -> precision (also fp32) -> one entry per iteration"""
    parity: Parity


def content_version(hashes: Sequence[str]) -> str:
    """A version that follows from the content: hex digits of the hash of the files' hashes, in whatever order."""
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()[:VERSION_DIGITS]


@dataclass(frozen=True)
class Bundle:
    """A verified bundle."""

    path: Path
    manifest: Manifest
    tokenizer: Tokenizer

    @property
    def id(self) -> str:
        """Name and version, as answers show it."""
        return f"{self.manifest.name}@{self.manifest.version}"


def find_bundles(models_dir: Path) -> list[Path]:
    """The directories in `models_dir` that hold a manifest, by name; BundleError where there is none."""
    if not models_dir.is_dir():
        raise BundleError(f"the models directory {models_dir} does not exist")
    found = sorted(path.parent for path in models_dir.glob(f"[!.]*/{MANIFEST}"))  # hidden: an export has not finished
    if not found:
        raise BundleError(f"no bundle in {models_dir}: no directory in it holds a {MANIFEST}")
    return found


def load_bundle(path: Path) -> Bundle:
    """Reads a bundle and checks its schema, every file's hash and its version; BundleError says what does not match."""
    manifest = _read_manifest(path / MANIFEST)
    files = stored_files(manifest)
    for stored in files:
        _verify(path, stored)
    version = content_version([stored.sha256 for stored in files])
    if version != manifest.version:
        raise BundleError(f"{path / MANIFEST}: version {manifest.version} does not follow from its files ({version})")
    try:
        tokenizer = Tokenizer.from_file(str(path / manifest.tokenizer.file))
    except Exception as error:  # the library raises bare Exception
        raise BundleError(f"{path / manifest.tokenizer.file}: not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "[MASK]" in somebody's text is those letters, not the token
    return Bundle(path, manifest, tokenizer)


def stored_files(manifest: Manifest) -> list[StoredFile]:
    """Every file that a manifest names."""
    graphs = [graph for precision in manifest.precisions.values() for graph in precision.graphs.values()]
    portable = [precision.portable for precision in manifest.precisions.values() if precision.portable]
    return [manifest.tokenizer, *graphs, *portable]


def _read_manifest(path: Path) -> Manifest:
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise BundleError(f"{path}: {first_problem(error)} ({error.error_count()} problems in all)") from error


def first_problem(error: ValidationError) -> str:
    """Where a manifest is wrong first, and what would be right there."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the document'}: {first['msg']}"


def _verify(bundle: Path, stored: StoredFile) -> None:
    path = bundle / stored.file
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    if found != stored.sha256:
        raise BundleError(f"{path} is damaged: its SHA-256 begins {found[:12]}, the manifest says {stored.sha256[:12]}")
