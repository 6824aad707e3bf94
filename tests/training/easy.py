"""A data set that a tiny model learns in a second, the options of such a training, and what it left behind."""

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from training import run as runs
from training.config import TrainConfig

LABELS = ("bad", "good")
WORDS = {
    "bad": ("awful", "boring", "clumsy", "dreadful", "empty"),
    "good": ("brilliant", "charming", "delightful", "elegant", "funny"),
}
FILLER = ("the", "film", "plot", "actor", "scene", "music", "was", "with", "some", "and", "a", "rather", "quite")

COST = ("tokens_per_second", "seconds", "peak_memory_mb", "peak_cuda_mb")

Records = list[dict[str, Any]]


def easy_records(count: int, seed: int = 0) -> Records:
    """Texts of 4 to 13 words, two of which give the label away; the labels take turns."""
    rng = random.Random(seed)
    records = []
    for number in range(count):
        label = LABELS[number % 2]
        words = [rng.choice(FILLER) for _ in range(rng.randint(2, 11))]
        for telling in rng.sample(WORDS[label], 2):
            words.insert(rng.randrange(len(words)), telling)
        records.append({"text": " ".join(words), "label": label})
    return records


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_easy(data_dir: Path, name: str = "easy", train: int = 60) -> None:
    write_jsonl(data_dir / name / "train.jsonl", easy_records(train))
    write_jsonl(data_dir / name / "validation.jsonl", easy_records(21, seed=1))
    write_jsonl(data_dir / name / "test.jsonl", easy_records(13, seed=2))


def tiny_options(data_dir: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """A quarter of a second's training; `changes` are options of `TrainConfig`."""
    return {
        "dataset": "easy",
        "data_dir": data_dir,
        "output_dir": output_dir,
        "layers": 1,
        "width": 32,
        "heads": 2,
        "feed_forward": 32,
        "max_tokens": 16,
        "vocabulary": 300,
        "batch_size": 4,
        "learning_rate": 5e-3,
        "num_epochs": 4,
        "early_stopping_patience": 9,
        "checkpoint_steps": 10,
    } | changes


def tiny_config(data_dir: Path, output_dir: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(**tiny_options(data_dir, output_dir, **changes))


def tiny_arguments(data_dir: Path, output_dir: Path, **changes: Any) -> list[str]:
    """The same as a command line, after `python -m training`."""
    options = tiny_options(data_dir, output_dir, **changes)
    return ["train", *(f"--{name.replace('_', '-')}={value}" for name, value in options.items())]


def metrics(run: Path) -> Records:
    """The lines of `metrics.jsonl` but for speed and memory, which no seed decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in COST} for line in lines]


def best(run: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = load_file(run / "model.safetensors")
    return weights


def last(run: Path) -> dict[str, Any]:
    checkpoint = runs.read_checkpoint(run)
    assert checkpoint is not None
    return checkpoint


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def assert_same_run(one: Path, other: Path) -> None:
    assert difference(best(one), best(other)) <= 1e-6
    assert difference(last(one)["model"], last(other)["model"]) <= 1e-6
    assert last(one)["progress"] == last(other)["progress"]
    assert metrics(one) == metrics(other)
