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

import torch
from torch import Tensor

#: ``kernels.random`` of the config that was built last. Of the whole process: initial weights, blocks and samplers draw, and the
#: numbers are the same either way
_version = "auto"
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
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(c0, _MULTIPLIERS[0])
        hi1, lo1 = _mul_hi_lo(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def key_of(seed: int, purpose: str) -> tuple[int, int]:
    """The 64-bit Philox key of a run seed and a purpose (the name of what is drawn)."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def uniform_at(seed: int, purpose: str, stream: Tensor, element: Tensor) -> Tensor:
    """float64 uniforms in (0, 1) with 53 bits, for int64 ``stream`` and ``element`` numbers that broadcast together."""
    if _has_kernel(stream):
        return _on_gpu(seed, purpose, stream, element, normal=False)
    high, low, _, _ = philox(key_of(seed, purpose), _counter(stream, element))
    return _to_uniform(high, low)


def normal_at(seed: int, purpose: str, stream: Tensor, element: Tensor) -> Tensor:
    """float64 standard normals (Box-Muller), for int64 ``stream`` and ``element`` numbers that broadcast together."""
    if _has_kernel(stream):
        return _on_gpu(seed, purpose, stream, element, normal=True)
    a, b, c, d = philox(key_of(seed, purpose), _counter(stream, element))
    radius = torch.sqrt(-2.0 * torch.log(_to_uniform(a, b)))
    return radius * torch.cos(2.0 * math.pi * _to_uniform(c, d))


def draw_by(version: str) -> None:
    """From here on a draw on a GPU is one Triton kernel ("triton"; "auto" where there is Triton) or operations of torch."""
    global _version
    _version = version


def _has_kernel(stream: Tensor) -> bool:
    return stream.is_cuda and _version != "torch" and _HAS_TRITON and not torch.compiler.is_compiling()


def _on_gpu(seed: int, purpose: str, stream: Tensor, element: Tensor, *, normal: bool) -> Tensor:
    from l3m_like.core.philox import drawn

    return drawn(_key_on(stream.device, seed, purpose), stream, element, normal=normal)


@functools.lru_cache(maxsize=1024)
def _key_on(device: torch.device, seed: int, purpose: str) -> Tensor:
    """[2] int64 on ``device``: a number would be copied there, or compiled in."""
    return torch.tensor(key_of(seed, purpose), device=device)


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
