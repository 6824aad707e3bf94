"""RMSNorm and RoPE as torch custom operators of our own domain, `refrain`.

They are opaque to the exporter on purpose: each becomes one node (`refrain::RMSNorm`, `refrain::RoPE`) of the ONNX
graph, where a decomposed norm would be a dozen that no runtime fuses again.
"""

import torch
from torch import Tensor


@torch.library.custom_op("refrain::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square layer norm over the last axis: x / sqrt(mean(x^2) + eps) * weight.

    x (..., D), weight (D,) -> (..., D) in x's dtype; computed in float32 at least. Zhang and Sennrich 2019,
    arXiv 1910.07467.
    """
    wide = _widen(x)
    return (wide * _inverse_rms(wide, eps) * weight.to(wide.dtype)).to(x.dtype).contiguous()


@torch.library.custom_op("refrain::rope", mutates_args=())
def rope(x_BHLK: Tensor, cos_BLJ: Tensor, sin_BLJ: Tensor) -> Tensor:
    """Rotary position embedding, halves layout (not interleaved), J = K / 2; output in x's dtype.

    At text b, position l, the pair (x[j], x[j + J]) turns by the angle whose cosine and sine stand in row (b, l).
    Su et al. 2021, arXiv 2104.09864.
    """
    return _rotate(x_BHLK, cos_BLJ, sin_BLJ)


def _widen(x: Tensor) -> Tensor:
    """float32, or float64 where x is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _inverse_rms(wide: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def _rotate(x_BHLK: Tensor, cos_BLJ: Tensor, sin_BLJ: Tensor) -> Tensor:
    a_BHLJ, b_BHLJ = x_BHLK.chunk(2, dim=-1)
    cos_B1LJ, sin_B1LJ = cos_BLJ[:, None], sin_BLJ[:, None]
    rotated = torch.cat([a_BHLJ * cos_B1LJ - b_BHLJ * sin_B1LJ, b_BHLJ * cos_B1LJ + a_BHLJ * sin_B1LJ], dim=-1)
    return rotated.to(x_BHLK.dtype)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@rope.register_fake
def _(x_BHLK: Tensor, cos_BLJ: Tensor, sin_BLJ: Tensor) -> Tensor:
    return torch.empty_like(x_BHLK, memory_format=torch.contiguous_format)


def _rms_norm_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch types neither
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_backward(ctx, grad):  # type: ignore[no-untyped-def]  # torch types neither
    """With n = x * r, r = 1/rms: d/dx = r * (g w - n * mean(g w n)), d/dweight = sum(g n)."""
    x, weight = ctx.saved_tensors
    wide, grad = _widen(x), _widen(grad)
    r = _inverse_rms(wide, ctx.eps)
    n = wide * r
    gw = grad * weight.to(wide.dtype)
    grad_x = r * (gw - n * (gw * n).mean(-1, keepdim=True))
    grad_weight = (grad * n).reshape(-1, len(weight)).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def _rope_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch types neither
    _, cos_BLJ, sin_BLJ = inputs
    ctx.save_for_backward(cos_BLJ, sin_BLJ)


def _rope_backward(ctx, grad):  # type: ignore[no-untyped-def]  # torch types neither
    """A rotation's transpose is the rotation by the opposite angle."""
    cos_BLJ, sin_BLJ = ctx.saved_tensors
    return _rotate(grad, cos_BLJ, -sin_BLJ), None, None


rms_norm.register_autograd(_rms_norm_backward, setup_context=_rms_norm_context)
rope.register_autograd(_rope_backward, setup_context=_rope_context)
