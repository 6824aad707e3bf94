"""Texts of like length in one batch, in an order that the seed and the epoch alone decide."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from training.tokenizer import PAD_ID

BATCHES_PER_BUCKET = 50


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Every index once, in shuffled batches whose texts are close in length.

    Shuffles, sorts within buckets of 50 batches, cuts, and shuffles the batches: little padding, yet no fixed order.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    span = batch_size * BATCHES_PER_BUCKET
    batches = []
    for start in range(0, len(order), span):
        bucket = sorted(order[start : start + span], key=lengths.__getitem__)
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    rng.shuffle(batches)
    return batches


def sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Every index once, shortest first: for evaluation, where the order does not matter."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def pad(ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """ids_BL (int64) and mask_BL (True at tokens), padded right to the longest; no mask where nothing is padded.

    Without a mask the attention may take its fastest kernel.
    """
    lengths = [len(row) for row in ids]
    longest = max(lengths)
    ids_BL = torch.tensor([[*row, *[PAD_ID] * (longest - len(row))] for row in ids])
    if min(lengths) == longest:
        return ids_BL, None
    return ids_BL, torch.arange(longest) < torch.tensor(lengths)[:, None]
