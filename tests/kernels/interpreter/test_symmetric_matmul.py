"""Products with a symmetric result."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from l3m_like.kernels import symmetric_matmul as module
from l3m_like.kernels.symmetric_matmul import symmetric_matmul, symmetric_matmul_reference

#: largest error, as a part of the largest value
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(ours: Tensor, exact: Tensor) -> None:
    assert ours.shape == exact.shape
    assert float((ours.double() - exact).abs().max()) <= TOLERANCE[ours.dtype] * float(exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
# one block, an even and an odd number of them, edges inside of blocks, a depth that is no multiple of anything
@pytest.mark.parametrize(("rows", "depth"), [(32, 32), (20, 7), (64, 96), (96, 64), (70, 40), (130, 33)])
def test_equals_the_definition(rows: int, depth: int, dtype: torch.dtype) -> None:
    x, other = randn(2, rows, depth).to(dtype), randn(2, rows, rows, seed=1).to(dtype)
    add = other + other.mT
    check(symmetric_matmul(x, x), symmetric_matmul_reference(x.double(), x.double()))
    out = symmetric_matmul(x, x, alpha=0.3, add=add, beta=-0.7, diagonal=2.0)
    check(out, symmetric_matmul_reference(x.double(), x.double(), alpha=0.3, add=add.double(), beta=-0.7, diagonal=2.0))
    check(out, (0.3 * x.double() @ x.double().mT - 0.7 * add.double() + 2 * torch.eye(rows)))


def test_columns_of_a_tall_matrix() -> None:
    """A transposed view: nothing is copied."""
    x = randn(2, 70, 40).half()
    check(symmetric_matmul(x.mT, x.mT), x.double().mT @ x.double())
    other = randn(2, 70, 80).half()[:, :, ::2]
    check(symmetric_matmul(other.mT, other.mT), other.double().mT @ other.double())


def test_matrices_that_commute() -> None:
    x = randn(3, 50, 80)
    a = x @ x.mT / 80
    p = 3 * torch.eye(50) - a + 0.5 * a @ a
    check(symmetric_matmul(p.float(), a.float()), p @ a)


def test_what_is_below_the_diagonal_is_mirrored() -> None:
    """A product that is not symmetric: nothing but the upper blocks is computed."""
    a, b = randn(1, 64, 32).float(), randn(1, 64, 32, seed=1).float()
    out = symmetric_matmul(a, b)
    assert torch.equal(out[:, 32:, :32], out[:, :32, 32:].mT)
    torch.testing.assert_close(out[:, :32, 32:], (a @ b.mT)[:, :32, 32:])


@pytest.mark.parametrize("config", [config for _, config in module.CONFIGS], ids=str)
def test_every_configuration(config: tuple[int, ...]) -> None:
    x = randn(1, 150, 70).half()
    with mock.patch.object(module, "CONFIGS", ((0, config),)):
        check(symmetric_matmul(x, x), symmetric_matmul_reference(x.double(), x.double()))
