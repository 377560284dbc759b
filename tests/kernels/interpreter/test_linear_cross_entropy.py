"""The Triton steps of the linear cross-entropy against the definition."""

from __future__ import annotations

import pytest
import torch

from l3m_like.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("uniform", [True, False])
def test_equals_the_definition(uniform: bool, dtype: torch.dtype, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    # several blocks, the last one cut
    monkeypatch.setattr("l3m_like.kernels.linear_cross_entropy._block", lambda size, most: most // 1024)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 37, (2, 9), generator=generator)
    targets[0, :5] = -100
    hidden, weight = (torch.randn(*shape, generator=generator).to(dtype).double() for shape in ((2, 9, 8), (37, 8)))
    scale = torch.ones(2, 9) if uniform else torch.linspace(-1, 2, 18).view(2, 9)
    results = []
    for kind in (dtype, torch.float64):
        leaves = [x.to(kind).requires_grad_() for x in (hidden, weight)]
        if kind == dtype:
            both = linear_cross_entropy(*leaves, targets, softcap=softcap, normalizer=True, chunk_tokens=5, backend="triton")
        else:
            both = linear_cross_entropy_reference(*leaves, targets, softcap=softcap)
        total = both[0].sum() if uniform else (both[0] * scale).sum() + both[1].square().sum()
        results.append([x.detach().double() for x in (*both, *torch.autograd.grad(total, leaves))])
    limit = 1e-5 if dtype == torch.float32 else 4e-3
    for a, b in zip(*results, strict=True):
        assert float((a - b).abs().max()) <= limit * float(b.abs().max())
