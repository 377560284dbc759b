"""LayerNorm with modulation, and the gated residual before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from against import check, randn
from torch import Tensor

from l3m_like.kernels.modulated_norm import (
    gated_modulated_norm,
    gated_residual,
    modulated_norm,
    modulated_norm_and_residual,
)

DTYPES = [torch.float32, torch.float16]


def norm(x: Tensor, shift: Tensor, scale: Tensor, *, backend: str) -> Tensor:
    return modulated_norm(x, shift, scale, 1e-6, backend=backend)


def with_residual(x: Tensor, shift: Tensor, scale: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
    return modulated_norm_and_residual(x, shift, scale, 1e-6, backend=backend)


def gated_norm(
    x: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, *bias: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return gated_modulated_norm(x, gate, branch, shift, scale, 1e-6, *bias, backend=backend)


def cut(x: Tensor, branch: Tensor, modulation: Tensor, *bias: Tensor) -> list[Tensor]:
    """Vectors cut out of one tensor, as a layer does it."""
    gate, shift, scale = modulation.chunk(3, dim=-1)
    return [x, gate, branch, shift, scale, *bias]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("call", "length", "dim"), [(norm, 1, 24), (norm, 19, 72), (with_residual, 19, 72), (with_residual, 5, 1152)]
)
def test_norm(call: Callable[..., Any], length: int, dim: int, dtype: torch.dtype) -> None:
    x = randn(2, length, dim) + 3  # a mean that must be taken out
    check(call, [x, randn(2, 1, dim), randn(2, 1, dim, seed=1)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("length", "dim", "biased"), [(19, 24, False), (150, 40, True), (5, 1152, True)])
def test_norm_after_a_gated_residual(length: int, dim: int, biased: bool, dtype: torch.dtype) -> None:
    inputs = [randn(2, length, dim), randn(2, length, dim, seed=1), randn(2, 1, 3 * dim)]
    check(gated_norm, inputs + [randn(dim)] * biased, dtype, view=cut)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_gated_residual(biased: bool, dtype: torch.dtype) -> None:
    inputs = [randn(3, 37, 24), randn(3, 1, 24), randn(3, 37, 24, seed=1)]
    check(gated_residual, inputs + [randn(24)] * biased, dtype)


def test_strides() -> None:
    inputs = [randn(2, 5, 72), randn(2, 40, 5), randn(2, 120, 1), randn(80)]
    check(gated_norm, inputs, view=lambda x, branch, m, bias: cut(x[..., 8:48], branch.mT, m.mT, bias[::2]))


def test_another_shape_of_modulation_is_left_to_torch() -> None:
    x, shift, scale = randn(2, 5, 8).float(), randn(2, 5, 8).float(), randn(2, 5, 8, seed=1).float()
    assert torch.equal(norm(x, shift, scale, backend="triton"), norm(x, shift, scale, backend="torch"))
    assert with_residual(x, shift, scale, backend="triton")[1] is x
