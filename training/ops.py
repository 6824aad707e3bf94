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
    return (wide * _inverse_rms(wide, eps)).mul_(weight).to(x.dtype).contiguous()


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
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # reads once, where square and mean also write
    return torch.rsqrt(norm.square() / wide.shape[-1] + eps)


def _rotate(x_BHLK: Tensor, cos_BLJ: Tensor, sin_BLJ: Tensor) -> Tensor:
    a_BHLJ, b_BHLJ = _widen(x_BHLK).chunk(2, dim=-1)  # once: a product of two types costs twice as much
    cos_B1LJ, sin_B1LJ = (table_BLJ[:, None].to(a_BHLJ.dtype) for table_BLJ in (cos_BLJ, sin_BLJ))
    rotated_BHLK = torch.empty_like(x_BHLK, memory_format=torch.contiguous_format)
    c_BHLJ, d_BHLJ = rotated_BHLK.chunk(2, dim=-1)
    c_BHLJ.copy_((a_BHLJ * cos_B1LJ).addcmul_(b_BHLJ, sin_B1LJ, value=-1))
    d_BHLJ.copy_((b_BHLJ * cos_B1LJ).addcmul_(a_BHLJ, sin_B1LJ))
    return rotated_BHLK


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
    """With r = 1/rms: d/dx = r * (g w - x * r^2 * mean(g w x)), d/dweight = sum(g x r)."""
    x, weight = ctx.saved_tensors
    wide, grad = _widen(x), _widen(grad)
    r = _inverse_rms(wide, ctx.eps)
    gx_ND = (grad * wide).reshape(-1, len(weight))
    grad_weight = r.reshape(-1) @ gx_ND
    mean = (gx_ND @ weight.to(wide.dtype)).reshape(r.shape) / len(weight)
    grad_x = (wide * (-mean * r.square())).addcmul_(grad, weight.to(wide.dtype)).mul_(r)
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
