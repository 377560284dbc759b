"""On an NVIDIA GPU: documents of a row never see each other, in every backend and dtype; errors against float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from l3m_like.kernels.attention import BACKENDS, attention
from l3m_like.pretrained.torchvision_ops import allow_torchvision

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["causal", "full"])
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_isolation_is_bitwise(backend: str, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    allow_torchvision()
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "parity"), *sys.path])
    from test_packing import check_isolation

    check_isolation(backend, kind, dtype, "cuda")


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_error_in_bf16(backend: str, device: torch.device) -> None:
    """Packed attention in bf16 against float64, beside that of unpacked SDPA in bf16 (at most twice as large)."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 512, 64, generator=generator, dtype=torch.float64) for heads in (8, 2, 2))
    documents = torch.arange(512).div(100, rounding_mode="floor")
    allowed = (documents[:, None] == documents[None, :]) & torch.ones(512, 512).tril().bool()

    def error(backend: str, allowed: torch.Tensor | None, causal: bool) -> float:
        mask = torch.ones(512, 512).tril().bool() if causal else allowed
        exact = attention(q, k, v, mask[None, None], backend="reference")
        half = [x.to(device, torch.bfloat16) for x in (q, k, v)]
        dense = None if causal else allowed[None, None].to(device)
        found = attention(*half, dense, causal, backend=backend)
        return float((found.cpu().double() - exact).abs().max())

    assert error(backend, allowed, False) <= 2 * error("sdpa", None, True)
