"""The texts that cells train and are tested on, drawn by the seed and written as data sets of one's own."""

import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from training.data import DOMAINS, load_dataset

SIZE = 68_221
"""Texts in SST-2's training and validation splits together; of larger sets as many are drawn."""
LENGTH_SHARE = 0.3

Labelled = list[tuple[str, str]]
"""Texts and their labels."""


def write_selection(name: str, seed: int, data_dir: Path | None, to: Path, most: int | None = None) -> str:
    """Writes a selection split 80/10/10 into `to/FOLDER/`, unless it stands there already; returns FOLDER.

    `most`: so many texts at most, for a quick look.
    """
    folder = f"{name}-{seed}"
    if (to / folder).is_dir():
        return folder
    rng = random.Random(seed)
    found = SELECTIONS[name](data_dir, rng)[:most]
    first, second = int(len(found) * 0.8), int(len(found) * 0.8) + int(len(found) * 0.1)
    parts = {"train": found[:first], "validation": found[first:second], "test": found[second:]}
    official = _official(data_dir) if name.endswith("sst2") else set()
    beside = to / f"{folder}.partial"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for split, part in parts.items():
        kept = part if split == "test" else [one for one in part if one[0] not in official]
        lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in kept]
        (beside / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    beside.rename(to / folder)
    return folder


def _official(data_dir: Path | None) -> set[str]:
    """SST-2's validation split, which judges too and may therefore teach nothing."""
    return set(load_dataset("sst2", data_dir).validation.texts)


def _pooled(name: str, data_dir: Path | None, rng: random.Random) -> Labelled:
    """All the labelled texts of a data set, whatever their split, in an order drawn by the seed."""
    dataset = load_dataset(name, data_dir)
    parts = [part for part in (dataset.train, dataset.validation, dataset.test) if part]
    found = [
        (text, dataset.labels[label]) for part in parts for text, label in zip(part.texts, part.labels, strict=True)
    ]
    rng.shuffle(found)
    return found[:SIZE]


def _by_length(data_dir: Path | None, rng: random.Random, *, longest: bool) -> Labelled:
    found = sorted(_pooled("sst2", data_dir, rng), key=lambda one: len(one[0].split()), reverse=longest)
    chosen = found[: round(len(found) * LENGTH_SHARE)]
    rng.shuffle(chosen)
    return chosen


def _balanced(data_dir: Path | None, rng: random.Random) -> Labelled:
    """As many texts of each domain, labelled by it."""
    parts: Mapping[str, Sequence[tuple[str, str]]] = {
        domain: _pooled(name, data_dir, rng) for domain, name in DOMAINS.items()
    }
    each = min(SIZE // len(parts), *map(len, parts.values()))
    chosen = [(text, domain) for domain, part in parts.items() for text, _ in part[:each]]
    rng.shuffle(chosen)
    return chosen


SELECTIONS: Mapping[str, Callable[[Path | None, random.Random], Labelled]] = {
    "pooled-sst2": lambda data_dir, rng: _pooled("sst2", data_dir, rng),
    "longest-sst2": lambda data_dir, rng: _by_length(data_dir, rng, longest=True),
    "shortest-sst2": lambda data_dir, rng: _by_length(data_dir, rng, longest=False),
    "pooled-yelp": lambda data_dir, rng: _pooled("yelp_polarity", data_dir, rng),
    "balanced-domain": _balanced,
}
