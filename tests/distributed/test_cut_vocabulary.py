"""The linear cross-entropy with its vocabulary cut over ranks equals the whole one, value and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import pool


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 12, (2, 9), generator=generator)
    targets[0, :4] = -100
    hidden, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 9, 5), (12, 5)))
    return hidden, weight, targets


def losses(hidden: Tensor, weight: Tensor, targets: Tensor, uniform: bool, **cut: Any) -> list[Tensor]:
    from l3m_like.kernels.linear_cross_entropy import linear_cross_entropy

    hidden.requires_grad_()
    weight.requires_grad_()
    nll, norm = linear_cross_entropy(hidden, weight, targets, normalizer=True, softcap=3.0, chunk_tokens=7, **cut)
    scale = torch.linspace(-1, 2, 18, dtype=torch.float64).view(2, 9)
    total = nll.sum() if uniform else (nll * scale).sum() + norm.square().sum()
    return [x.detach() for x in (nll, norm, *torch.autograd.grad(total, (hidden, weight)))]


def on_a_rank(uniform: bool) -> list[Tensor]:
    import torch.distributed as dist

    from l3m_like.distributed.mesh import build_mesh

    group = build_mesh({"tp": 2})["tp"].get_group()
    hidden, weight, targets = inputs()
    return losses(hidden, weight.chunk(2)[dist.get_rank()].clone(), targets, uniform, group=group)


@pytest.mark.parametrize("uniform", [True, False])
def test_equals_the_whole_vocabulary(uniform: bool) -> None:
    ranks = pool.run(2, on_a_rank, uniform)
    whole = losses(*inputs(), uniform)
    for nll, norm, grad_hidden, _ in ranks:
        for ours, theirs in zip((nll, norm, grad_hidden), whole, strict=False):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.cat([rank[3] for rank in ranks]), whole[3], rtol=1e-12, atol=1e-13)
    with pytest.raises(AssertionError):  # a rank's own part of the gradient is not the whole
        torch.testing.assert_close(torch.cat([ranks[0][3], ranks[0][3]]), whole[3], rtol=1e-12, atol=1e-13)
