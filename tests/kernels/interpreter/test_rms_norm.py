"""RMSNorm, with and without the residual stream."""

from __future__ import annotations

import pytest
import torch
from against import check, randn
from torch import Tensor

from l3m_like.kernels.rms_norm import rms_norm, rms_norm_and_residual

DTYPES = [torch.float32, torch.float16]


def norm(x: Tensor, weight: Tensor, *, backend: str) -> Tensor:
    return rms_norm(x, weight, 1e-5, backend=backend)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
    return rms_norm(x, weight, 1e-5, residual, backend=backend)


def with_residual(x: Tensor, weight: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
    """What comes back from the stream is added to the norm's gradient."""
    normed, stream = rms_norm_and_residual(x, weight, 1e-5, backend=backend)
    return normed, stream * 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [24, 96, 128, 3000])
def test_norm(dim: int, dtype: torch.dtype) -> None:
    check(norm, [randn(3, 41 if dim < 100 else 5, dim), randn(dim)], dtype)
    check(with_residual, [randn(3, 41 if dim < 100 else 5, dim), randn(dim)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [24, 1000])
def test_norm_of_a_sum(dim: int, dtype: torch.dtype) -> None:
    check(add_norm, [randn(2, 7, dim), randn(2, 7, dim, seed=1), randn(dim)], dtype)


def test_strides() -> None:
    """Columns cut out of wider rows; neighbouring columns that are far apart."""
    check(norm, [randn(2, 5, 72), randn(40)], view=lambda x, w: (x[..., 8:48], w))
    check(norm, [randn(2, 40, 5), randn(40)], view=lambda x, w: (x.mT, w))
    check(add_norm, [randn(2, 5, 80), randn(40)], view=lambda x, w: (*x.chunk(2, -1), w))


def test_nothing() -> None:
    x, weight = torch.zeros(0, 3, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    out = norm(x, weight, backend="triton")
    out.sum().backward()
    assert out.shape == x.grad.shape == x.shape and (weight.grad == 0).all()


def test_a_stream_wider_than_the_weight() -> None:
    """float32 in the residual stream, float16 in the layer: rounded once, as the reference does."""
    x, residual, weight = randn(4, 24).half(), randn(4, 24, seed=1).float(), randn(24).half()
    for ours, theirs in zip(*(add_norm(x, residual, weight, backend=b) for b in ("triton", "torch")), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)
