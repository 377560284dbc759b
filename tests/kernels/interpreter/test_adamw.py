"""The AdamW kernel against its definition."""

from __future__ import annotations

import pytest
import torch

from l3m_like.kernels.adamw import AdamWTable, Weight, adamw_reference

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = ((3, 1001), (5,), (4, 8), (2, 2048))  # several blocks and none that is full, few elements, whole blocks


def weights(steps: int, copied: bool) -> list[Weight]:
    generator = torch.Generator().manual_seed(steps)
    made = []
    for shape in SHAPES:
        weight, exp_avg = (torch.randn(shape, generator=generator) for _ in range(2))
        copy = torch.zeros(shape, dtype=torch.float16) if copied else None
        made.append(Weight(weight, exp_avg, torch.rand(shape, generator=generator), torch.tensor(float(steps)), copy))
    return made


@pytest.mark.parametrize("half", [torch.float32, torch.float16])
@pytest.mark.parametrize("steps", [0, 1, 1000])
def test_equals_the_definition(steps: int, half: torch.dtype) -> None:
    ours = weights(steps, copied=half == torch.float16)
    exact = [Weight(*(x.double() for x in (w.weight, w.exp_avg, w.exp_avg_sq, w.step))) for w in ours]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(shape, generator=generator).to(half) for shape in SHAPES]
    given = [*grads[:2], None, grads[3]]
    untouched = ours[2].weight.clone()
    scale = torch.tensor(1.7)
    AdamWTable(ours).step(given, grad_scale=scale, found_inf=torch.zeros(()), **SETTINGS)
    adamw_reference(exact, given, grad_scale=scale.double(), **SETTINGS)
    for a, b in zip(ours, exact, strict=True):
        for x, y in ((a.weight, b.weight), (a.exp_avg, b.exp_avg), (a.exp_avg_sq, b.exp_avg_sq)):
            torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=1e-7)
        assert float(a.step) == float(b.step)
    assert torch.equal(ours[2].weight, untouched) and [float(w.step) - steps for w in ours] == [1, 1, 0, 1]
    if half == torch.float16:
        assert all(torch.equal(w.copy, w.weight.half()) for number, w in enumerate(ours) if number != 2)


def test_the_definition_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, 7, generator=generator, dtype=torch.float64))
    ours, moments = weight.detach().clone(), [torch.zeros_like(weight) for _ in range(2)]
    step = torch.zeros(())
    optimizer = torch.optim.AdamW([weight], **SETTINGS)
    for count in range(3):
        weight.grad = torch.randn(5, 7, generator=generator, dtype=torch.float64)
        adamw_reference([Weight(ours, *moments, step)], [weight.grad], **SETTINGS)
        optimizer.step()
        assert float(step) == count + 1
        torch.testing.assert_close(ours, weight.detach(), rtol=1e-14, atol=1e-14)


def test_a_bad_step_changes_nothing() -> None:
    ours, before = weights(3, copied=False), weights(3, copied=False)
    AdamWTable(ours).step([torch.ones(shape) for shape in SHAPES], found_inf=torch.ones(()), **SETTINGS)
    for a, b in zip(ours, before, strict=True):
        assert torch.equal(a.weight, b.weight) and torch.equal(a.exp_avg, b.exp_avg) and torch.equal(a.exp_avg_sq, b.exp_avg_sq)
        assert float(a.step) == 3
