"""How good a run is: per split, per class, at every iteration, with the time and size it takes."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from training import run as runs
from training.architectures.encoder import Encoder
from training.batches import pad, sorted_batches
from training.data import Dataset, load_dataset
from training.errors import TrainingError
from training.examples import Examples
from training.linear import LinearModel, read_linear
from training.prepare import check_source
from training.scores import score
from training.shapes import AS_IN_TRAINING, Reading
from training.tokenizer import encode

BATCH_TOKENS = 8192  # on a CPU batches of four times as many take half as long again


@torch.inference_mode()
def predict(model: Encoder, tokenizer: Tokenizer, texts: Sequence[str], iterations: int | None = None) -> Tensor:
    """The logits of every iteration for every text, (R, N, C) float32, in the texts' order."""
    ids = encode(tokenizer, texts, model.config)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    batches = sorted_batches([len(row) for row in ids], BATCH_TOKENS)
    parts = []
    for batch in tqdm(batches, desc="predict", unit="batch", leave=False, delay=5):
        ids_BL, mask_BL = pad([ids[index] for index in batch])
        mask_BL = None if mask_BL is None else mask_BL.to(device)
        # Not model(): within a training accelerate has put autocast around that, and what judges is FP32.
        parts.append(type(model).forward(model, ids_BL.to(device), mask_BL, iterations).cpu())
    model.train(was_training)
    order_N = torch.tensor([index for batch in batches for index in batch])
    return torch.cat(parts, dim=1)[:, order_N.argsort()]


@dataclass(frozen=True)
class Network:
    """A run's network with what reads its texts."""

    model: Encoder
    tokenizer: Tokenizer
    iterations: int | None = None

    @property
    def reads(self) -> dict[str, int]:
        """How much of a text."""
        return {name: getattr(self.model.config, name) for name in ("max_tokens", "tail_tokens")}

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def logits(self, texts: Sequence[str]) -> Tensor:
        return predict(self.model, self.tokenizer, texts, self.iterations)


def read_classifier(
    run: Path, device: torch.device, iterations: int | None = None, reading: Reading = AS_IN_TRAINING
) -> Network | LinearModel:
    """A run of any kind; both tell their `logits` of texts, (R, N, C) float32. A linear model stays on the CPU."""
    if runs.read_info(run).architecture == runs.LINEAR:
        if reading != AS_IN_TRAINING:
            raise TrainingError(f"{run} is linear, and reads all of a text: leave --max-tokens and --tail-tokens out")
        return read_linear(run)
    return Network(runs.read_model(run, reading).to(device), runs.read_tokenizer(run), iterations)


def evaluate(
    run: Path,
    data_dir: Path | None,
    split: str,
    dataset_name: str | None,
    iterations: int | None,
    reading: Reading = AS_IN_TRAINING,
) -> dict[str, Any]:
    """The figures of a run on one split of its own data set, or of another with the same labels."""
    dataset = _load(run, data_dir, dataset_name)
    examples = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}[split]
    if examples is None:
        raise TrainingError(f"data set '{dataset.name}' has no labelled {split} split")
    return _measure(run, dataset.name, {split: examples}, iterations, reading)[split]


def evaluate_all(
    run: Path,
    data_dir: Path | None,
    dataset_name: str | None,
    iterations: int | None,
    reading: Reading = AS_IN_TRAINING,
) -> dict[str, dict[str, Any]]:
    """The same on every split that a manifest reports quality on: of a mix, each source by itself."""
    dataset = _load(run, data_dir, dataset_name)
    return _measure(run, dataset.name, dataset.judged, iterations, reading)


def _load(run: Path, data_dir: Path | None, name: str | None) -> Dataset:
    info = runs.read_info(run)
    runs.check_decides(run, info)
    dataset = load_dataset(name or info.options["dataset"], data_dir)
    if list(dataset.labels) != info.labels:
        raise TrainingError(f"{dataset.name} has labels {', '.join(dataset.labels)}, the run {', '.join(info.labels)}")
    if name is None:
        check_source(run, info, dataset)
    return dataset


def _measure(
    run: Path, dataset: str, splits: Mapping[str, Examples], iterations: int | None, reading: Reading
) -> dict[str, dict[str, Any]]:
    """The figures of a run on each of the splits; a text that is in several of them is read once."""
    info = runs.read_info(run)
    if iterations is not None and (info.architecture != "recurrent" or iterations < 1):
        raise TrainingError(
            f"--iterations {iterations}: at least 1, and for a recurrent model only, not {info.architecture}"
        )
    classifier = read_classifier(run, torch.device("cpu"), iterations, reading)
    texts = list(dict.fromkeys(text for examples in splits.values() for text in examples.texts))
    started = time.perf_counter()
    answers_RN = classifier.logits(texts).argmax(-1)
    seconds = time.perf_counter() - started
    place = {text: number for number, text in enumerate(texts)}
    return {
        split: {
            "run": info.provenance["run_id"],
            "architecture": info.architecture,
            "seed": info.options["seed"],
            "dataset": dataset,
            "split": split,
            "reads": classifier.reads,
            "parameters": classifier.parameters,
            "megabytes_fp32": classifier.parameters * 4 / 1e6,
            "milliseconds_per_text": seconds * 1000 / len(texts),
            "iterations": {
                str(number): score(
                    examples.labels, answers_N[[place[text] for text in examples.texts]].tolist(), info.labels
                )
                for number, answers_N in enumerate(answers_RN, start=1)
            },
        }
        for split, examples in splits.items()
    }


def table(figures: dict[str, Any]) -> str:
    """The figures for a terminal: a line per iteration, then per class and confusions of the last one."""
    lines = [
        f"{figures['run']} on {figures['dataset']} {figures['split']}: {figures['parameters'] / 1e6:.2f} M parameters, "
        f"{figures['megabytes_fp32']:.1f} MB in FP32, {figures['milliseconds_per_text']:.2f} ms per text",
        "",
        f"{'iteration':<12}{'accuracy':>10}{'macro F1':>10}{'precision':>11}{'recall':>10}",
    ]
    for number, one in figures["iterations"].items():
        lines.append(
            f"{number:<12}{one['accuracy']:>10.4f}{one['macro_f1']:>10.4f}"
            f"{one['macro_precision']:>11.4f}{one['macro_recall']:>10.4f}"
        )
    last = list(figures["iterations"].values())[-1]
    width = max(len(label) for label in last["per_class"]) + 2
    lines += [
        "",
        f"{'class':<{width}}{'precision':>10}{'recall':>10}{'F1':>10}{'texts':>8}   predicted as (in this order)",
    ]
    for (label, one), row in zip(last["per_class"].items(), last["confusion_matrix"], strict=True):
        lines.append(
            f"{label:<{width}}{one['precision']:>10.4f}{one['recall']:>10.4f}{one['f1']:>10.4f}{one['texts']:>8}   "
            + " ".join(f"{count:>6}" for count in row)
        )
    return "\n".join(lines)
