"""The proof: what it covers, and that nothing wrong gets past it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from model_export.errors import ExportError
from model_export.graphs import Graphs
from model_export.parity import (
    FP32_TOLERANCE,
    LARGEST_BATCH,
    FloatArray,
    Tolerances,
    fp32_difference,
    odd_batches,
    precision_difference,
    run_engine,
)
from service.engine import Engine
from service.manifest import GraphRole
from tests import tiny
from training.architectures.encoder import Encoder
from training.batches import pad

SURE, UNSURE = [0.0, 1.0], [1.0, 0.0]


class OffEngine(Engine):
    """Right but for what it adds to the logits of one iteration."""

    def __init__(self, paths: dict[GraphRole, Path], iteration: int, off: float) -> None:
        super().__init__(paths, provider="cpu", precision="fp32", threads=1)
        self.iteration, self.off, self.steps = iteration, off, 0

    def embed(self, ids: Sequence[Sequence[int]]) -> list[FloatArray]:
        self.steps = 0
        return super().embed(ids)

    def step(self, hidden: Sequence[FloatArray]) -> tuple[list[FloatArray], FloatArray]:
        self.steps += 1
        states, logits_BC = super().step(hidden)
        if self.steps == self.iteration and len(hidden) == LARGEST_BATCH:
            logits_BC[-1, 0] += self.off
        return states, logits_BC


@pytest.fixture(scope="module")
def paths(fp32_graphs: Graphs, tmp_path_factory: pytest.TempPathFactory) -> dict[GraphRole, Path]:
    """The FP32 graphs as files."""
    directory = tmp_path_factory.mktemp("fp32")
    for role, graph in fp32_graphs.items():
        (directory / f"{role}.onnx").write_bytes(graph.SerializeToString())
    return {role: directory / f"{role}.onnx" for role in fp32_graphs}


@pytest.mark.parametrize("max_tokens", [1, 5, tiny.MAX_TOKENS, 256])
def test_the_batches_cover_every_size_and_both_ends_of_the_lengths(max_tokens: int) -> None:
    batches = list(odd_batches(4096, max_tokens))
    lengths = [[len(ids) for ids in batch] for batch in batches]
    assert [len(batch) for batch in batches] == list(range(1, 34))
    assert {min(map(min, lengths)), max(map(max, lengths))} == {1, max_tokens}
    assert any(len(set(batch)) == 1 for batch in lengths)
    assert max_tokens == 1 or any(len(set(batch)) > 1 for batch in lengths)
    assert all(0 <= token < 4096 for batch in batches for ids in batch for token in ids)


def test_fp32_is_pytorch_at_every_iteration_and_one_more(model: Encoder, paths: dict[GraphRole, Path]) -> None:
    worst, texts = fp32_difference(model, OffEngine(paths, 0, 0.0), model.config.iterations + 1)
    assert worst <= FP32_TOLERANCE
    assert texts == sum(range(1, LARGEST_BATCH + 1))


@pytest.mark.parametrize("iteration", [1, 2])
@pytest.mark.parametrize("off", [2e-4, -1.0, np.nan, np.inf])
def test_one_logit_that_is_off_at_one_iteration_is_found(
    model: Encoder, paths: dict[GraphRole, Path], iteration: int, off: float
) -> None:
    with pytest.raises(ExportError, match=r"^FP32 against PyTorch: the logits differ by up to .*tolerance is 1e-04"):
        fp32_difference(model, OffEngine(paths, iteration, off), 2)


def test_what_runs_in_sorted_batches_comes_back_in_order(model: Encoder, paths: dict[GraphRole, Path]) -> None:
    ids = [ids for batch in odd_batches(model.config.vocabulary, tiny.MAX_TOKENS) for ids in batch][:70]
    found_RNC = run_engine(OffEngine(paths, 0, 0.0), ids, 2)
    with torch.inference_mode():
        for place in (0, 13, 42, 69):
            expected_RBC = model(*pad([ids[place]]), 2).numpy()
            np.testing.assert_allclose(found_RNC[:, place], expected_RBC[:, 0], atol=1e-4)


def differ(fp32: list[list[float]], found: list[list[float]], **tolerances: float) -> None:
    """All texts are truly of the second label."""
    arrays = np.array(fp32, dtype=np.float32), np.array(found, dtype=np.float32)
    figures = precision_difference("int8", "validation", *arrays, [1] * len(fp32), Tolerances(**tolerances))
    assert figures.texts == len(fp32)


def test_a_precision_may_lose_as_much_as_is_allowed_and_no_more() -> None:
    fp32, found = [SURE] * 10, [SURE] * 9 + [UNSURE]
    differ(fp32, found, accuracy_lost=0.11, labels_agree=0.9)
    said = r"^int8 loses 0\.1000 of accuracy on validation \(10 texts\), the tolerance is 0\.05$"
    with pytest.raises(ExportError, match=said):
        differ(fp32, found, accuracy_lost=0.05, labels_agree=0.9)
    with pytest.raises(ExportError, match=r"^int8 agrees with FP32 on 0\.9000 of the labels on validation, .* 0\.95$"):
        differ(fp32, found, accuracy_lost=0.11, labels_agree=0.95)


@pytest.mark.parametrize("wrong", [{"accuracy_lost": np.nan}, {"accuracy_lost": -0.1}, {"labels_agree": 98.0}])
def test_a_tolerance_is_a_share(wrong: dict[str, float]) -> None:
    """What is no number would let everything pass."""
    with pytest.raises(ExportError, match=r"^--(max-accuracy-lost|min-labels-agree) is .*; a share from 0 to 1"):
        Tolerances(**wrong)


def test_disagreeing_for_the_better_is_still_disagreeing() -> None:
    with pytest.raises(ExportError, match="agrees"):
        differ([UNSURE] * 10, [SURE] * 10)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_precision_that_gives_no_numbers_is_refused(wrong: float) -> None:
    with pytest.raises(ExportError, match="not finite"):
        differ([SURE] * 1000, [SURE] * 999 + [[0.0, wrong]])
