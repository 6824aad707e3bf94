"""A data set that a tiny model learns in a second, and the options of such a training."""

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from training.config import TrainConfig

LABELS = ("bad", "good")
WORDS = {
    "bad": ("awful", "boring", "clumsy", "dreadful", "empty"),
    "good": ("brilliant", "charming", "delightful", "elegant", "funny"),
}
FILLER = ("the", "film", "plot", "actor", "scene", "music", "was", "with", "some", "and", "a", "rather", "quite")

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
    """The lines of `metrics.jsonl` but for the speed, which no seed decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]
