"""What is measured and with which texts: the modes, the bundles behind them, and the answer that each text must get."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest import texts
from loadtest.bench import workers
from loadtest.bench.options import BenchOptions
from loadtest.bench.processes import Memory
from loadtest.errors import LoadTestError
from loadtest.texts import Sample

RAW = "loadtest.bench.raw"
LONG_TEXTS = 200
"""Of a file with more, the first."""
_ANSWER_SECONDS = 300.0


@dataclass(frozen=True)
class Samples:
    """The texts of a run. `source` names them in words, without a path."""

    short: list[Sample]
    long: list[Sample]
    source: str


def load_samples(options: BenchOptions) -> Samples:
    """From files where they are given, else composed; LoadTestError for a file that cannot be read."""
    short, long = options.short_source, options.long_source
    composed = [Sample(text) for text in texts.compose(texts.COUNT, seed=options.seed)] if not short else []
    reviews = [Sample(text) for text in texts.compose_reviews(LONG_TEXTS, seed=options.seed)] if not long else []
    return Samples(
        texts.read_samples(short) if short else composed,
        texts.read_samples(long)[:LONG_TEXTS] if long else reviews,
        f"short texts: {_named(short)}; long texts: {_named(long)}",
    )


def _named(path: Path | None) -> str:
    return f"{path.parent.name}/{path.name}" if path else "composed"


@dataclass(frozen=True)
class Model:
    """A bundle, and how the service says that it runs it."""

    bundle: Path
    manifest: dict[str, Any]
    precision: str
    provider: str

    @property
    def raw(self) -> dict[str, Any]:
        """What loadtest.bench.raw needs to do the same."""
        return {
            "bundle": str(self.bundle),
            "precision": self.precision,
            "provider": self.provider,
            "iterations": self.manifest["iterations"],
        }

    @property
    def exit_threshold(self) -> float:
        """The bundle's default; 1 where it says that no text should leave early."""
        return float(self.manifest["calibration"]["exit_threshold"] or 1)


def find_model(options: BenchOptions, served: Sequence[dict[str, Any]], architecture: str) -> Model:
    """The bundle that the service answers with, found among the files; LoadTestError where there is none."""
    for info in served:
        if (info["task"], info["architecture"]) == (options.task, architecture):
            for path in options.models_dir.glob("*/manifest.json"):
                manifest = json.loads(path.read_text(encoding="utf-8"))
                if (manifest["name"], manifest["version"]) == (info["name"], info["version"]):
                    return Model(path.parent, manifest, info["precision"], info["provider"])
    raise LoadTestError(f"no {architecture} bundle for the task {options.task!r} in {options.models_dir}")


@dataclass(frozen=True)
class Answered:
    """Texts of one kind, and what the raw runtime answers: tokens, and probabilities after each iteration."""

    samples: list[Sample]
    tokens: list[int]
    scores: list[list[list[float]]]
    labels: list[str]

    def taken(self, exit_threshold: float) -> list[int]:
        """How many iterations each text takes."""
        return [_iterations(after, exit_threshold) for after in self.scores]

    def known(self, exit_threshold: float) -> list[tuple[str, float]]:
        """The label and the score that each text must get."""
        final = [after[count - 1] for after, count in zip(self.scores, self.taken(exit_threshold), strict=True)]
        return [(self.labels[scores.index(max(scores))], max(scores)) for scores in final]

    def accuracy(self, exit_threshold: float) -> float | None:
        """Over the texts whose right label is known; None without any."""
        pairs = zip(self.samples, self.known(exit_threshold), strict=True)
        right = [self._is(sample.label, label) for sample, (label, _) in pairs if sample.label is not None]
        return sum(right) / len(right) if right else None

    def _is(self, wanted: str | int | None, label: str) -> bool:
        return label == (self.labels[wanted] if isinstance(wanted, int) else wanted)


def _iterations(after: Sequence[Sequence[float]], exit_threshold: float) -> int:
    sure = (count for count, scores in enumerate(after, 1) if exit_threshold < 1 and max(scores) >= exit_threshold)
    return next(sure, len(after))


def answer(model: Model, samples: list[Sample], options: BenchOptions, log: Path) -> Answered:
    """What the raw runtime answers to these texts."""
    job = model.raw | {"do": "answers", "texts": [sample.text for sample in samples], "size": options.list_size}
    (found,) = workers.run(RAW, [job], seconds=_ANSWER_SECONDS, log=log)
    tokens, scores = [one["tokens"] for one in found], [one["scores"] for one in found]
    return Answered(samples, tokens, scores, model.manifest["labels"])


@dataclass
class Target:
    """A running service with one architecture. `pid` is its first process, the others descend from it."""

    architecture: str
    url: str
    pid: int
    model: Model
    short: Answered
    long: Answered
    idle: Memory
    peak: Memory
