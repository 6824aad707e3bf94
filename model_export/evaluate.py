"""How good a bundle is, measured anew: what its manifest says, or what it is worth on texts of one's own."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model_export.calibrate import exits, probabilities
from model_export.errors import ExportError
from model_export.judge import Splits, gather, open_splits
from service.bundle import Bundle, load_bundle
from service.engine import open_engine
from service.manifest import Quality, StoredPrecision
from training.data import load_dataset
from training.examples import Columns, read_examples

THREADS = 1
MANIFEST_TOLERANCE = 0.002
"""Accuracy (0 to 1): a CPU with other instructions rounds otherwise, which turns some texts."""
TEXTS_TOLERATED = 2
"""Which may be more than that of a small split."""


@dataclass(frozen=True)
class Figures:
    """One precision of a bundle on one split; `right` tells for each text whether it was, as served by default."""

    bundle: str
    precision: StoredPrecision
    split: str
    iterations: list[Quality]
    exit_threshold: float | None
    mean_iterations: float
    texts: list[str] = field(repr=False)
    right: NDArray[np.bool_] = field(repr=False)
    manifest: list[Quality] | None

    @property
    def accuracy(self) -> float:
        """As served by default, texts leaving early."""
        return float(self.right.mean())

    @property
    def differs(self) -> bool:
        """Whether the manifest says another accuracy of any iteration."""
        said = self.manifest or self.iterations
        tolerance = max(MANIFEST_TOLERANCE, (TEXTS_TOLERATED + 0.5) / len(self.texts))
        return any(
            abs(one.accuracy - other.accuracy) > tolerance for one, other in zip(self.iterations, said, strict=True)
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "bundle": self.bundle,
            "precision": self.precision,
            "split": self.split,
            "texts": len(self.texts),
            "iterations": [one.model_dump() for one in self.iterations],
            "as_served": {
                "exit_threshold": self.exit_threshold,
                "accuracy": self.accuracy,
                "mean_iterations": self.mean_iterations,
            },
            "manifest": self.manifest and [one.model_dump() for one in self.manifest],
        }


@dataclass(frozen=True)
class Comparison:
    """How much more accurate one bundle is than another on the same texts, with its standard error (both 0 to 1)."""

    bundle: str
    other: str
    precision: StoredPrecision
    split: str
    difference: float
    standard_error: float


def evaluate(
    paths: Sequence[Path], texts: Path | None, data_dir: Path | None, precisions: Sequence[StoredPrecision]
) -> list[Figures]:
    """Every stored precision (of those asked for, if any) on every split: those of the manifest, or the file `texts`.

    Raises ExportError, BundleError, TrainingError.
    """
    if not paths:
        raise ExportError("no bundle: give the directories of some")
    found: list[Figures] = []
    for name, path in named(paths).items():
        bundle = load_bundle(path)
        chosen = [one for one in bundle.manifest.precisions if not precisions or one in precisions]
        if not chosen:
            has = ", ".join(bundle.manifest.precisions)
            raise ExportError(f"{bundle.path} has no {' or '.join(precisions)}; it has {has}")
        splits = _own(bundle, texts) if texts else _reported(bundle, data_dir)
        for precision in chosen:
            found += _measure(name, bundle, precision, splits)
    return found


def named(bundles: Sequence[Path]) -> dict[str, Path]:
    """Each by its folder's name or, where several have the same, by the path that it was given with."""
    times = Counter(path.name for path in bundles)
    return {path.name if times[path.name] == 1 else str(path): path for path in bundles}


def _own(bundle: Bundle, texts: Path) -> Splits:
    labels = bundle.manifest.labels
    examples = {texts.name: read_examples(texts, labels, Columns())}
    return gather(examples, labels, bundle.tokenizer, bundle.manifest)


def _reported(bundle: Bundle, data_dir: Path | None) -> Splits:
    """The splits that the manifest reports, and no other; ExportError where the data has not all of them."""
    manifest = bundle.manifest
    dataset = load_dataset(manifest.training.dataset, data_dir)
    # What judges another data set is called after it: "imdb validation".
    others = dict.fromkeys(split.rpartition(" ")[0] for split in manifest.quality if split not in dataset.judged)
    splits = open_splits(dataset, list(filter(None, others)), data_dir, bundle.tokenizer, manifest)
    if missing := [split for split in manifest.quality if split not in splits.examples]:
        raise ExportError(f"the data has no {', '.join(missing)}, which the manifest of {bundle.path} reports")
    return splits


def _measure(name: str, bundle: Bundle, precision: StoredPrecision, splits: Splits) -> Iterator[Figures]:
    manifest = bundle.manifest
    engine = open_engine(bundle, provider="auto", precision=precision, threads=THREADS)
    logits, threshold = splits.run(engine, manifest.iterations), manifest.calibration.exit_threshold
    for split, quality in splits.quality(logits).items():
        likely_RNC = probabilities(logits[split], manifest.calibration.temperatures)
        exit_N = exits(likely_RNC, 1.0 if threshold is None else threshold)
        answer_N = likely_RNC.argmax(-1)[exit_N, np.arange(len(exit_N))]
        yield Figures(
            bundle=name,
            precision=precision,
            split=split,
            iterations=quality,
            exit_threshold=threshold,
            mean_iterations=float(exit_N.mean()) + 1,
            texts=splits.examples[split].texts,
            right=answer_N == np.array(splits.examples[split].labels),
            manifest=manifest.quality.get(split, {}).get(precision),
        )


def compare(figures: Sequence[Figures]) -> list[Comparison]:
    """Each bundle against those named after it, wherever both answered the same texts; as served by default.

    Both answer the same texts, so only those count of which one is right and the other wrong: with b and c of them
    among N the difference is (b - c) / N, its standard error sqrt(b + c - (b - c)^2 / N) / N (McNemar 1947).
    """
    found = []
    for place, one in enumerate(figures):
        for other in figures[place + 1 :]:
            alike = (one.split, one.precision, one.texts) == (other.split, other.precision, other.texts)
            if alike and one.bundle != other.bundle:
                found.append(_compare(one, other))
    return found


def _compare(one: Figures, other: Figures) -> Comparison:
    better, worse = int((one.right & ~other.right).sum()), int((other.right & ~one.right).sum())
    count = len(one.texts)
    spread = math.sqrt(better + worse - (better - worse) ** 2 / count) / count
    return Comparison(one.bundle, other.bundle, one.precision, one.split, (better - worse) / count, spread)


def table(figures: Sequence[Figures]) -> str:
    """The figures for a terminal; below them how far the bundles are apart."""
    head = ("bundle", "", "split", "texts", "accuracy at each iteration", "as served", "iterations", "manifest")
    rows = [head, *map(_row, figures)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if comparisons := compare(figures):
        lines += ["", "accuracy as served, in points, with its standard error:"]
        lines += [
            f"  {one.bundle} against {one.other}, {one.precision}, {one.split}: "
            f"{100 * one.difference:+.2f} +- {100 * one.standard_error:.2f}"
            for one in comparisons
        ]
    return "\n".join(lines)


def _row(one: Figures) -> tuple[str, ...]:
    said = "-"
    if one.manifest:
        said = ", ".join(f"{quality.accuracy:.4f}" for quality in one.manifest) + " DIFFERS" * one.differs
    return (
        one.bundle,
        one.precision,
        one.split,
        f"{len(one.texts):,}",
        ", ".join(f"{quality.accuracy:.4f}" for quality in one.iterations),
        f"{one.accuracy:.4f}",
        f"{one.mean_iterations:.2f}",
        said,
    )


def to_json(figures: Sequence[Figures]) -> dict[str, Any]:
    """Everything that `table` shows, with macro F1, precision and recall."""
    return {
        "figures": [one.to_json() for one in figures],
        "comparisons": [asdict(one) for one in compare(figures)],
    }
