"""Tensors times a number that is on the device, in one pass, in another dtype too: Newton-Schulz begins with it, and gradients of
a vocabulary end with it. torch makes two passes, or one of mixed dtypes, which is slow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from l3m_like.kernels.launch import jit, tl, triton

_BLOCK = 4096


def scaled_reference(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The definition; arguments and result as ``scaled``."""
    return (x.to(torch.promote_types(x.dtype, factor.dtype)) * factor).to(dtype)


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``x * factor``, rounded once.

    Args:
        x: [N, ...], contiguous, of a dtype up to float32; N at most 65535.
        factor: a number for each of the N, or a scalar; float32.

    Returns:
        Tensor like ``x``, in ``dtype``.
    """
    out = torch.empty_like(x, dtype=dtype)
    if x.numel():
        size = x[0].numel()
        _scale_kernel[(triton.cdiv(size, _BLOCK), x.shape[0])](
            x, factor, out, size, EACH=factor.numel() > 1, BLOCK=_BLOCK, num_warps=8
        )
    return out


@jit
def _scale_kernel(x, factor, out, size, EACH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    number = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = number * size + at
    by = tl.load(factor + number) if EACH else tl.load(factor)
    value = tl.load(x + here, mask=at < size, other=0.0).to(tl.float32) * by
    tl.store(out + here, value.to(out.dtype.element_ty), mask=at < size)
