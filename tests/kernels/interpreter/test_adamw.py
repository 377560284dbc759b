"""The AdamW kernel against its definition."""

from __future__ import annotations

import pytest
import torch

from l3m_like.kernels.adamw import adamw, adamw_reference

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("half", [torch.float32, torch.float16])
@pytest.mark.parametrize("steps", [0, 1, 1000])
def test_equals_the_definition(steps: int, half: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(steps)
    shape = (3, 1001)  # more than a block, and no whole number of them
    weight, exp_avg = (torch.randn(shape, generator=generator) for _ in range(2))
    exp_avg_sq, grad = torch.rand(shape, generator=generator), torch.randn(shape, generator=generator).to(half)
    step, scale = torch.tensor(float(steps)), torch.tensor(1.7)
    ours = [weight, exp_avg, exp_avg_sq]
    exact = [x.double() for x in ours]
    copy = torch.zeros(shape, dtype=torch.float16)
    adamw(*ours[:1], grad, *ours[1:], step, grad_scale=scale, found_inf=torch.zeros(()), copy=copy, **SETTINGS)
    adamw_reference(*exact[:1], grad, *exact[1:], step, grad_scale=scale.double(), **SETTINGS)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-7)
    assert torch.equal(copy, weight.half())


def test_the_definition_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, 7, generator=generator, dtype=torch.float64))
    ours, moments = weight.detach().clone(), [torch.zeros_like(weight) for _ in range(2)]
    optimizer = torch.optim.AdamW([weight], **SETTINGS)
    for count in range(3):
        weight.grad = torch.randn(5, 7, generator=generator, dtype=torch.float64)
        adamw_reference(ours, weight.grad, *moments, torch.tensor(float(count)), **SETTINGS)
        optimizer.step()
        torch.testing.assert_close(ours, weight.detach(), rtol=1e-14, atol=1e-14)


def test_a_bad_step_changes_nothing() -> None:
    tensors = [torch.randn(10) for _ in range(4)]
    before = [x.clone() for x in tensors]
    adamw(*tensors, torch.zeros(()), found_inf=torch.ones(()), **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
