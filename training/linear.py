"""A logistic regression on hashed words and pairs of words: the floor that a network must beat, and a cheap teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy.sparse import csr_matrix, vstack
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize
from torch import Tensor
from tqdm import tqdm

from training import run as runs
from training.config import LinearConfig
from training.data import Dataset, load_dataset
from training.errors import TrainingError
from training.metrics import Log, peak_memory
from training.prepare import check_texts, provenance, recorded_options, standing_run
from training.run import LINEAR, RunInfo
from training.scores import score

FEATURES = 2**21
"""Columns that words and pairs of words are hashed to."""
WORD = r"[\w']+|[!?]"
FEWEST_TEXTS = 2
"""A column that fewer training texts have says nothing: it would only be learned by heart."""
INVERSE_REGULARISATION = 4.0
BLOCK = 5000

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class LinearModel:
    """The weight of each column's rarity (V,), and what it says for each class (V, C) beside a bias (C,)."""

    idf_V: Vector
    weight_VC: Vector
    bias_C: Vector

    reads: ClassVar[str] = "all"
    """Of a text."""

    @property
    def parameters(self) -> int:
        return self.idf_V.size + self.weight_VC.size + self.bias_C.size

    def logits(self, texts: Sequence[str]) -> Tensor:
        """(1, N, C) float32: one iteration, whose softmax is the regression's probabilities."""
        x_NV = weigh(count_words(texts, len(self.idf_V)), self.idf_V)
        return torch.from_numpy(x_NV @ self.weight_VC + self.bias_C)[None]


def count_words(texts: Sequence[str], features: int) -> csr_matrix:
    """How often each column's words and pairs of words stand in each text, (N, V)."""
    vectorizer = HashingVectorizer(
        n_features=features, token_pattern=WORD, ngram_range=(1, 2), norm=None, alternate_sign=False, dtype=np.float32
    )
    starts = tqdm(range(0, len(texts), BLOCK), desc="hash", unit="block", leave=False, delay=5)
    return vstack([vectorizer.transform(texts[start : start + BLOCK]) for start in starts], format="csr")


def weigh(counts_NV: csr_matrix, idf_V: Vector) -> csr_matrix:
    """(1 + log count) * idf, each text then of length 1; overwrites the counts."""
    counts_NV.data = (1 + np.log(counts_NV.data)) * idf_V[counts_NV.indices]
    return normalize(counts_NV, copy=False)


def fit(config: LinearConfig) -> dict[str, Any]:
    """Writes a run directory; returns its figures on the validation split."""
    options = recorded_options(config) | {"architecture": LINEAR}
    with runs.hold(config.output_dir):
        standing = standing_run(config.output_dir, options, {})
        dataset = load_dataset(config.dataset, config.data_dir)
        if standing:
            check_texts(config.output_dir, standing, dataset)
        began = perf_counter()
        model = _solve(dataset, config.seed)
        cost = {"seconds": round(perf_counter() - began, 2)} | peak_memory()
        figures = _validate(model, dataset)
        runs.write_weights(config.output_dir, {name: torch.from_numpy(array) for name, array in vars(model).items()})
        runs.write_info(config.output_dir, standing or _info(dataset, config, options))
        Log(config.output_dir / runs.METRICS, 0, 0).write(
            step=1, epoch=1, validation=[{name: round(figures[name], 4) for name in ("accuracy", "macro_f1")}], **cost
        )
        return figures


def _solve(dataset: Dataset, seed: int) -> LinearModel:
    counts_NV = count_words(dataset.train.texts, FEATURES)
    texts_V = np.bincount(counts_NV.indices, minlength=FEATURES)
    rarity_V = np.log((1 + len(dataset.train)) / (1 + texts_V)) + 1
    idf_V = np.where(texts_V >= FEWEST_TEXTS, rarity_V, 0).astype(np.float32)
    x_NV, two = weigh(counts_NV, idf_V), len(dataset.labels) == 2
    tqdm.write(f"fitting {x_NV.shape[0]:,} texts with {np.count_nonzero(idf_V):,} columns in use")
    regression = LogisticRegression(
        C=INVERSE_REGULARISATION, solver="liblinear" if two else "lbfgs", max_iter=300, random_state=seed
    ).fit(x_NV, dataset.train.labels)
    weight_CV, bias_C = regression.coef_, regression.intercept_
    if two:  # one row, for the second class; halved, the two classes' logits are as far apart
        weight_CV, bias_C = (np.concatenate([-half, half]) for half in (weight_CV / 2, bias_C / 2))
    return LinearModel(idf_V, np.ascontiguousarray(weight_CV.T, np.float32), bias_C.astype(np.float32))


def _validate(model: LinearModel, dataset: Dataset) -> dict[str, Any]:
    predicted = model.logits(dataset.validation.texts)[0].argmax(-1).tolist()
    return score(dataset.validation.labels, predicted, dataset.labels)


def _info(dataset: Dataset, config: LinearConfig, options: dict[str, Any]) -> RunInfo:
    return RunInfo(
        task=dataset.task,
        labels=list(dataset.labels),
        architecture=LINEAR,
        encoder={"features": FEATURES, "classes": len(dataset.labels)},
        options=options,
        provenance=provenance(dataset, LINEAR, config.seed, ("scikit-learn", "numpy")),
    )


def read_linear(run: Path) -> LinearModel:
    """The model that `fit` left in a run directory; TrainingError where there is none."""
    path = run / runs.WEIGHTS
    try:
        arrays = {name: tensor.numpy() for name, tensor in load_file(path).items()}
        return LinearModel(**arrays)
    except FileNotFoundError as error:
        raise TrainingError(f"{path} is missing") from error
    except (SafetensorError, TypeError) as error:
        raise TrainingError(f"{path} does not hold a linear model's weights: {error}") from error
