"""The parts both architectures are made of.

A tensor's name ends in its shape: B batch, L length, D width, H heads, K head width, J half of it, F feed-forward,
M the longest text, C classes, R iterations, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.ops import rms_norm, rope
from training.shapes import Pooling

ROPE_BASE = 10_000.0


def rope_tables(max_tokens: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position * base^(-2j/K): two tables (max_tokens, K/2), float32."""
    frequency_J = ROPE_BASE ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    angle_MJ = torch.arange(max_tokens, dtype=torch.float32)[:, None] * frequency_J
    return angle_MJ.cos(), angle_MJ.sin()


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = rms_norm(x, self.weight, self.eps)
        return normed


class Attention(nn.Module):
    """Bidirectional self-attention with rotary positions; one matrix makes query, key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x_BLD: Tensor, mask_B1LL: Tensor | None, cos_BLJ: Tensor, sin_BLJ: Tensor) -> Tensor:
        query_BHLK, key_BHLK, value_BHLK = (
            part_BLD.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part_BLD in self.query_key_value(x_BLD).chunk(3, dim=-1)
        )
        attended_BHLK = F.scaled_dot_product_attention(
            rope(query_BHLK, cos_BLJ, sin_BLJ), rope(key_BHLK, cos_BLJ, sin_BLJ), value_BHLK, attn_mask=mask_B1LL
        )
        out_BLD: Tensor = self.output(attended_BHLK.transpose(1, 2).flatten(-2))
        return out_BLD


class SwiGLU(nn.Module):
    """(silu(x W_gate) * (x W_up)) W_down; one matrix holds gate and up. Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, width: int, feed_forward: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * feed_forward, bias=False)
        self.down = nn.Linear(feed_forward, width, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        gate_BLF, up_BLF = self.gate_up(x_BLD).chunk(2, dim=-1)
        out_BLD: Tensor = self.down(F.silu(gate_BLF) * up_BLF)
        return out_BLD


class Layer(nn.Module):
    """One pre-norm Transformer layer."""

    def __init__(self, width: int, heads: int, feed_forward: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = Attention(width, heads)
        self.feed_forward_norm = RMSNorm(width)
        self.feed_forward = SwiGLU(width, feed_forward)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h_BLD: Tensor, mask_B1LL: Tensor | None, cos_BLJ: Tensor, sin_BLJ: Tensor) -> Tensor:
        h_BLD = h_BLD + self.dropout(self.attention(self.attention_norm(h_BLD), mask_B1LL, cos_BLJ, sin_BLJ))
        out_BLD: Tensor = h_BLD + self.dropout(self.feed_forward(self.feed_forward_norm(h_BLD)))
        return out_BLD


class Head(nn.Module):
    """Class scores of a text from its tokens."""

    def __init__(self, width: int, classes: int, dropout: float, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling
        self.norm = RMSNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(width, classes)

    def forward(self, h_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        pooled_BD = self.norm(h_BLD[:, 0]) if self.pooling == "first" else masked_mean(self.norm(h_BLD), mask_BL)
        logits_BC: Tensor = self.classify(self.dropout(pooled_BD))
        return logits_BC


def masked_mean(h_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
    """The mean over the tokens, (B, D)."""
    if mask_BL is None:
        return h_BLD.mean(1)
    tokens_B1 = mask_BL.sum(1, keepdim=True, dtype=h_BLD.dtype)
    # Padding's values are any: a mere product with the mask would let an infinite one through.
    return h_BLD.masked_fill(~mask_BL[:, :, None], 0).sum(1) / tokens_B1
