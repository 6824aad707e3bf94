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


def sorted_batches(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Every index once, shortest first, as many in a batch as are so many tokens with their padding, and one at least.

    For evaluation, where the order does not matter.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= most_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def pad(ids: Sequence[Sequence[int]], length: int | None = None) -> tuple[Tensor, Tensor | None]:
    """ids_BL (int64) and mask_BL (True at tokens), padded right to the longest or to `length`.

    No mask where nothing is padded: without one the attention may take its fastest kernel.
    """
    lengths = [len(row) for row in ids]
    length = length or max(lengths)
    ids_BL = torch.tensor([[*row, *[PAD_ID] * (length - len(row))] for row in ids])
    if min(lengths) == length:
        return ids_BL, None
    return ids_BL, torch.arange(length) < torch.tensor(lengths)[:, None]


def round_up(length: int, most: int) -> int:
    """The next of the lengths that trainings use: multiples of 8 up to 128, of 16 up to 256 and so on, or `most`.

    A CPU's allocator finds room again for tensors of sizes that come again, and little among those of ever new ones.
    """
    multiple = 1 << max(3, (length - 1).bit_length() - 4)
    return min(-(-length // multiple) * multiple, most)
