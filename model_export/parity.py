"""The proof that a bundle answers as the model does, through the engine that will serve it."""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from model_export.errors import ExportError
from service.engine import Engine
from service.manifest import Difference
from training.architectures.encoder import Encoder
from training.batches import pad, sorted_batches

FloatArray = NDArray[np.float32]

FP32_TOLERANCE = 1e-4
LARGEST_BATCH = 33
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Tolerances:
    """How far a stored precision may be from FP32 on any split, at the last iteration."""

    accuracy_lost: float = 0.005
    labels_agree: float = 0.98

    def __post_init__(self) -> None:
        options = {"--max-accuracy-lost": self.accuracy_lost, "--min-labels-agree": self.labels_agree}
        for name, share in options.items():
            if not 0 <= share <= 1:
                raise ExportError(f"{name} is {share}; a share from 0 to 1 is needed")


def run_engine(engine: Engine, ids: Sequence[Sequence[int]], iterations: int, threads: int | None = None) -> FloatArray:
    """The logits of every iteration for every text, (R, N, C), in the texts' order; a thread a core unless given."""
    return _in_batches(lambda batch: _run_batch(engine, batch, iterations), ids, threads)


def run_portable(path: Path, ids: Sequence[Sequence[int]]) -> FloatArray:
    """The logits (N, C) in plain ONNX Runtime, as those will run the graph who serve it elsewhere."""
    session = onnxruntime.InferenceSession(path)

    def run(batch: Sequence[Sequence[int]]) -> FloatArray:
        ids_BL, mask_BL = pad(batch)
        mask = np.ones(ids_BL.shape, dtype=bool) if mask_BL is None else mask_BL.numpy()
        (logits_BC,) = session.run(["logits"], {"ids": ids_BL.numpy(), "mask": mask})
        return np.asarray(logits_BC)[None]

    logits_NC: FloatArray = _in_batches(run, ids)[0]
    return logits_NC


def _in_batches(
    run: Callable[[Sequence[Sequence[int]]], FloatArray], ids: Sequence[Sequence[int]], threads: int | None = None
) -> FloatArray:
    """What `run` makes of batches of like length, (R, B, C) each, joined in the texts' order."""
    batches = sorted_batches([len(row) for row in ids], BATCH_TOKENS)
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:  # a session runs in as many threads as call it
        running = pool.map(lambda batch: run([ids[index] for index in batch]), batches)
        parts = list(tqdm(running, total=len(batches), desc="answers", unit="batch", leave=False, delay=2))
    order_N = np.argsort([index for batch in batches for index in batch])
    return np.concatenate(parts, axis=1)[:, order_N]


def _run_batch(engine: Engine, ids: Sequence[Sequence[int]], iterations: int) -> FloatArray:
    hidden, logits_BC = engine.embed(ids), []
    for _ in range(iterations):
        hidden, step_logits_BC = engine.step(hidden)
        logits_BC.append(step_logits_BC)
    return np.stack(logits_BC)


def odd_batches(vocabulary: int, max_tokens: int, seed: int = 13) -> Iterator[list[list[int]]]:
    """Batches of every size from 1 to 33, of lengths from 1 to the maximum, with and without padding."""
    rng = random.Random(seed)
    ceilings = [1, 2, 3, 5, 8, 16, 17, 31, 33, 64, max_tokens]
    for size in range(1, LARGEST_BATCH + 1):
        ceiling = min(ceilings[size % len(ceilings)], max_tokens)
        lengths = [ceiling, *(rng.randint(1, ceiling) for _ in range(size - 1))]
        rng.shuffle(lengths)
        yield [[rng.randrange(vocabulary) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def fp32_difference(model: Encoder, engine: Engine, iterations: int) -> tuple[float, int]:
    """The largest |difference of logits| between PyTorch and the FP32 graphs, and the number of texts compared.

    PyTorch computes in FP64: in FP32 it may be further off than the graphs are, by 1e-4 on an ill-conditioned text.
    """
    exact, worst, texts = deepcopy(model).double(), 0.0, 0
    batches = list(odd_batches(model.config.vocabulary, model.config.max_tokens))
    for ids in tqdm(batches, desc="parity with PyTorch", unit="batch", leave=False, delay=2):
        expected_RBC = exact(*pad(ids), iterations).numpy()
        difference = float(np.abs(_run_batch(engine, ids, iterations) - expected_RBC).max())
        worst = float(np.maximum(worst, difference))  # unlike max(), it keeps what is not a number
        texts += len(ids)
    if not worst <= FP32_TOLERANCE:
        raise ExportError(
            f"FP32 against PyTorch: the logits differ by up to {worst:.2e}, the tolerance is {FP32_TOLERANCE:.0e}"
        )
    return worst, texts


def precision_difference(
    name: str,
    split: str,
    fp32_NC: FloatArray,
    found_NC: FloatArray,
    labels: Sequence[int],
    tolerances: Tolerances,
) -> Difference:
    """How far a stored precision is from FP32; ExportError names a figure that is out of tolerance."""
    if not np.isfinite(found_NC).all():
        raise ExportError(f"{name} gives logits on {split} that are not finite numbers")
    expected_N, found_N, truth_N = fp32_NC.argmax(-1), found_NC.argmax(-1), np.array(labels)
    agree = float((expected_N == found_N).mean())
    lost = float((expected_N == truth_N).mean() - (found_N == truth_N).mean())
    if lost > tolerances.accuracy_lost:
        raise ExportError(
            f"{name} loses {lost:.4f} of accuracy on {split} ({len(labels)} texts), "
            f"the tolerance is {tolerances.accuracy_lost}"
        )
    if agree < tolerances.labels_agree:
        raise ExportError(
            f"{name} agrees with FP32 on {agree:.4f} of the labels on {split}, at least {tolerances.labels_agree}"
        )
    worst = float(np.abs(fp32_NC - found_NC).max())
    return Difference(
        split=split, texts=len(labels), labels_agree=agree, accuracy_lost=lost, max_logit_difference=worst
    )
