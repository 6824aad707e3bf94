"""Before the first step: the data, the run directory, and what the run says of itself."""

import hashlib
import importlib.metadata
import secrets
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from training import run as runs
from training.config import LinearConfig, RunConfig, StatesConfig, TrainConfig
from training.data import Dataset, draw_share, load_dataset
from training.errors import TrainingError
from training.run import RunInfo
from training.tokenizer import learn_tokenizer


def prepare_dataset(config: TrainConfig) -> Dataset:
    """The data set that the options name, with the share of its training split that they ask for."""
    return draw_share(load_dataset(config.dataset, config.data_dir), config.train_share, config.seed)


def prepare_run(config: RunConfig, dataset: Dataset) -> RunInfo:
    """A new run directory, or the one that stands there if its options are the same."""
    directory, options = config.output_dir, recorded_options(config)
    if standing := standing_run(directory, options, recorded_options(type(config)())):
        check_texts(directory, standing, dataset)
        return standing
    tokenizer = _tokenizer(config, dataset)
    info = RunInfo(
        task=dataset.task,
        labels=list(dataset.labels),
        architecture=config.architecture,
        encoder=asdict(config.encoder(max(1, len(dataset.labels)), tokenizer.get_vocab_size())),
        options=options,
        provenance=provenance(dataset, config.architecture, config.seed, ("torch", "tokenizers", "accelerate"))
        | {
            "initialised_from": options.get("initialised_from"),
            "learned_from": _learned_from(config, dataset),
            "language_models": _language_models(config),
        },
    )
    if isinstance(config, TrainConfig) and config.init_from:
        runs.initialise(info.build_model(), info.labels, config.init_from)  # or a run that cannot begin stands there
    runs.replace(directory / runs.TOKENIZER, tokenizer.to_str().encode())
    runs.write_info(directory, info)
    return info


def standing_run(directory: Path, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> RunInfo | None:
    """The run that stands there, if any; TrainingError where its options are others.

    A run may be older than an option: it then took the default.
    """
    if not (directory / runs.CONFIG).exists():
        return None
    info = runs.read_info(directory)
    before = {**defaults, **info.options}
    if changed := [name for name, value in options.items() if before.get(name) != value]:
        raise TrainingError(
            f"{directory} holds a run with other options ({', '.join(changed)}): choose another --output-dir"
        )
    return info


def check_texts(directory: Path, info: RunInfo, dataset: Dataset) -> None:
    """TrainingError where a run that stands there was begun with others: it can be finished with none but its own."""
    now = {**_texts(dataset), "labels": list(dataset.labels)}
    before = {**now, **info.provenance, "labels": info.labels}  # an old run has kept no digest
    if changed := [name for name, value in now.items() if before[name] != value]:
        raise TrainingError(
            f"{directory} was begun with other texts ({', '.join(changed)} of data set '{dataset.name}' changed): give "
            "the --data-dir that it was begun with; another training needs another --output-dir"
        )


def check_source(run: Path, info: RunInfo, dataset: Dataset) -> None:
    """TrainingError where this is not the whole data set that a run took its share of.

    A validation split that we cut ourselves is another one then, and holds texts that the run has learned from.
    """
    check_texts(run, info, draw_share(dataset, info.options.get("train_share", 1.0), info.provenance["seed"]))


def _texts(dataset: Dataset) -> dict[str, Any]:
    """How many texts a run learns from and chooses its weights by, and a digest of all of them with their labels."""
    parts, digest = {"train": dataset.train, "validation": dataset.validation}, hashlib.sha256()
    for part in parts.values():
        for text, label in zip(part.texts, part.labels, strict=True):
            content = text.encode()
            digest.update(b"%d %d " % (label, len(content)) + content)
    return {"texts": {name: len(part) for name, part in parts.items()}, "texts_sha256": digest.hexdigest()}


def _tokenizer(config: RunConfig, dataset: Dataset) -> Tokenizer:
    if isinstance(config, TrainConfig) and config.init_from:
        return runs.read_tokenizer(config.init_from)
    return learn_tokenizer(dataset.train.texts, config.tokenizer, config.vocabulary)


def recorded_options(config: RunConfig | LinearConfig | StatesConfig) -> dict[str, Any]:
    """The options as a run keeps them: those that shape the result; where and how often files are written does not."""
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    for unshaping in ("data_dir", "output_dir", "checkpoint_steps"):
        options.pop(unshaping, None)
    if isinstance(config, TrainConfig):
        del options["init_from"]
        options["initialised_from"] = _run_id(config.init_from)
        options["teacher"] = [_run_id(teacher) for teacher in config.teacher]
        options["states"] = _run_id(config.states)
    return options


def _run_id(run: Path | None) -> str | None:
    return str(runs.read_info(run).provenance["run_id"]) if run else None


def _learned_from(config: RunConfig, dataset: Dataset) -> list[str]:
    """Names of all data sets in this run's weights: its own, and what the run that it began from and teachers saw."""
    names = [name for info in _earlier(config) for name in runs.learned_from(info)]
    return list(dict.fromkeys([*names, *dataset.name.split("+")]))


def _language_models(config: RunConfig) -> list[str]:
    """The language models whose states are in this run's weights, likewise."""
    own = [runs.read_info(config.states).options["model"]] if isinstance(config, TrainConfig) and config.states else []
    names = [name for info in _earlier(config) for name in runs.language_models(info)]
    return list(dict.fromkeys([*names, *own]))


def _earlier(config: RunConfig) -> list[RunInfo]:
    """The run that this one begins from, and its teachers."""
    directories = [config.init_from, *config.teacher] if isinstance(config, TrainConfig) else []
    return [runs.read_info(run) for run in directories if run]


def provenance(dataset: Dataset, architecture: str, seed: int, packages: Sequence[str]) -> dict[str, Any]:
    """Where a run that begins now comes from, for people; `packages` are those whose version matters."""
    kind = "" if dataset.labels else f"{dataset.task}-"
    return {
        "run_id": new_id(f"{kind}{dataset.name}", architecture),
        "started": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "dataset": dataset.name,
        **_texts(dataset),
        "commit": _commit(),
        "seed": seed,
        "machine": _machine(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def new_id(name: str, architecture: str) -> str:
    """What a run is called from now on, wherever its directory goes."""
    return f"{name}-{architecture}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"


def _machine() -> str:
    """What the training's speed is a speed of."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"{torch.get_num_threads()} CPU threads" if not torch.accelerator.is_available() else "GPU"


def _commit() -> str | None:
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=False, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
