"""Probabilities that can be trusted, and how sure is sure enough to stop: both measured on the validation split."""

import math
from collections.abc import Mapping, Sequence
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from service.manifest import Bin, Calibration, CalibrationError, ExitPoint, Reliability

FloatArray = NDArray[np.floating]
IntArray = NDArray[np.integer]

BINS = 15
THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.975, 0.99, 0.995, 1.0)
EXIT_LOSS = 0.002
"""Most accuracy (0 to 1) that leaving early may cost."""


def calibrate(split: str, logits: Mapping[str, FloatArray], labels: Sequence[int]) -> Calibration:
    """The calibration of a model from its logits (R, N, C) on a split, by precision; "fp32" must be among them.

    The temperatures are fitted at FP32 and serve every precision: stored ones differ from it by less than a
    temperature's own error. The exit threshold holds in each of them.
    """
    truth_N = np.asarray(labels)
    temperatures = [round(fit_temperature(logits_NC, truth_N), 4) for logits_NC in logits["fp32"]]
    before = {name: probabilities(logits_RNC, [1.0] * len(temperatures)) for name, logits_RNC in logits.items()}
    after = {name: probabilities(logits_RNC, temperatures) for name, logits_RNC in logits.items()}
    shallow = len(temperatures) == 1
    curves = {} if shallow else {name: exit_curve(found_RNC, truth_N) for name, found_RNC in after.items()}
    return Calibration(
        split=split,
        texts=len(truth_N),
        temperatures=temperatures,
        exit_threshold=None if shallow else choose_threshold(list(curves.values()), len(truth_N)),
        ece={
            name: [
                CalibrationError(before=calibration_error(b_NC, truth_N), after=calibration_error(a_NC, truth_N))
                for b_NC, a_NC in zip(before[name], after[name], strict=True)
            ]
            for name in logits
        },
        reliability=[
            Reliability(before=bins(b_NC, truth_N), after=bins(a_NC, truth_N))
            for b_NC, a_NC in zip(before["fp32"], after["fp32"], strict=True)
        ],
        exit_curve=curves,
    )


def probabilities(logits_RNC: FloatArray, temperatures: Sequence[float]) -> FloatArray:
    """softmax(logits / temperature), each iteration with its own."""
    scaled_RNC = logits_RNC.astype(np.float64) / np.array(temperatures)[:, None, None]
    powers_RNC = np.exp(scaled_RNC - scaled_RNC.max(axis=-1, keepdims=True))
    return np.asarray(powers_RNC / powers_RNC.sum(axis=-1, keepdims=True))


def fit_temperature(logits_NC: FloatArray, truth_N: IntArray) -> float:
    """The temperature that makes the true labels likeliest (Guo et al. 2017, On Calibration of Modern Neural Networks).

    A normal prior on its logarithm, of mean 0 and deviation 1, counts as much as one text or so: it moves a fit to
    hundreds of texts by a tenth of a percent, and keeps a split without a mistake from asking for a temperature of 0.
    """
    wide_NC = logits_NC.astype(np.float64)
    wide_NC -= wide_NC.max(axis=1, keepdims=True)
    true_N = wide_NC[np.arange(len(truth_N)), truth_N]

    def unlikeliness(log_temperature: float) -> float:
        temperature = math.exp(log_temperature)
        likelihood = true_N / temperature - np.log(np.exp(wide_NC / temperature).sum(axis=1))
        return float(log_temperature**2 / 2 - likelihood.sum())

    found = minimize_scalar(unlikeliness, bounds=(math.log(0.02), math.log(50)), method="bounded")
    return math.exp(found.x)


def bins(probabilities_NC: FloatArray, truth_N: IntArray) -> list[Bin]:
    """The texts by their best probability, in 15 bins of equal width; those that are empty are left out."""
    best_N, right_N = probabilities_NC.max(axis=1), probabilities_NC.argmax(axis=1) == truth_N
    place_N = np.clip(np.ceil(best_N * BINS), 1, BINS)  # as in the source, a bin holds its upper edge
    found = []
    for place in np.unique(place_N):
        inside_N = place_N == place
        confidence, accuracy = float(best_N[inside_N].mean()), float(right_N[inside_N].mean())
        found.append(Bin(texts=int(inside_N.sum()), confidence=min(confidence, 1.0), accuracy=accuracy))
    return found


def calibration_error(probabilities_NC: FloatArray, truth_N: IntArray) -> float:
    """Expected calibration error: sum over the bins of texts / N * |accuracy - confidence|.

    Naeini et al. 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning"; with 15 bins as in Guo et al.
    2017. A perfectly calibrated model does not reach 0 on a finite split: with 872 texts about 0.025.
    """
    return sum(one.texts * abs(one.accuracy - one.confidence) for one in bins(probabilities_NC, truth_N)) / len(truth_N)


def exits(probabilities_RNC: FloatArray, threshold: float) -> IntArray:
    """After which iteration each text leaves, (N,) from 0: the first whose best probability reaches it; 1: the last."""
    leaves_RN = (probabilities_RNC.max(axis=-1) >= threshold) & (threshold < 1)
    leaves_RN[-1] = True
    return np.asarray(leaves_RN.argmax(axis=0))


def exit_curve(probabilities_RNC: FloatArray, truth_N: IntArray) -> list[ExitPoint]:
    """What each threshold brings."""
    right_RN = probabilities_RNC.argmax(axis=-1) == truth_N
    points = []
    for threshold in THRESHOLDS:
        exit_N = exits(probabilities_RNC, threshold)
        right_N = right_RN[exit_N, np.arange(len(truth_N))]
        points.append(
            ExitPoint(
                threshold=threshold,
                accuracy=float(right_N.mean()),
                mean_iterations=float(exit_N.mean()) + 1,
                changed=int((right_N != right_RN[-1]).sum()),
            )
        )
    return points


def choose_threshold(curves: Sequence[Sequence[ExitPoint]], texts: int) -> float | None:
    """The lowest threshold down to which no curve loses more accuracy than it may, one standard error included.

    None where there is none that saves anything; so it is with fewer than 500 texts, which cannot show so small a loss.
    """
    rows: list[tuple[ExitPoint, ...]] = list(zip(*curves, strict=True))
    full_depths = rows[-1]

    def holds(points: Sequence[ExitPoint]) -> bool:
        lost = (_accuracy_lost(point, full, texts) for point, full in zip(points, full_depths, strict=True))
        return all(one <= EXIT_LOSS for one in lost)

    good = list(takewhile(holds, reversed(rows[:-1])))
    if not good or good[-1][0].mean_iterations == full_depths[0].mean_iterations:
        return None
    return good[-1][0].threshold


def _accuracy_lost(point: ExitPoint, full_depth: ExitPoint, texts: int) -> float:
    """Against full depth, with one standard error on top.

    Both answer the same texts, so the error comes from those alone that change; one more than were seen, since none
    among a few says little.
    """
    return full_depth.accuracy - point.accuracy + math.sqrt(point.changed + 1) / texts
