"""Scaled dot-product attention with grouped key/value heads, by one of several backends.

Shapes: q [B, Sq, H, K]; k [B, Skv, Hkv, K]; v [B, Skv, Hkv, Kv], Kv at most K; H a multiple of Hkv (key head j serves the query
heads j*g .. j*g+g-1; keys are never repeated, but flash_attn may be given copies of one memory: ``key_copies``). What may
attend to what arrives as a ``LoweredMask``: the form that its backend wants, made once per forward by ``layers/masks.py``.

| backend | what it is | masks |
|---|---|---|
| reference | plain torch, softmax in at least float32: the definition | all (dense) |
| sdpa | torch's SDPA; causal without a mask, else a dense one | all (dense) |
| flash, cudnn | SDPA's fused kernels by name, fp16 and bf16 on CUDA | full, causal |
| short | cuDNN's forward and a backward of ours for short rows on Hopper (``short_attention.py``), fp16 and bf16 | full |
| varlen | FlashAttention-2 over document borders, fp16 and bf16 on CUDA | full, causal, windows, documents |
| flex | torch's FlexAttention, compiled on CUDA | all (block-sparse) |
| flash_attn | the package flash-attn-4 (Hopper, sm_100), flash_attn_interface (3) or flash-attn (2), as installed | as varlen |
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.kernels import flash_attn_4
from l3m_like.kernels.flash_attn_4 import flash_attention_4
from l3m_like.kernels.short_attention import short_attention, short_attention_takes


class LoweredMask(NamedTuple):
    """Who may attend to whom, in the form of one backend.

    ``allowed``: bool [B or 1, 1, Sq, Skv] or None (all); ``causal``: the backend's own causal rule; ``live``: bool
    [B, Sq, 1, 1], False for queries that attend to nothing (their output is set to zero), or None if there are none;
    ``cu_seqlens`` int32 [N + 1]: borders of documents over B*S, none longer than ``max_seqlen``; ``window``: how many keys
    (left, right) of its own place a query sees, -1 = no bound; ``blocks``: FlexAttention's BlockMask.
    """

    backend: str = "sdpa"
    allowed: Tensor | None = None
    causal: bool = False
    live: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    window: tuple[int, int] = (-1, -1)
    blocks: Any = None


def attention(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask | None = None) -> Tensor:
    """Attention output [B, Sq, H, Kv]; without a mask every query sees every key (shapes: see the module's docstring)."""
    mask = LoweredMask() if mask is None else mask
    narrower = q.shape[-1] - v.shape[-1]
    if narrower and mask.backend in FUSED:  # they take one width for keys and values
        out = BACKENDS[mask.backend](q, k, F.pad(v, (0, narrower)), mask)[..., :-narrower]
    else:
        out = BACKENDS[mask.backend](q, k, v, mask)
    return out if mask.live is None else torch.where(mask.live, out, 0)


def key_copies(qkv: Tensor, kv_heads: int, mask: LoweredMask | None) -> int:
    """As how many copies [copies, B, S, Hkv, K] of one memory ``attention`` had better be given the keys and values of qkv
    [B, S, H + 2 Hkv, K]; 1: as they are. Each copy has a gradient of its own: they are summed where they are read next."""
    dense = mask is not None and mask.backend == "flash_attn" and mask.cu_seqlens is None
    if not dense or not torch.is_grad_enabled() or not flash_attn_4.takes(qkv.device):
        return 1
    rows, length, heads, width = qkv.shape
    return flash_attn_4.copies_for(rows, length, heads - 2 * kv_heads, kv_heads, width, qkv.device)


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask) -> Tensor:
    if mask.causal:
        raise UserError("the reference attention takes a dense mask: lower the mask for backend 'reference'.")
    q = q.unflatten(2, (k.shape[2], -1))  # [B, Sq, Hkv, G, K]: grouped, so that k and v are not repeated
    scores = torch.einsum("bqhgk,bshk->bhgqs", q, k).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(q.shape[-1])
    if mask.allowed is not None:
        scores = scores.masked_fill(~mask.allowed.unsqueeze(1), float("-inf"))
    weights = scores.softmax(-1).to(v.dtype)
    return torch.einsum("bhgqs,bshk->bqhgk", weights, v).flatten(2, 3)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    if grouped and q.shape[1] == 1 and not mask.causal:
        # one query per head: the heads of a group are as good as queries of one head, which every kernel takes
        folded = q.reshape(q.shape[0], k.shape[2], -1, q.shape[3])
        out = F.scaled_dot_product_attention(folded, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask.allowed)
        return out.reshape(*q.shape[:3], v.shape[3])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.allowed, is_causal=mask.causal, enable_gqa=grouped)
    return out.transpose(1, 2)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    statistics = torch.is_grad_enabled()  # the logarithm of the sum, which the backward pass needs
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, statistics, 0.0, mask.causal)
    return out[0].transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=mask.causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def _short(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask) -> Tensor:
    assert not mask.causal
    return short_attention(q, k, v)


def _varlen(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    borders, longest = mask.cu_seqlens, mask.max_seqlen
    assert borders is not None
    grouped: Any = {"enable_gqa": True} if _varlen_names_gqa() else {}
    q2, k2, v2 = (x.flatten(0, 1) for x in (q, k, v))
    out: Any = varlen_attn(q2, k2, v2, borders, borders, longest, longest, window_size=mask.window, **grouped)
    return out.view(q.shape)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask) -> Tensor:
    run = _flex_attention(q.is_cuda)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return run(q, k, v, block_mask=mask.blocks, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask) -> Tensor:
    borders, longest = mask.cu_seqlens, mask.max_seqlen
    causal = mask.causal if borders is None else mask.window[1] == 0
    if flash_attn_4.takes(q.device):
        return flash_attention_4(q, k, v, borders=borders, longest=longest, causal=causal, window=mask.window)
    if borders is None:
        out = _flash_attn_package()[0](q, k, v, causal=causal)
    else:
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out = _flash_attn_package()[1](*flat, borders, borders, longest, longest, causal=causal, window_size=mask.window)
    out = out[0] if isinstance(out, tuple) else out
    return out.view(q.shape)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, LoweredMask], Tensor]] = {
    "reference": _reference,
    "sdpa": _sdpa,
    "flash": _flash,
    "cudnn": _cudnn,
    "short": _short,
    "varlen": _varlen,
    "flex": _flex,
    "flash_attn": _flash_attn,
}
#: take fp16 and bf16 on CUDA alone
FUSED = ("flash", "cudnn", "short", "varlen", "flash_attn")
#: take document borders
BORDERS = ("varlen", "flash_attn")


def check_backend(name: str) -> str:
    """``name`` if it is "auto" or a backend that this installation has."""
    if name != "auto" and name not in BACKENDS:
        raise UserError(f"no attention backend '{name}'. {did_you_mean(name, ['auto', *BACKENDS])}")
    if name == "flash_attn" and not any(importlib.util.find_spec(package) for package in _FLASH_ATTN):
        raise UserError(
            "attention backend flash_attn: the package is not installed (the extras flash4, on Hopper and sm_100, or flash of "
            "setup.py). 'auto' needs none."
        )
    return name


def short_takes(length: int, head_dim: int, grouped: bool, device: torch.device) -> bool:
    """Whether the backend "short" does full attention of rows of ``length``; ``grouped``: several queries share a key head."""
    return not grouped and cudnn_takes(head_dim, device) and short_attention_takes(length, head_dim, device)


@functools.cache
def cudnn_takes(head_dim: int, device: torch.device) -> bool:
    """Whether cuDNN's fused attention is there and fast: Hopper or newer, head widths up to 128 in steps of 8."""
    if device.type != "cuda" or not torch.backends.cudnn.is_available() or not torch.backends.cuda.cudnn_sdp_enabled():
        return False
    return head_dim % 8 == 0 and head_dim <= 128 and torch.cuda.get_device_capability(device) >= (9, 0)


def flash_attn_4_wins(rows: int, length: int, heads: int, kv_heads: int, head_dim: int, device: torch.device) -> bool:
    """Whether flash-attn-4 is there, and faster than cuDNN for so many causal rows, forward and backward: long ones, whose keys
    it is given as copies, on Hopper. In a training step that was measured with 4 rows of 4096 on an H200 alone
    (docs/benchmarks.md)."""
    if length < 4096 or not flash_attn_4.takes(device) or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    return flash_attn_4.copies_for(rows, length, heads, kv_heads, head_dim, device) > 1


_FLASH_ATTN = ("flash_attn_interface", "flash_attn")


@functools.cache
def _flash_attn_package() -> tuple[Any, Any]:
    """FlashAttention-3's functions (dense, varlen) if it is installed, else FlashAttention-2's."""
    for package in _FLASH_ATTN:
        if importlib.util.find_spec(package):
            module = importlib.import_module(package)
            if hasattr(module, "flash_attn_func"):  # flash-attn-4 alone makes a flash_attn without
                return module.flash_attn_func, module.flash_attn_varlen_func
    raise UserError("attention backend flash_attn: only flash-attn-4 is installed, which needs Hopper or sm_100 (or fails).")


def _flex_attention(compiled: bool) -> Any:
    """FlexAttention; in a unit that is compiled, it is compiled with it. Uncompiled, it would hold all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    if not compiled or torch.compiler.is_compiling():
        return flex_attention
    if "flex" not in _COMPILED:
        from torch import _dynamo

        # beyond the limit it would be uncompiled, without a word
        _dynamo.config.recompile_limit = max(_dynamo.config.recompile_limit, 64)
        _COMPILED["flex"] = torch.compile(flex_attention, dynamic=False)
    return _COMPILED["flex"]


_COMPILED: dict[str, Any] = {}


@functools.cache
def _varlen_names_gqa() -> bool:
    """torch 2.11 groups heads without being told; later it must be told. (The import takes seconds.)"""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
