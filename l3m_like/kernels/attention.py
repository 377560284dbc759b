"""Scaled dot-product attention with grouped key/value heads.

Shapes: q [B, H, Sq, K]; k, v [B, Hkv, Skv, K], H a multiple of Hkv (key head j serves the query heads j*g .. j*g+g-1);
``allowed`` bool, broadcastable to [B, 1, Sq, Skv], True = may attend. Every row of ``allowed`` must allow something (the
lowering in ``layers/masks.py`` sees to that).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from l3m_like.core.errors import UserError, did_you_mean


def attention_reference(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, causal: bool) -> Tensor:
    """Plain torch, softmax in at least float32. The definition that the other backends are tested against."""
    if causal:
        raise UserError("the reference attention takes a dense mask: lower the mask for backend 'reference'.")
    batch, heads, length, width = q.shape
    q = q.unflatten(1, (k.shape[1], -1))  # [B, Hkv, G, Sq, K]: grouped, so that k and v are not repeated
    scores = torch.einsum("bhgqk,bhsk->bhgqs", q, k).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(width)
    if allowed is not None:
        scores = scores.masked_fill(~allowed.unsqueeze(1), float("-inf"))
    weights = scores.softmax(-1).to(v.dtype)
    return torch.einsum("bhgqs,bhsk->bhgqk", weights, v).reshape(batch, heads, length, width)


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, causal: bool) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, which picks a fused kernel where there is one."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


BACKENDS = {"reference": attention_reference, "sdpa": attention_sdpa}


def resolve_attention(backend: str) -> str:
    """The name of the backend that ``backend`` ("auto" or a name) stands for."""
    if backend == "auto":
        return "sdpa"
    if backend not in BACKENDS:
        raise UserError(f"no attention backend '{backend}'. {did_you_mean(backend, ['auto', *BACKENDS])}")
    return backend


def attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, causal: bool = False, *, backend: str = "sdpa"
) -> Tensor:
    """Attention output [B, H, Sq, K] by the named backend (see the module's docstring for shapes)."""
    return BACKENDS[backend](q, k, v, allowed, causal)
