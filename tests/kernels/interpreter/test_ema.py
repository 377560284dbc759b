"""The kernel of averaged weights against its definition, and the average that uses it."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from against import randn_at
from torch import Tensor, nn

from l3m_like.kernels.ema import EMATable, ema_reference
from l3m_like.training.optim import EMA, ema

GOOD, BAD = torch.zeros(()), torch.ones(())
SHAPES = ((3, 1001), (5,), (4, 8), (2, 2048))  # several blocks and none that is full, few elements, whole blocks


@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[2:]], ids=["any size", "even sizes"])
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("skipped", [None, GOOD])
def test_equals_the_definition(shapes: tuple[tuple[int, ...], ...], offset: int, skipped: Tensor | None) -> None:
    averages, weights = ([randn_at(shape, 10 * i + j, offset) for j, shape in enumerate(shapes)] for i in range(2))
    exact = [average.double() for average in averages]
    table = EMATable(averages, weights)
    assert table.aligned == (shapes != SHAPES and not offset)
    before = [weight.clone() for weight in weights]
    for _ in range(3):
        table.update(0.9, skipped)
        ema_reference(exact, weights, 0.9, skipped)
    for average, wanted in zip(averages, exact, strict=True):
        torch.testing.assert_close(average.double(), wanted, rtol=1e-6, atol=1e-7)
    assert all(map(torch.equal, weights, before))


@pytest.mark.parametrize("step", [lambda *x: EMATable(*x[:2]).update(*x[2:]), ema_reference], ids=["kernel", "definition"])
def test_a_skipped_step_changes_nothing(step: object) -> None:
    averages, weights = ([randn_at(shape, i) for shape in SHAPES] for i in range(2))
    before = [average.clone() for average in averages]
    step(averages, weights, 0.9, BAD)
    assert all(map(torch.equal, averages, before))
    step(averages, weights, 0.9, GOOD)
    assert not any(map(torch.equal, averages, before))


def averaged(fused: bool) -> list[Tensor]:
    """The averages of parameters that are swapped in and out, and moved to other memory; the kernel does not take all of them."""
    dtypes = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float32)
    shapes = (*SHAPES, (0, 3))
    parameters = {
        str(i): nn.Parameter(randn_at(shape, i).to(dtype)) for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    }
    with mock.patch.object(ema, "takes", lambda weight: fused and weight.dtype == torch.float32):
        average, seen, kept = EMA(parameters, 0.7), [], []
        for step in range(6):
            for i, parameter in enumerate(parameters.values()):
                parameter.data.copy_(randn_at(parameter.shape, 10 * step + i))
            average.update(torch.tensor(float(step == 3)))
            seen.append([table for _, table in average._tables])
            if step == 1:
                average.swap()
                average.swap()
            if step == 2:
                kept = [parameter.data for parameter in parameters.values()]  # the old memory is not given to others
                parameters["1"].data = kept[1].clone()
    if fused:
        assert len(seen[0]) == 1 and seen[0] == seen[1] == seen[2] != seen[3] == seen[4] == seen[5]
        assert [name for names, _ in average._tables for name in names] == ["0", "1"]
    return [*average.average.values()]


def test_the_average_by_the_kernel_is_that_by_the_definition() -> None:
    for ours, wanted in zip(averaged(True), averaged(False), strict=True):
        assert ours.dtype == wanted.dtype
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)
