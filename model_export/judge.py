"""Judges every precision on every split, running each distinct text once, however many splits hold it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from model_export.errors import ExportError
from model_export.parity import FloatArray, Tolerances, precision_difference, run_engine
from service.engine import Engine
from service.manifest import Difference, Quality
from training.data import Dataset, load_dataset
from training.examples import Examples
from training.scores import score
from training.tokenizer import Window, encode

SplitLogits = dict[str, FloatArray]
"""split -> logits (R, N, C)"""


@dataclass(frozen=True)
class Splits:
    """What a model is judged on: `validation`, which also tunes, and splits that only judge."""

    examples: Mapping[str, Examples]
    labels: Sequence[str]
    ids: list[list[int]]
    """of the distinct texts"""
    places: Mapping[str, list[int]]
    """split -> where each of its texts stands among the distinct ones"""

    @property
    def validation_ids(self) -> list[list[int]]:
        return [self.ids[place] for place in self.places["validation"]]

    def run(self, engine: Engine, iterations: int) -> SplitLogits:
        """The logits of every iteration, as the engine that will serve gives them."""
        logits_RNC = run_engine(engine, self.ids, iterations)
        return {split: logits_RNC[:, places] for split, places in self.places.items()}

    def quality(self, logits: SplitLogits) -> dict[str, list[Quality]]:
        """Scores after each iteration, by split."""
        return {split: [self._quality(split, found_NC) for found_NC in logits[split]] for split in self.examples}

    def _quality(self, split: str, logits_NC: FloatArray) -> Quality:
        one = score(self.examples[split].labels, logits_NC.argmax(-1).tolist(), self.labels)
        return Quality(**{name: one[name] for name in Quality.model_fields})

    def differences(self, name: str, fp32: SplitLogits, found: SplitLogits, tolerances: Tolerances) -> list[Difference]:
        """How far a precision is from FP32 on each split; ExportError names a figure that is out of tolerance."""
        return [
            precision_difference(name, split, fp32[split][-1], found[split][-1], examples.labels, tolerances)
            for split, examples in self.examples.items()
        ]


def open_splits(
    dataset: Dataset, others: Sequence[str], data_dir: Path | None, tokenizer: Tokenizer, window: Window
) -> Splits:
    """The splits of a run's own data set, and what judges the other data sets named; they must have its labels."""
    examples = dict(dataset.judged)
    for name in others:
        other = load_dataset(name, data_dir)
        if other.labels != dataset.labels:
            has = f"{other.name} has labels {', '.join(other.labels)}"
            raise ExportError(f"{has}, the run {', '.join(dataset.labels)}: it cannot be judged there")
        examples |= other.finals
    return gather(examples, dataset.labels, tokenizer, window)


def gather(examples: Mapping[str, Examples], labels: Sequence[str], tokenizer: Tokenizer, window: Window) -> Splits:
    """Splits by name, each of their distinct texts tokenized once."""
    texts = list(dict.fromkeys(text for part in examples.values() for text in part.texts))
    place_of = {text: place for place, text in enumerate(texts)}
    places = {split: [place_of[text] for text in part.texts] for split, part in examples.items()}
    return Splits(examples, labels, encode(tokenizer, texts, window), places)
