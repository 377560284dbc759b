"""The kernel of the gradients' norm against its definition."""

from __future__ import annotations

import pytest
import torch
from against import randn_at

from l3m_like.kernels.squares import squares_pass, sum_of_squares, sum_of_squares_reference

#: less than a block, blocks with a rest, several programs, nothing, one element
SHAPES = ((3, 100), (5, 2001), (0, 4), (2, 17_001), (1,))
EVEN = ((4, 8), (2, 16_384), (32, 16))


@pytest.mark.parametrize("shapes", [SHAPES, EVEN], ids=["any size", "even sizes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0, 3])
def test_equals_the_definition(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, offset: int) -> None:
    tensors = [randn_at(shape, seed, offset).to(dtype) for seed, shape in enumerate(shapes)]
    wanted = sum(float(tensor.double().square().sum()) for tensor in tensors)
    found, torchs = squares_pass(tensors), sum_of_squares_reference(tensors)
    assert found.dtype == torchs.dtype == torch.float32 and found.shape == torchs.shape == ()
    assert float(found) == pytest.approx(wanted, rel=1e-6)
    assert float(torchs) == pytest.approx(wanted, rel=1e-5)  # on a CPU torch adds half precision up one by one
    assert torch.equal(squares_pass(tensors), found) and torch.equal(sum_of_squares(tensors), torchs)


def test_columns_and_nothing() -> None:
    wide = randn_at((6, 50), 0)
    assert float(squares_pass([wide[:, 3:20], wide.T])) == pytest.approx(
        float(wide[:, 3:20].square().sum() + wide.square().sum()), rel=1e-6
    )
    assert float(squares_pass([torch.empty(0, 3)])) == 0
    assert not squares_pass([torch.tensor([1.0, float("inf")])]).isfinite()
