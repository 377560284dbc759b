"""GELU of a linear map, with the gradient of its bias."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from against import check, randn

from l3m_like.kernels.gelu import linear_gelu


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("tanh", [True, False], ids=["tanh", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("width", [5, 700])
def test_linear_gelu(width: int, dtype: torch.dtype, tanh: bool) -> None:
    check(partial(linear_gelu, tanh=tanh), [3 * randn(2, 7, 3), randn(width, 3), randn(width)], dtype)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("tanh", [True, False], ids=["tanh", "exact"])
def test_large_values(tanh: bool) -> None:
    x = torch.tensor([[-300.0], [-30.0], [0.0], [30.0], [300.0]], dtype=torch.float64)
    check(partial(linear_gelu, tanh=tanh), [x, torch.ones(3, 1, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)])


def test_nothing() -> None:
    x, weight, bias = torch.zeros(0, 8), torch.zeros(4, 8), torch.zeros(4, requires_grad=True)
    linear_gelu(x, weight, bias, tanh=True, backend="triton").sum().backward()
    assert bias.grad is not None and not bias.grad.any()
