"""From logits to probabilities: one text's for its caller, a batch's for who may leave early."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from service.engine import FloatArray


def temperature_after(temperatures: Sequence[float], iterations: int) -> float:
    """What divides the logits of so many iterations; beyond those that were fitted, the last one's."""
    return temperatures[min(iterations, len(temperatures)) - 1]


def confidence(logits_BC: FloatArray, temperatures: Sequence[float]) -> FloatArray:
    """The largest probability of each row: softmax(logits / the row's temperature)."""
    temperatures_B = np.array(temperatures, dtype=np.float32)
    shifted_BC = (logits_BC - logits_BC.max(axis=1, keepdims=True)) / temperatures_B[:, None]
    largest_B: FloatArray = 1.0 / np.exp(shifted_BC).sum(axis=1)
    return largest_B


def softmax(logits: Sequence[float], temperature: float) -> list[float]:
    """Turn one text's logits into probabilities; for a handful of classes an array costs ten times as much."""
    largest = max(logits)
    powers = [math.exp((logit - largest) / temperature) for logit in logits]
    total = sum(powers)
    return [power / total for power in powers]
