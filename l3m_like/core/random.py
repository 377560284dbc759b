"""Randomness as a function: every draw is Philox4x32-10 of (seed, purpose, row, element).

A draw depends on nothing else: not on the batch it stands in, the process, the device or the step. So noise, times, masks
and dropped labels are the same for every data-parallel size, accumulation, worker count and resume, and agree across
tensor-parallel ranks by construction. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _mul_hi_lo(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32x32-bit product; operands and results are int64 in [0, 2^32)."""
    # int64 wraps modulo 2^64, so the bit pattern is right; the shift is arithmetic, so the mask drops the sign bits
    product = a * multiplier
    return (product >> 32) & _MASK, product & _MASK


def philox(key: tuple[int, int], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10. ``counter``: four int64 tensors in [0, 2^32) that broadcast; returns four of the same kind."""
    return _rounds(_round_keys(key), counter)


def _round_keys(key: tuple[int, int]) -> list[tuple[int, int]]:
    return [((key[0] + n * _WEYL[0]) & _MASK, (key[1] + n * _WEYL[1]) & _MASK) for n in range(10)]


def _rounds(
    keys: Sequence[Sequence[int | Tensor]] | Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``keys``: two numbers for each of ten rounds."""
    c0, c1, c2, c3 = counter
    for n in range(10):
        hi0, lo0 = _mul_hi_lo(c0, _MULTIPLIERS[0])
        hi1, lo1 = _mul_hi_lo(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ keys[n][0], lo1, hi0 ^ c3 ^ keys[n][1], lo0
    return c0, c1, c2, c3


def key_of(seed: int, purpose: str) -> tuple[int, int]:
    """The 64-bit Philox key of a run seed and a purpose (the name of what is drawn)."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def uniform_at(seed: int, purpose: str, stream: Tensor, element: Tensor) -> Tensor:
    """float64 uniforms in (0, 1) with 53 bits, for int64 ``stream`` and ``element`` numbers that broadcast together."""
    return _drawn(_uniforms, seed, purpose, stream, element)


def normal_at(seed: int, purpose: str, stream: Tensor, element: Tensor) -> Tensor:
    """float64 standard normals (Box-Muller), for int64 ``stream`` and ``element`` numbers that broadcast together."""
    return _drawn(_normals, seed, purpose, stream, element)


def _uniforms(keys: Any, stream: Tensor, element: Tensor) -> Tensor:
    high, low, _, _ = _rounds(keys, _counter(stream, element))
    return _to_uniform(high, low)


def _normals(keys: Any, stream: Tensor, element: Tensor) -> Tensor:
    a, b, c, d = _rounds(keys, _counter(stream, element))
    radius = torch.sqrt(-2.0 * torch.log(_to_uniform(a, b)))
    return radius * torch.cos(2.0 * math.pi * _to_uniform(c, d))


def _drawn(draw: Callable[..., Tensor], seed: int, purpose: str, stream: Tensor, element: Tensor) -> Tensor:
    """On a GPU as one kernel, where Triton is there: operation by operation, a draw is 150 of them."""
    if stream.is_cuda and not torch.compiler.is_compiling() and _HAS_TRITON:
        with torch.no_grad():
            return _fused(draw)(_keys_on(stream.device, seed, purpose), stream, element)
    return draw(_round_keys(key_of(seed, purpose)), stream, element)


@functools.cache
def _fused(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(draw, dynamic=True)


@functools.lru_cache(maxsize=256)
def _keys_on(device: torch.device, seed: int, purpose: str) -> Tensor:
    """[10, 2] int64: as numbers, they would be compiled in."""
    return torch.tensor(_round_keys(key_of(seed, purpose)), device=device)


def _counter(stream: Tensor, element: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stream, element = torch.broadcast_tensors(stream, element)
    return element & _MASK, (element >> 32) & _MASK, stream & _MASK, (stream >> 32) & _MASK


def _to_uniform(high: Tensor, low: Tensor) -> Tensor:
    bits = (high << 21) | (low >> 11)  # 53 bits
    return (bits.double() + 0.5) * 2.0**-53


def _elements(row: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return row.view(-1, 1), torch.arange(math.prod(shape), device=row.device)


def uniform(row: Tensor, shape: tuple[int, ...] = (), *, seed: int, purpose: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniforms in (0, 1) of shape [B, *shape], one stream per running row number ``row`` [B] int64."""
    return uniform_at(seed, purpose, *_elements(row, shape)).to(dtype).view(row.shape[0], *shape)


def normal(row: Tensor, shape: tuple[int, ...] = (), *, seed: int, purpose: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals of shape [B, *shape], one stream per running row number ``row`` [B] int64."""
    return normal_at(seed, purpose, *_elements(row, shape)).to(dtype).view(row.shape[0], *shape)
