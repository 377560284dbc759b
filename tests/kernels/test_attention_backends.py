"""Backends of attention agree, in values and gradients."""

from __future__ import annotations

import pytest
import torch

from l3m_like.core.errors import UserError
from l3m_like.kernels.attention import attention, resolve_attention
from l3m_like.layers import AttentionMask, lower


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kind", ["full", "causal", "prefix", "documents"])
def test_sdpa_equals_reference(kind: str, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 7, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    )
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, -1], [2, 2, 3, 3, 3, 3, 3]]) if kind == "documents" else None
    prefix = torch.tensor([3, 5]) if kind == "prefix" else None
    mask = AttentionMask("causal" if kind == "documents" else kind, ids, prefix_lengths=prefix)
    results = []
    for backend in ("reference", "sdpa"):
        lowered = lower(mask, backend, 7, 7, q.device)
        out = attention(q, k, v, lowered.allowed, lowered.causal, backend=backend)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        results.append((out, *torch.autograd.grad((out * weight).sum(), (q, k, v))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_names() -> None:
    assert resolve_attention("auto") == "sdpa" and resolve_attention("reference") == "reference"
    with pytest.raises(UserError, match="Did you mean 'reference'"):
        resolve_attention("referense")
