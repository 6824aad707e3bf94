"""The smallest real thing: easy texts, models that learn them in seconds, made by the project's own code."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Literal, NamedTuple


class Window(NamedTuple):
    """How much of a text is read."""

    max_tokens: int
    tail_tokens: int = 0


Architecture = Literal["recurrent", "baseline"]

DATASET = "sentiment-like"
"""The name of a data set of one's own is also its task."""
ARCHITECTURES: tuple[Architecture, ...] = ("recurrent", "baseline")
MAX_TOKENS = 40
GOOD = ("wonderful", "charming", "brilliant", "moving")
BAD = ("dreadful", "tedious", "clumsy", "hollow")
SUBJECTS = ("film", "story", "cast", "ending", "score")
FORMS = (
    "a {word} {subject}",
    "the {subject} is {word}",
    "i found the {subject} {word} , and so did everyone who came along with me that night",
    "{word} , {word} {subject} !",
)


def write_data(data_dir: Path) -> None:
    """80 texts to train on and 40 others to validate, which one word decides."""
    kinds = itertools.product(SUBJECTS, FORMS, range(len(GOOD)))
    pairs = [
        [
            {"text": form.format(word=word, subject=subject), "label": label}
            for word, label in ((BAD[place], "negative"), (GOOD[place], "positive"))
        ]
        for subject, form, place in kinds
    ]
    random.Random(13).shuffle(pairs)  # so that both splits meet every word
    folder = data_dir / DATASET
    folder.mkdir(parents=True)
    for split, chosen in (("train", pairs[:40]), ("validation", pairs[40:60])):
        lines = [json.dumps(record) for pair in chosen for record in pair]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def train_options(architecture: Architecture) -> dict[str, str | int | float]:
    """What makes a training take seconds."""
    return {
        "dataset": DATASET,
        "architecture": architecture,
        "layers": 1,
        "width": 32,
        "heads": 2,
        "feed_forward": 32,
        "max_tokens": MAX_TOKENS,
        "vocabulary": 300,
        "batch_size": 8,
        "num_epochs": 8,
        "early_stopping_patience": 8,
        "learning_rate": 3e-3,
        "dropout": 0.0,
        "token_dropout": 0.0,
    }
