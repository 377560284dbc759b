"""Rotary positions and the norm over heads."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from against import check, randn
from torch import Tensor

from l3m_like.kernels.rope import joint_qk_norm_rope, qk_norm_rope

DTYPES = [torch.float32, torch.float16]


def tables(rows: int, length: int, width: int) -> tuple[Tensor, Tensor]:
    """Not only those of rotary positions: both halves differ."""
    return randn(rows, length, width).float(), randn(rows, length, width, seed=1).float()


def rope(q: Tensor, k: Tensor, *, backend: str, cos: Tensor, sin: Tensor) -> Any:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return qk_norm_rope(q, k, cos.to(dtype), sin.to(dtype), None, None, 1e-5, backend=backend)


def norm(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *, backend: str) -> Any:
    return qk_norm_rope(q, k, None, None, q_weight, k_weight, 1e-5, backend=backend)


def norm_rope(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *, backend: str, cos: Tensor, sin: Tensor) -> Any:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return qk_norm_rope(q, k, cos.to(dtype), sin.to(dtype), q_weight, k_weight, 1e-5, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "heads", "kv_heads", "width"), [(1, 4, 2, 16), (2, 3, 1, 12), (1, 2, 2, 72)])
def test_norm_and_rope(rows: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> None:
    cos, sin = tables(rows, 3, width)
    inputs = [randn(2, 3, heads, width), randn(2, 3, kv_heads, width), randn(width), randn(width, seed=1)]
    check(partial(norm_rope, cos=cos, sin=sin), inputs, dtype)
    check(partial(rope, cos=cos, sin=sin), inputs[:2], dtype)
    check(norm, inputs, dtype)


def fused(qkv: Tensor, *weights: Tensor) -> list[Tensor]:
    """Views of one projection's result [B, S, (3 + 1 + 1) * 12]."""
    q, k, _ = qkv.split([36, 12, 12], dim=-1)
    return [q.unflatten(-1, (3, 12)), k.unflatten(-1, (1, 12)), *weights]


def transposed(q: Tensor, k: Tensor, *weights: Tensor) -> list[Tensor]:
    return [q.transpose(1, 2), k.transpose(1, 2), *weights]


def test_strides() -> None:
    cos, sin = tables(1, 4, 12)
    check(partial(norm_rope, cos=cos, sin=sin), [randn(2, 4, 60), randn(12), randn(12, seed=1)], view=fused)
    check(partial(rope, cos=cos, sin=sin), [randn(2, 4, 60)], view=fused)
    inputs = [randn(2, 3, 4, 12), randn(2, 1, 4, 12), randn(12), randn(12, seed=1)]
    check(partial(norm_rope, cos=cos, sin=sin), inputs, view=transposed)


def test_gradients_as_attention_gives_them() -> None:
    """Results are read as [B, H, S, K], and so are the strides of their gradients."""

    def call(*args: Tensor, backend: str) -> Any:
        cos, sin = tables(1, 4, 12)
        q, k = norm_rope(*args, backend=backend, cos=cos, sin=sin)
        return q.transpose(1, 2) * 1, k.transpose(1, 2) * 1

    check(call, [randn(2, 4, 3, 12), randn(2, 4, 1, 12), randn(12), randn(12, seed=1)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("copies", [1, 3])
def test_joint(copies: int, normed: bool, rotated: bool, dtype: torch.dtype) -> None:
    """Queries, keys and values of one tensor, with one gradient; the last dimension is cut from something wider. Of several
    copies, each has another gradient."""
    cos, sin = tables(1, 5, 12)

    def call(qkv: Tensor, *weights: Tensor, backend: str) -> Any:
        wide = torch.promote_types(qkv.dtype, torch.float32)
        turns = (cos.to(wide), sin.to(wide)) if rotated else (None, None)
        norms = weights or (None, None)
        q, k, v = joint_qk_norm_rope(qkv[..., :12], 2, *turns, *norms, 1e-5, copies=copies, backend=backend)
        assert k.dim() == v.dim() == (4 if copies == 1 else 5)
        return q.transpose(1, 2) * 1, k.transpose(-3, -2) * 1, v.transpose(-3, -2) * 1

    check(call, [randn(2, 5, 3 + 2 + 2, 16), *((randn(12), randn(12, seed=1)) if normed else ())], dtype)


def test_neither() -> None:
    q, k = randn(1, 2, 1, 4).float(), randn(1, 2, 1, 4, seed=1).float()
    assert qk_norm_rope(q, k, None, None, None, None, 1e-6, backend="triton") == (q, k)
