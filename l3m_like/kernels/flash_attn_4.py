"""FlashAttention-4 (the package flash-attn-4, ``flash_attn.cute``) as operations that torch.compile takes whole.

q [B, S, H, K], k and v [B, S, Hkv, K], fp16 or bf16; with borders of documents [B * S, H, K]. Its kernels are compiled at their
first call (about 10 s each).

Where query heads share a key head, the package's backward pass adds up their gradients of keys and values in float32 in memory,
with a pass to zero that and two to round it, and takes longer than over as many heads that have keys of their own. So keys and
values may be given as copies [copies, B, S, Hkv, K] of one memory (``copies_for``): a pass for each, over one query head of every
key head, writes the gradients of that copy.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
import math
from typing import Any

import torch
from torch import Tensor

from l3m_like.kernels.launch import multiprocessors

log = logging.getLogger(__name__)


@functools.cache
def is_installed() -> bool:
    """Whether the package is there; it need not be usable."""
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except (ImportError, AttributeError):  # no flash_attn at all, or one that does not import
        return False


@torch.compiler.assume_constant_result
def takes(device: torch.device) -> bool:
    """Whether it runs on ``device``: Hopper and the Blackwell of data centres. On other Blackwells (12.x) the backward pass of
    4.0.0b16 fails. (Traced, this would break graphs: it looks for packages.)"""
    if device.type != "cuda" or not is_installed() or not 9 <= torch.cuda.get_device_capability(device)[0] <= 11:
        return False
    return _package() is not None


def flash_attention_4(
    q: Tensor, k: Tensor, v: Tensor, *, borders: Tensor | None = None, longest: int = 0, causal: bool, window: tuple[int, int]
) -> Tensor:
    """Attention in the shape of ``q``, scores scaled by 1 / sqrt(K). Without borders, ``k`` and ``v`` may be copies.

    Args:
        borders: int32 [N + 1]: where documents begin and end in B * S, none longer than ``longest``.
        causal: a query sees no later key.
        window: how many keys to the left and right of its own place a query sees; -1: no bound.
    """
    if borders is None:
        return _attention(q, k, v, None, 0, causal, *window)[0]
    flat = (x.flatten(0, 1) for x in (q, k, v))
    return _attention(*flat, borders, longest, causal, *window)[0].view(q.shape)


@torch.compiler.assume_constant_result
def copies_for(rows: int, length: int, heads: int, kv_heads: int, head_dim: int, device: torch.device) -> int:
    """How many copies of keys and values make the backward pass fastest: 2 where two query heads share a key head and the pass
    over one of both keeps the device busy (measured on an H200, with heads of 128)."""
    tiles = rows * kv_heads * math.ceil(length / 128)
    return 2 if heads == 2 * kv_heads and head_dim == 128 and tiles >= 6 * multiprocessors(device) else 1


@functools.cache
def _package() -> Any:
    """The module with the two passes; None, with a warning, where the package, which is installed, cannot be used."""
    try:
        module = importlib.import_module("flash_attn.cute.interface")
        into = inspect.signature(module._flash_attn_bwd).parameters
        if not hasattr(module, "_flash_attn_fwd") or any(name not in into for name in ("dq", "dk", "dv")):
            raise ImportError("its _flash_attn_fwd and _flash_attn_bwd are not those of 4.0.0b16")
    except Exception as error:  # noqa: BLE001  # of the compiler that it brings, too
        log.warning("flash-attn-4 is installed, but cannot be used: %s", error)
        return None
    return module


def _limits(borders: Tensor | None, longest: int, left: int, right: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "window_size_left": None if left < 0 else left,
        "window_size_right": None if right < 0 else right,
    }
    if borders is not None:
        found |= {"cu_seqlens_q": borders, "cu_seqlens_k": borders, "max_seqlen_q": longest, "max_seqlen_k": longest}
    return found


@torch.library.custom_op("l3m_like::flash_attn_4", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor | None, longest: int, causal: bool, left: int, right: int
) -> tuple[Tensor, Tensor]:
    """Attention and, float32 [B, H, S] or [H, B * S], the logarithms of the sums of exponentials."""
    limits = _limits(borders, longest, left, right)
    out, sums = _package()._flash_attn_fwd(q, *_one_copy(k, v), causal=causal, return_lse=True, **limits)
    return out, sums


@torch.library.custom_op("l3m_like::flash_attn_4_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    borders: Tensor | None,
    longest: int,
    causal: bool,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    run = functools.partial(
        _package()._flash_attn_bwd,
        causal=causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **_limits(borders, longest, left, right),
    )
    if k.dim() < 5:
        return run(q, k, v, out, grad, sums)
    grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    for copy in range(len(k)):
        heads = slice(copy, None, len(k))
        of_q, of_out, of_grad, of_grad_q = (x[:, :, heads] for x in (q, out, grad, grad_q))
        run(of_q, *_one_copy(k, v), of_out, of_grad, sums[:, heads], dq=of_grad_q, dk=grad_k[copy], dv=grad_v[copy])
    return grad_q, grad_k, grad_v


def _one_copy(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return (k[0], v[0]) if k.dim() == 5 else (k, v)


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor | None, longest: int, causal: bool, left: int, right: int
) -> tuple[Tensor, Tensor]:
    heads_first = (q.shape[0], q.shape[2], q.shape[1]) if borders is None else (q.shape[1], q.shape[0])
    return q.new_empty(q.shape), q.new_empty(heads_first, dtype=torch.float32)


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, borders, *ctx.rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, borders)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, borders = ctx.saved_tensors
    return *_attention_backward(grad.contiguous(), *tensors, borders, *ctx.rest), *[None] * 5


_attention.register_autograd(_backward, setup_context=_setup)
