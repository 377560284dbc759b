"""Draws on a GPU in one kernel: the numbers of ``random.py``, where a draw is 150 operations.

Imported where a draw is on a GPU, as Triton takes seconds to import.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def drawn(keys: Tensor, stream: Tensor, element: Tensor, *, normal: bool) -> Tensor:
    """float64 uniforms, or normals, for ``keys`` [2] and int64 ``stream`` and ``element``, all on one device, that broadcast."""
    stream, element = torch.broadcast_tensors(stream, element)
    out = torch.empty(stream.shape, dtype=torch.float64, device=stream.device)
    if out.numel() > 0:
        grid = (triton.cdiv(out.numel(), _BLOCK),)
        _kernel[grid](keys, stream.contiguous(), element.contiguous(), out, out.numel(), NORMAL=normal, BLOCK=_BLOCK)
    return out


@triton.jit
def _kernel(keys, streams, elements, out, size, NORMAL: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    stream = tl.load(streams + at, mask=inside, other=0)
    element = tl.load(elements + at, mask=inside, other=0)
    k0, k1 = tl.load(keys).to(tl.uint32), tl.load(keys + 1).to(tl.uint32)
    c0, c1 = element.to(tl.uint32), (element >> 32).to(tl.uint32)
    c2, c3 = stream.to(tl.uint32), (stream >> 32).to(tl.uint32)
    first = tl.full([BLOCK], 0xD2511F53, tl.uint32)
    second = tl.full([BLOCK], 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, first), c0 * first
        high1, low1 = tl.umulhi(c2, second), c2 * second
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += tl.full([], 0x9E3779B9, tl.uint32)
        k1 += tl.full([], 0xBB67AE85, tl.uint32)
    number = _uniform(c0, c1)
    if NORMAL:
        # a literal would be rounded to float32
        turn = tl.full([BLOCK], 6.283185307179586, tl.float64)
        number = tl.sqrt(-2 * tl.log(number)) * tl.cos(turn * _uniform(c2, c3))
    tl.store(out + at, number, mask=inside)


@triton.jit
def _uniform(high, low):  # type: ignore[no-untyped-def]
    bits = (high.to(tl.int64) << 21) | (low >> 11).to(tl.int64)
    return (bits.to(tl.float64) + 0.5) * 1.1102230246251565e-16  # 2^-53
