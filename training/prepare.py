"""Before the first step: the data, the run directory, and what the run says of itself."""

import importlib.metadata
import random
import subprocess
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from training import run as runs
from training.config import TrainConfig
from training.data import Dataset, load_dataset
from training.errors import TrainingError
from training.run import RunInfo
from training.tokenizer import learn_tokenizer


def prepare_run(config: TrainConfig, dataset: Dataset) -> RunInfo:
    """A new run directory, or the one that stands there if its options are the same."""
    directory, options = config.output_dir, _options(config)
    if (directory / runs.CONFIG).exists():
        info = runs.read_info(directory)
        changed = [name for name, value in options.items() if info.options.get(name) != value]
        if changed:
            raise TrainingError(
                f"{directory} holds a run with other options ({', '.join(changed)}): choose another --output-dir"
            )
        return info
    directory.mkdir(parents=True, exist_ok=True)
    if config.init_from:
        tokenizer = runs.read_tokenizer(config.init_from)
    else:
        tokenizer = learn_tokenizer(dataset.train.texts, config.tokenizer, config.vocabulary)
    runs.replace(directory / runs.TOKENIZER, tokenizer.to_str().encode())
    info = RunInfo(
        task=dataset.task,
        labels=list(dataset.labels),
        architecture=config.architecture,
        encoder=asdict(config.encoder(len(dataset.labels), tokenizer.get_vocab_size())),
        options=options,
        provenance=_provenance(config, options, dataset),
    )
    runs.write_info(directory, info)
    return info


def prepare_dataset(config: TrainConfig) -> Dataset:
    """The data set that the options name, with the share of its training split that they ask for."""
    dataset = load_dataset(config.dataset, config.data_dir)
    if not 0 < config.train_share <= 1:
        raise TrainingError(f"--train-share {config.train_share}: a share above 0 and up to 1 is needed")
    count = len(dataset.train)
    chosen = random.Random(config.seed).sample(range(count), max(1, round(count * config.train_share)))
    return replace(dataset, train=dataset.train.pick(sorted(chosen)))


def _options(config: TrainConfig) -> dict[str, Any]:
    """The options that shape the result; where files lie does not."""
    places = ("data_dir", "output_dir", "init_from")
    options = {name: value for name, value in asdict(config).items() if name not in places}
    return {**options, "initialised_from": _run_id(config.init_from)}


def _run_id(run: Path | None) -> str | None:
    return runs.read_info(run).provenance["run_id"] if run else None


def _provenance(config: TrainConfig, options: dict[str, Any], dataset: Dataset) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {
        "run_id": f"{dataset.name}-{config.architecture}-{now:%Y%m%dT%H%M%SZ}",
        "started": f"{now:%Y-%m-%dT%H:%M:%SZ}",
        "dataset": dataset.name,
        "initialised_from": options["initialised_from"],
        "texts": {"train": len(dataset.train), "validation": len(dataset.validation)},
        "commit": _commit(),
        "seed": config.seed,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "tokenizers", "accelerate")},
    }


def _commit() -> str | None:
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=False, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
