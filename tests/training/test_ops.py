"""The custom operators: right against the plain formula, differentiable, and as torch demands of an operator."""

from typing import Any

import pytest
import torch
from torch import Tensor

from training.ops import rms_norm, rope

EPS = 1e-6


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def plain_rope(x_BHLK: Tensor, cos_BLJ: Tensor, sin_BLJ: Tensor) -> Tensor:
    """The rotation as a product of complex numbers."""
    half = x_BHLK.shape[-1] // 2
    turned = torch.complex(x_BHLK[..., :half], x_BHLK[..., half:]) * torch.complex(cos_BLJ, sin_BLJ)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def rms_arguments(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, float]:
    x, weight = normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype)
    return x.requires_grad_(), weight.requires_grad_(), EPS


def rope_arguments(
    *shape: int, dtype: torch.dtype = torch.float64, table_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, length, width = shape
    angle_BLJ = normal(batch, length, width // 2) * 3
    cos_BLJ, sin_BLJ = angle_BLJ.cos().to(table_dtype or dtype), angle_BLJ.sin().to(table_dtype or dtype)
    return normal(*shape, dtype=dtype).requires_grad_(), cos_BLJ, sin_BLJ


def heads_apart(x_BHLK: Tensor) -> Tensor:
    """The same numbers, laid out as attention has them: one matrix of all heads, seen through a transpose."""
    return x_BHLK.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("shape", [(8,), (1, 6), (3, 5, 16), (2, 4, 7, 32)])
def test_rms_norm_is_the_formula(shape: tuple[int, ...]) -> None:
    arguments = rms_arguments(*shape)
    torch.testing.assert_close(rms_norm(*arguments), plain_rms_norm(*arguments), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 5, 8), (3, 2, 1, 16)])
def test_rope_is_a_rotation_of_pairs(shape: tuple[int, ...]) -> None:
    x, cos, sin = rope_arguments(*shape)
    torch.testing.assert_close(rope(x, cos, sin), plain_rope(x, cos, sin), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rope(x, cos, sin).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_out_as_it_went_in_and_is_rounded_once(dtype: torch.dtype) -> None:
    x, weight, _ = rms_arguments(3, 64, dtype=dtype)
    exact = plain_rms_norm(x.float(), weight.float(), EPS)
    torch.testing.assert_close(rms_norm(x, weight, EPS), exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
    q, cos, sin = rope_arguments(2, 3, 5, 16, dtype=dtype, table_dtype=torch.float32)
    turned = rope(q, cos, sin)
    assert turned.dtype == dtype
    torch.testing.assert_close(turned, plain_rope(q.float(), cos, sin).to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def test_rms_norm_of_large_half_precision_numbers_does_not_overflow() -> None:
    x = torch.full((2, 8), 60_000.0, dtype=torch.float16)
    torch.testing.assert_close(rms_norm(x, torch.ones(8), EPS), torch.ones(2, 8, dtype=torch.float16))


@pytest.mark.parametrize("shape", [(6,), (3, 5), (2, 3, 4)])
def test_rms_norm_has_the_right_gradient(shape: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, EPS), rms_arguments(*shape)[:2])


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 2, 3, 4)])
def test_rope_has_the_right_gradient(shape: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(rope, rope_arguments(*shape))


def test_gradients_come_in_the_parameters_own_precision() -> None:
    x = normal(4, 8, dtype=torch.bfloat16).requires_grad_()
    weight = torch.ones(8, requires_grad=True)
    rms_norm(x, weight, EPS).float().square().sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        pytest.param(rms_norm, rms_arguments(8), id="rms-1d"),
        pytest.param(rms_norm, rms_arguments(2, 3, 8, dtype=torch.float32), id="rms-3d"),
        pytest.param(rms_norm, (heads_apart(normal(2, 3, 5, 8)), normal(8), EPS), id="rms-transposed"),
        pytest.param(rms_norm, rms_arguments(3, 8, dtype=torch.bfloat16), id="rms-bf16"),
        pytest.param(rope, rope_arguments(2, 3, 5, 8, dtype=torch.float32), id="rope"),
        pytest.param(rope, (heads_apart(normal(2, 3, 5, 8)), *rope_arguments(2, 3, 5, 8)[1:]), id="rope-transposed"),
        pytest.param(rope, rope_arguments(2, 3, 5, 8, dtype=torch.bfloat16, table_dtype=torch.float32), id="rope-bf16"),
    ],
)
def test_the_operators_keep_what_torch_expects_of_one(op: Any, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(op, arguments)
