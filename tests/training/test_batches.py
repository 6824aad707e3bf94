"""The batches: every text once, an order that seed and epoch decide, little padding."""

import random
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from training.batches import epoch_batches, pad, round_up, sorted_batches
from training.tokenizer import PAD_ID

lengths_of_texts = st.lists(st.integers(1, 256), max_size=300)


@given(lengths=lengths_of_texts, batch_size=st.integers(1, 40), seed=st.integers(), epoch=st.integers(0, 50))
def test_an_epoch_has_every_text_once_and_follows_from_its_seed(
    lengths: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    batches = epoch_batches(lengths, batch_size, seed, epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(0 < len(batch) <= batch_size for batch in batches)
    assert batches == epoch_batches(lengths, batch_size, seed, epoch)


@given(lengths=lengths_of_texts, most_tokens=st.integers(1, 500))
def test_evaluation_has_every_text_once_from_short_to_long_in_full_batches(
    lengths: list[int], most_tokens: int
) -> None:
    batches = sorted_batches(lengths, most_tokens)
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths)
    assert all(len(batch) == 1 or len(batch) * lengths[batch[-1]] <= most_tokens for batch in batches)
    assert all((len(batch) + 1) * lengths[after[0]] > most_tokens for batch, after in pairwise(batches))


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_trainings_use_few_lengths_little_above_what_is_needed(length: int, most: int) -> None:
    length = min(length, most)
    rounded = round_up(length, most)
    assert length <= rounded <= min(most, length + max(7, length / 8))
    assert round_up(rounded, most) == rounded
    assert len({round_up(one, 1024) for one in range(1, 1025)}) == 40


@given(st.lists(st.integers(1, 4095), min_size=1, max_size=20), st.integers(0, 20))
def test_padding_to_a_length_marks_what_is_no_token(text: list[int], more: int) -> None:
    ids_BL, mask_BL = pad([text], len(text) + more)
    assert ids_BL.tolist() == [[*text, *[PAD_ID] * more]]
    assert (mask_BL is None) == (more == 0)
    assert mask_BL is None or mask_BL.tolist() == [[True] * len(text) + [False] * more]


def test_epochs_and_seeds_differ_in_order() -> None:
    lengths = [1 + index % 50 for index in range(400)]
    orders = [epoch_batches(lengths, 8, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))


def test_the_order_within_an_epoch_does_not_go_by_length() -> None:
    lengths = [1 + index % 50 for index in range(400)]
    longest = [max(lengths[index] for index in batch) for batch in epoch_batches(lengths, 8, 1, 0)]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


def test_like_lengths_share_a_batch() -> None:
    rng = random.Random(0)
    lengths = [min(256, round(rng.lognormvariate(2.5, 0.8)) + 1) for _ in range(5000)]
    bucketed, as_they_come = (
        sum(len(batch) * max(lengths[index] for index in batch) for batch in batches) - sum(lengths)
        for batches in (
            epoch_batches(lengths, 32, 0, 0),
            [list(range(start, min(start + 32, 5000))) for start in range(0, 5000, 32)],
        )
    )
    assert bucketed < as_they_come / 8


@given(st.lists(st.lists(st.integers(1, 4095), min_size=1, max_size=20), min_size=1, max_size=8))
def test_padding_keeps_every_token_and_marks_the_rest(texts: list[list[int]]) -> None:
    ids_BL, mask_BL = pad(texts)
    assert (mask_BL is None) == (len({len(text) for text in texts}) == 1)
    assert ids_BL.dtype == torch.int64
    assert ids_BL.shape == (len(texts), max(map(len, texts)))
    mask_BL = torch.ones_like(ids_BL, dtype=torch.bool) if mask_BL is None else mask_BL
    for text, ids_L, mask_L in zip(texts, ids_BL, mask_BL, strict=True):
        assert ids_L[mask_L].tolist() == text
        assert mask_L.tolist() == [True] * len(text) + [False] * (ids_BL.shape[1] - len(text))
        assert (ids_L[~mask_L] == PAD_ID).all()
