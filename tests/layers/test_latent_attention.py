"""Latent attention: cached = whole, packed = apart, widths of values; the reference class is in tests/parity."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from l3m_like.blocks import Transformer
from l3m_like.core.errors import UserError
from l3m_like.kernels.attention import LoweredMask, attention
from l3m_like.layers import LatentAttention, LoRALinear, Rope, SwiGLU, TransformerLayer

D, H = 32, 4
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 1.0}


def trunk_of(q_rank: int | None = 12, v_dim: int = 6, backend: str = "auto") -> Transformer:
    mixer = partial(
        LatentAttention, num_heads=H, kv_rank=10, nope_dim=6, rope_dim=4, v_dim=v_dim, q_rank=q_rank, rope_scaling=YARN,
        backend=backend,
    )  # fmt: skip
    trunk = Transformer(D, 2, partial(TransformerLayer, mixer=mixer, mlp=partial(SwiGLU, hidden_dim=24)), Rope(4, 1e4, YARN))
    generator = torch.Generator().manual_seed(0)
    for name, p in trunk.named_parameters():
        noise = torch.randn(p.shape, generator=generator) * 0.3
        p.data = (noise + 1 if "norm" in name else noise).double()
    return trunk


def tokens_of(rows: int, length: int) -> Tensor:
    return torch.randn(rows, length, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("q_rank", [None, 12])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_cached_equals_whole(q_rank: int | None, backend: str) -> None:
    """Several tokens at first, then a few, then one at a time; the later ones are scored between latents."""
    trunk, x = trunk_of(q_rank, backend=backend), tokens_of(2, 9)
    with torch.no_grad():
        whole = trunk.compute(x)
        cache = trunk.make_cache(2, 9)
        parts = [trunk.compute(part, cache=cache) for part in x.split([4, 3, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-12)
    held = cache.layers[0]
    assert held is not None and held.k is not None and held.v is not None
    assert held.k.shape == (2, 9, 1, 10) and held.v.shape == (2, 9, 1, 4)  # 14 numbers per token, not 2 * 4 * 10


def test_cached_equals_whole_with_adapters() -> None:
    """Between latents the matrix of kv_up is read, not called."""
    trunk, x = trunk_of(), tokens_of(2, 5)
    for layer in trunk.layers:
        adapter = LoRALinear(layer.mixer.kv_up, rank=2, alpha=4.0)
        for p in (adapter.lora_a, adapter.lora_b):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        layer.mixer.kv_up = adapter
    with torch.no_grad():
        cache = trunk.make_cache(2, 5)
        parts = [trunk.compute(part, cache=cache) for part in x.split([2, 1, 1, 1], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), trunk.compute(x), rtol=1e-10, atol=1e-12)


def test_cached_rows_padded_on_the_left() -> None:
    trunk, x = trunk_of(), tokens_of(1, 5)
    padded = torch.cat((tokens_of(1, 2), x), dim=1)
    ids = torch.tensor([[-1, -1, 0, 0, 0, 0, 0]])
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        whole = trunk.compute(x)
        cache = trunk.make_cache(1, 7)
        out = [trunk.compute(padded[:, at], positions[:, at], ids[:, at], cache=cache) for at in (slice(0, 5), slice(5, 7))]
    torch.testing.assert_close(torch.cat(out, 1)[:, 2:], whole, rtol=1e-10, atol=1e-12)


def test_packed_equals_apart() -> None:
    trunk, x = trunk_of(), tokens_of(1, 9)
    ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1, -1]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 0]])
    packed = trunk.compute(x, positions, ids)
    for at in (slice(0, 4), slice(4, 7)):
        torch.testing.assert_close(packed[:, at], trunk.compute(x[:, at]), rtol=1e-10, atol=1e-12)


def test_values_are_padded_for_kernels_of_one_width(monkeypatch: pytest.MonkeyPatch) -> None:
    from l3m_like.kernels import attention as kernel

    q, k, v = (torch.randn(2, 5, 3, width, dtype=torch.float64) for width in (8, 8, 6))
    wanted = attention(q, k, v)

    def one_width(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask) -> Tensor:
        assert v.shape == k.shape
        return kernel.BACKENDS["sdpa"](q, k, v, mask)

    monkeypatch.setitem(kernel.BACKENDS, "flash", one_width)
    torch.testing.assert_close(attention(q, k, v, LoweredMask("flash")), wanted)


def test_flops_by_hand() -> None:
    queries = 2 * (D * 12 + 12 * H * 10)
    keys = 2 * (D * (10 + 4) + 10 * H * (6 + 6))
    assert trunk_of().layers[0].mixer.flops(7, 20) == 7 * (queries + keys + 2 * H * 6 * D) + 2 * 20 * H * (10 + 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rope_dim": 3}, "even"), ({"v_dim": 20}, "above nope_dim"), ({"kv_rank": 0}, "at least 1")],
)
def test_wrong_settings(settings: dict[str, int], message: str) -> None:
    sizes = {"num_heads": 2, "kv_rank": 4, "nope_dim": 4, "rope_dim": 4, "v_dim": 4} | settings
    with pytest.raises(UserError, match=message):
        LatentAttention(8, **sizes)


def test_the_rope_must_have_the_rotated_width() -> None:
    mixer = partial(LatentAttention, num_heads=2, kv_rank=4, nope_dim=4, rope_dim=4, v_dim=4)
    layer = partial(TransformerLayer, mixer=mixer, mlp=partial(SwiGLU, hidden_dim=8))
    with pytest.raises(UserError, match="rope_dim is 4"):
        Transformer(8, 1, layer, Rope(8, 1e4))
    with pytest.raises(UserError, match="needs rotary positions"):
        Transformer(8, 1, layer).compute(torch.randn(1, 3, 8))
