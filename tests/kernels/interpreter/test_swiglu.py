"""silu(gate) * up, of two tensors and of the halves of one."""

from __future__ import annotations

import pytest
import torch
from against import check, randn
from torch import Tensor

from l3m_like.kernels.swiglu import swiglu

DTYPES = [torch.float32, torch.float16]


def halves(both: Tensor, *, backend: str) -> Tensor:
    return swiglu(both, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [5, 256, 2100])
def test_two_tensors(width: int, dtype: torch.dtype) -> None:
    check(swiglu, [4 * randn(2, 3, width), randn(2, 3, width, seed=1)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [5, 256])
def test_halves(width: int, dtype: torch.dtype) -> None:
    check(halves, [4 * randn(2, 3, 2 * width)], dtype)


def test_strides() -> None:
    check(swiglu, [randn(2, 3, 48)], view=lambda both: both.chunk(2, -1))
    check(swiglu, [randn(2, 24, 3), randn(2, 3, 40)], view=lambda gate, up: (gate.mT, up[..., 8:32]))
    check(halves, [randn(2, 3, 60)], view=lambda both: (both[..., 4:52],))


@pytest.mark.filterwarnings("ignore:overflow")
def test_large_values() -> None:
    """No overflow where the sigmoid is 0 or 1."""
    gate = torch.tensor([-200.0, -90.0, 0.0, 90.0, 200.0], dtype=torch.float64)
    check(swiglu, [gate, torch.ones_like(gate)])


def test_nothing() -> None:
    both = torch.zeros(0, 8, requires_grad=True)
    swiglu(both, backend="triton").sum().backward()
    assert both.grad.shape == (0, 8)
