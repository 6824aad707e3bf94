"""A run directory: what one training leaves behind, and all that evaluation and export need.

config.json         options, shape, task and labels (a pretraining has none), data, versions
tokenizer.json      as learned from the training split (a linear run has none)
model.safetensors   the weights with the best validation accuracy
last.pt             the latest checkpoint: weights, optimiser, progress (tensors and numbers; no pickled objects)
metrics.jsonl       a line per log interval and per validation
teacher.safetensors what the teachers say of each training text, where there are some
evaluation.json     what `evaluate` found
lock                held by the training that is at work here; by itself it means nothing
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises; nothing is unpickled
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from torch import Tensor

from training.architectures import ARCHITECTURES
from training.architectures.encoder import Encoder
from training.errors import TrainingError
from training.shapes import AS_IN_TRAINING, EncoderConfig, Reading

WEIGHTS, LAST, CONFIG, TOKENIZER, METRICS, EVALUATION, LOCK = (
    "model.safetensors", "last.pt", "config.json", "tokenizer.json", "metrics.jsonl", "evaluation.json", "lock",
)  # fmt: skip
LINEAR = "linear"
"""The architecture of a run that is no network: it has no tokenizer, and nothing to begin from or to export."""
STATES = "states"
"""That of a directory that is not a model at all: it holds what `train --states` takes."""
HEAD = "head."
"""How the names of the classification head's weights begin."""


@dataclass(frozen=True)
class RunInfo:
    """`config.json`. `options` are the training's own (`TrainConfig` as JSON), `provenance` is for people."""

    task: str
    labels: list[str]
    architecture: str
    encoder: dict[str, Any]
    options: dict[str, Any]
    provenance: dict[str, Any]

    def build_model(self, reading: Reading = AS_IN_TRAINING) -> Encoder:
        return ARCHITECTURES[self.architecture](reading.of(EncoderConfig(**self.encoder)))


def learned_from(info: RunInfo) -> list[str]:
    """Names of the data sets that the weights have seen, those of earlier runs too; of old runs only their own."""
    return list(info.provenance.get("learned_from") or [info.provenance["dataset"]])


def language_models(info: RunInfo) -> list[str]:
    """Names of those whose states of words the weights have learned, those of earlier runs too."""
    return list(info.provenance.get("language_models") or [])


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    replace(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def make_room(path: Path) -> None:
    """Makes the folder of a file that is to be written once the work is done; TrainingError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {error.strerror}") from error
    if path.is_dir():
        raise TrainingError(f"{path} cannot be written: it is a folder")


def replace(path: Path, content: bytes) -> None:
    """Writes beside and renames, so that a reader or a crash never meets half a file."""
    beside = path.with_name(path.name + ".partial")
    beside.write_bytes(content)
    beside.replace(path)


def write_info(run: Path, info: RunInfo) -> None:
    write_json(run / CONFIG, asdict(info))


def read_info(run: Path) -> RunInfo:
    path = run / CONFIG
    try:
        return RunInfo(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise TrainingError(f"{run} is not a run directory: it has no {CONFIG}") from error
    except (ValueError, TypeError) as error:
        raise TrainingError(f"{path} is not a run's configuration: {error}") from error


def read_tokenizer(run: Path) -> Tokenizer:
    """As the service reads it: "[MASK]" in somebody's text is those letters, not the token."""
    check_network(run, read_info(run))
    path = run / TOKENIZER
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise TrainingError(f"{path} is not a tokenizer: {error}") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def write_weights(run: Path, weights: Mapping[str, Tensor]) -> None:
    replace(run / WEIGHTS, save({name: tensor.contiguous() for name, tensor in weights.items()}))


def read_model(run: Path, reading: Reading = AS_IN_TRAINING) -> Encoder:
    """The run's best weights in its architecture, ready for evaluation; it reads as much of a text as is said."""
    info = read_info(run)
    check_decides(run, info)
    check_network(run, info)
    return _read_weights(run, info.build_model(reading), {}).eval()


def check_decides(run: Path, info: RunInfo) -> None:
    """Raise TrainingError for what has no answers: a run that was only pretrained, or states."""
    _check_no_states(run, info)
    if not info.labels:
        raise TrainingError(f"{run} was pretrained and decides nothing yet: go on with train --init-from {run}")


def check_network(run: Path, info: RunInfo) -> None:
    """Raise TrainingError for a linear run, and for states."""
    _check_no_states(run, info)
    if info.architecture == LINEAR:
        raise TrainingError(f"{run} is linear, not a network: it can be evaluated, and be a --teacher")


def _check_no_states(run: Path, info: RunInfo) -> None:
    if info.architecture == STATES:
        raise TrainingError(f"{run} holds a language model's states, which are for train --states")


def initialise(model: Encoder, labels: Sequence[str], run: Path) -> None:
    """Gives a model another run's best weights, but for the head where that run does not decide between `labels`."""
    new_head = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(HEAD)}
    _read_weights(run, model, {} if read_info(run).labels == list(labels) else new_head)


def _read_weights(run: Path, model: Encoder, instead: Mapping[str, Tensor]) -> Encoder:
    """TrainingError where there are none, or of another shape; `instead` replaces some of them."""
    path = run / WEIGHTS
    try:
        model.load_state_dict({**load_file(path), **instead})
    except FileNotFoundError as error:
        raise TrainingError(f"{path} is missing: the run has no checkpoint yet") from error
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise TrainingError(f"{path} does not hold weights of this shape: {reason}") from error
    return model


@contextmanager
def hold(run: Path) -> Iterator[None]:
    """Keeps other trainings out of a run until the block ends, or the process; TrainingError where one is in there.

    To be entered before the run is begun. One that cannot begin leaves no directory.
    """
    begins, lock = not run.exists(), run / LOCK
    try:
        run.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock).acquire(blocking=False)
    except Timeout as error:
        raise TrainingError(
            f"another training is at work in {run}: let it end, or choose another --output-dir"
        ) from error
    except OSError as error:  # after Timeout, which is one
        raise TrainingError(f"{run} cannot be a run directory: {error.strerror}") from error
    with held:
        try:
            yield
        finally:
            if begins and list(run.iterdir()) == [lock]:
                lock.unlink()
                run.rmdir()


def write_checkpoint(run: Path, checkpoint: Mapping[str, Any]) -> None:
    beside = run / f"{LAST}.partial"
    torch.save(dict(checkpoint), beside)
    beside.replace(run / LAST)


def read_checkpoint(run: Path) -> dict[str, Any] | None:
    """The latest checkpoint, or None where the run has not got that far."""
    path = run / LAST
    if not path.exists():
        return None
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise TrainingError(f"{path} is not a readable checkpoint; without it the run begins anew") from error
    return checkpoint
