"""The sum of the squares of all elements of many tensors, in one launch: what the norm of a model's gradients is made of.

torch's ``_foreach_norm`` takes a launch for every few tensors, at 2.4 TB/s on an H200; this one reads at 4.6 TB/s
(docs/benchmarks.md).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from l3m_like.kernels.launch import HAS_TRITON, jit, tl
from l3m_like.kernels.table import addresses, on_device, places_of

#: elements of an iteration, and iterations of a program
_BLOCK, _ITERATIONS = 2048, 8

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def sum_of_squares_reference(tensors: Sequence[Tensor]) -> Tensor:
    """The definition: a scalar, in at least float32; ``tensors`` of one dtype. No host sync."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(list(tensors), 2.0, dtype=dtype)).square().sum()


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """The same, on a GPU by Triton; the order of its additions depends on the tensors' sizes, and on whether all of them begin at
    multiples of 16 bytes."""
    if not HAS_TRITON or tensors[0].dtype not in _DTYPES or not all(tensor.is_cuda for tensor in tensors):
        return sum_of_squares_reference(tensors)
    return squares_pass(tensors)


def squares_pass(tensors: Sequence[Tensor]) -> Tensor:
    """By Triton, whatever the device: tensors of one dtype up to float32."""
    there = [tensor.contiguous() for tensor in tensors if tensor.numel() > 0]
    device = tensors[0].device
    if not there:
        return torch.zeros((), dtype=torch.float32, device=device)
    numbers = tuple(tensor.numel() for tensor in there)
    sizes, places = _layout(numbers, device)
    table, aligned = addresses(there, device)
    parts = torch.empty(len(places), dtype=torch.float32, device=device)
    _squares_kernel[(len(places),)](
        table,
        sizes,
        places,
        there[0],
        parts,
        ALIGNED=aligned and not any(number % 16 for number in numbers),
        BLOCK=_BLOCK,
        ITERATIONS=_ITERATIONS,
        num_warps=8,
    )
    return parts.sum()


@functools.lru_cache(maxsize=16)
def _layout(numbers: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The sizes on the device, and what each program takes."""
    sizes = on_device(torch.tensor(numbers, dtype=torch.int64), device)
    return sizes, places_of(numbers, _BLOCK * _ITERATIONS, device)


@jit
def _squares_kernel(  # type: ignore[no-untyped-def]
    table, sizes, places, like, parts, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, ITERATIONS: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    number = tl.load(places + 2 * program).to(tl.int64)
    x = tl.load(table + number).to(like.dtype)
    size = tl.load(sizes + number)
    if ALIGNED:
        x, size = tl.multiple_of(x, 16), tl.multiple_of(size, 16)  # the mask, too, keeps loads narrow
    at = tl.load(places + 2 * program + 1).to(tl.int64) * (BLOCK * ITERATIONS) + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in tl.static_range(ITERATIONS):
        part = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
        total += part * part
        at += BLOCK
    tl.store(parts + program, tl.sum(total, axis=0))
