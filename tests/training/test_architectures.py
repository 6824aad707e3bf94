"""The two networks: as large as promised, blind to padding, iterated as written, positions as differences only."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.architectures import ARCHITECTURES
from training.architectures.encoder import Encoder
from training.architectures.leaves import Attention, masked_mean, rope_tables
from training.batches import pad
from training.config import TrainConfig
from training.errors import TrainingError
from training.ops import rope
from training.run import RunInfo
from training.shapes import EncoderConfig, Pooling

MAX_TOKENS = 24


def small(architecture: str, iterations: int, pooling: Pooling = "mean") -> Encoder:
    """Weights ten times as large as at the start of a training, so that a leak would show in the logits."""
    torch.manual_seed(0)
    shape = {"layers": 2, "width": 32, "heads": 4, "feed_forward": 40, "classes": 3, "vocabulary": 50}
    config = EncoderConfig(**shape, iterations=iterations, max_tokens=MAX_TOKENS, pooling=pooling)
    model = ARCHITECTURES[architecture](config).eval()
    for weight in model.parameters():
        weight.data *= 10 if weight.ndim == 2 else 1
    return model


MODELS = {"recurrent": small("recurrent", 3), "baseline": small("baseline", 1)}
POOLED_BY_FIRST = {"recurrent": small("recurrent", 3, "first"), "baseline": small("baseline", 1, "first")}


def parameters(architecture: Any) -> int:
    config = TrainConfig(architecture=architecture).encoder(classes=2, vocabulary=4096)
    return sum(weight.numel() for weight in ARCHITECTURES[architecture](config).parameters())


@pytest.mark.parametrize(("architecture", "millions"), [("baseline", 9.8), ("recurrent", 3.4)])
def test_the_models_have_the_promised_number_of_parameters(architecture: str, millions: float) -> None:
    assert parameters(architecture) / 1e6 == pytest.approx(millions, rel=0.02)


def test_the_recurrent_model_is_at_least_64_percent_smaller() -> None:
    assert parameters("recurrent") <= 0.36 * parameters("baseline")


@pytest.mark.parametrize("models", [MODELS, POOLED_BY_FIRST], ids=["mean", "first"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=25)
@given(lengths=st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=6), seed=st.integers(0, 1000))
@torch.inference_mode()
def test_a_text_gets_the_same_logits_alone_and_padded_at_every_iteration(
    architecture: str, models: dict[str, Encoder], lengths: list[int], seed: int
) -> None:
    model, generator = models[architecture], torch.Generator().manual_seed(seed)
    texts = [torch.randint(0, 50, (length,), generator=generator).tolist() for length in lengths]
    together_RBC = model(*pad(texts))
    for row, text in enumerate(texts):
        alone_RBC = model(torch.tensor([text]))
        torch.testing.assert_close(together_RBC[:, row], alone_RBC[:, 0], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_the_logits_do_depend_on_the_text() -> None:
    for model in MODELS.values():
        one_RBC, other_RBC = model(torch.tensor([[2, 7, 9]])), model(torch.tensor([[2, 9, 7]]))
        assert ((one_RBC - other_RBC).abs().amax(dim=(1, 2)) > 1e-2).all()


@torch.inference_mode()
def test_the_head_reads_all_tokens_or_the_first_alone() -> None:
    h_BLD = torch.randn(2, 5, 32)
    others_BLD = h_BLD.clone()
    others_BLD[:, 1:] += 1
    for models, reads_others in ((MODELS, True), (POOLED_BY_FIRST, False)):
        for model in models.values():
            changed = not torch.equal(model.head(h_BLD, None), model.head(others_BLD, None))
            assert changed == reads_others


def test_a_run_that_is_older_than_the_choice_reads_the_first_token() -> None:
    older = {"layers": 1, "iterations": 1, "width": 32, "heads": 4, "feed_forward": 8, "classes": 2}
    assert RunInfo("easy", ["bad", "good"], "baseline", older, {}, {}).build_model().head.pooling == "first"


def test_a_mean_leaves_padding_out_whatever_it_holds() -> None:
    h_BLD = torch.randn(2, 4, 8)
    h_BLD[0, 2:] = torch.tensor([torch.inf, torch.nan])[:, None]
    mask_BL = torch.tensor([[True, True, False, False], [True] * 4])
    expected_BD = torch.stack([h_BLD[0, :2].mean(0), h_BLD[1].mean(0)])
    torch.testing.assert_close(masked_mean(h_BLD, mask_BL), expected_BD)


@torch.inference_mode()
def test_a_recurrent_step_adds_half_the_state_to_its_layers() -> None:
    model, (ids_BL, mask_BL) = MODELS["recurrent"], pad([[2, 5, 6], [2, 9]])
    h_BLD = model.embed(ids_BL)
    next_BLD, logits_BC = model.step(h_BLD, mask_BL)
    torch.testing.assert_close(next_BLD, model.run_layers(h_BLD, mask_BL) + 0.5 * h_BLD)
    torch.testing.assert_close(logits_BC, model.head(next_BLD, mask_BL))


@torch.inference_mode()
def test_a_baseline_step_is_its_layers() -> None:
    model, (ids_BL, mask_BL) = MODELS["baseline"], pad([[2, 5, 6], [2, 9]])
    h_BLD = model.embed(ids_BL)
    torch.testing.assert_close(model.step(h_BLD, mask_BL)[0], model.run_layers(h_BLD, mask_BL))


@torch.inference_mode()
def test_iterations_are_the_callers_choice_and_fewer_give_the_beginning_of_more() -> None:
    model, ids_BL = MODELS["recurrent"], torch.tensor([[2, 5, 6, 8]])
    five_RBC = model(ids_BL, iterations=5)
    assert len(model(ids_BL)) == 3
    assert len(five_RBC) == 5
    for iterations in range(1, 6):
        assert torch.equal(model(ids_BL, iterations=iterations), five_RBC[:iterations])
    assert not torch.allclose(five_RBC[0], five_RBC[1])


def test_the_weights_are_shared_by_all_iterations() -> None:
    names = {iterations: set(small("recurrent", iterations).state_dict()) for iterations in (1, 4)}
    assert names[1] == names[4]


def test_attention_knows_relative_positions_only() -> None:
    torch.manual_seed(0)
    attention, x_BLD = Attention(32, 4), torch.randn(2, 6, 32)
    cos_MJ, sin_MJ = rope_tables(40, 8)

    def at(*positions: int) -> Tensor:
        rows = list(positions)
        out_BLD: Tensor = attention(x_BLD, None, cos_MJ[rows].expand(2, -1, -1), sin_MJ[rows].expand(2, -1, -1))
        return out_BLD

    here_BLD = at(0, 1, 2, 3, 4, 5)
    torch.testing.assert_close(at(30, 31, 32, 33, 34, 35), here_BLD, rtol=0, atol=1e-5)
    assert (at(0, 2, 4, 6, 8, 10) - here_BLD).abs().max() > 1e-3, "positions should matter at all"


def test_rope_tables_hold_the_angles_of_the_paper() -> None:
    cos_MJ, sin_MJ = rope_tables(5, 4)
    angles_MJ = torch.tensor([[position, position / 100] for position in range(5)])  # 10000^(-2j/4), j = 0, 1
    torch.testing.assert_close(cos_MJ, angles_MJ.cos())
    torch.testing.assert_close(sin_MJ, angles_MJ.sin())
    unit = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, 1, 5, 4)
    turned_LK = rope(unit, cos_MJ[None], sin_MJ[None])[0, 0]
    torch.testing.assert_close(turned_LK[:, [0, 2]], torch.stack([angles_MJ[:, 0].cos(), angles_MJ[:, 0].sin()], dim=1))


def test_a_width_that_the_heads_cannot_share_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"^width 36 does not fit 4 heads: a multiple of 8 is needed"):
        EncoderConfig(layers=1, iterations=1, width=36, heads=4, feed_forward=8, classes=2)
