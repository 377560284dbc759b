"""Batched matrix products whose result is known to be symmetric: only the upper triangle of blocks is computed, and mirrored.

That is half of the FLOPs of ``X @ X.T``, of ``A @ A`` for a symmetric A, and of ``P @ A`` for symmetric matrices that commute:
what a Newton-Schulz iteration consists of (``newton_schulz.py``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def symmetric_matmul_reference(
    a: Tensor, b: Tensor, *, alpha: float = 1.0, add: Tensor | None = None, beta: float = 0.0, diagonal: float = 0.0
) -> Tensor:
    """The definition; arguments and result as ``symmetric_matmul``. Accumulates in at least float32."""
    wide = torch.promote_types(a.dtype, torch.float32)
    out = alpha * (a.to(wide) @ b.to(wide).mT)
    if add is not None:
        out += beta * add.to(wide)
    out += diagonal * torch.eye(a.shape[1], dtype=wide, device=a.device)
    return (out.triu() + out.triu(1).mT).to(a.dtype)


#: rows from which on -> (rows and columns of a block, depth of a step of the sum, warps, stages)
CONFIGS = ((1024, (128, 64, 8, 4)), (256, (64, 64, 4, 4)), (0, (32, 32, 4, 2)))


def symmetric_matmul(
    a: Tensor, b: Tensor, *, alpha: float = 1.0, add: Tensor | None = None, beta: float = 0.0, diagonal: float = 0.0
) -> Tensor:
    """``alpha * a @ b.mT + beta * add + diagonal * I`` where that is symmetric.

    Args:
        a, b: [N, rows, depth], of any strides and one dtype (float16, bfloat16 or float32): the same tensor twice, or symmetric
            matrices that commute.
        add: symmetric [N, rows, rows], contiguous, same dtype.

    Returns:
        [N, rows, rows] in the dtype of ``a``, accumulated in float32 and rounded once; exactly symmetric outside of the blocks on
        the diagonal.
    """
    batch, rows, depth = a.shape
    block, deep, warps, stages = next(config for least, config in CONFIGS if rows >= least)
    out = torch.empty(batch, rows, rows, dtype=a.dtype, device=a.device)
    tiles = triton.cdiv(rows, block)
    _kernel[((tiles + 1) // 2 * (tiles + 1), batch)](
        a,
        b,
        out if add is None else add,
        out,
        rows,
        depth,
        *a.stride(),
        *b.stride(),
        alpha,
        beta,
        diagonal,
        ADD=add is not None,
        WHOLE=depth % deep == 0,
        BLOCK=block,
        DEEP=deep,
        num_warps=warps,
        num_stages=stages,
    )
    return out


@triton.jit
def _kernel(
    a,
    b,
    add,
    out,
    rows,
    depth,
    a_number,
    a_row,
    a_deep,
    b_number,
    b_row,
    b_deep,
    alpha,
    beta,
    diagonal,
    ADD: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEEP: tl.constexpr,
):
    # the triangle of T (T + 1) / 2 blocks as a rectangle: line r holds row r of the triangle, then row T - 1 - r
    tiles = tl.cdiv(rows, BLOCK)
    line = tl.program_id(0) // (tiles + 1)
    place = tl.program_id(0) % (tiles + 1)
    second = place >= tiles - line
    if second & (line == tiles - 1 - line):
        return  # an odd T: the middle line has no second row
    i = tl.where(second, tiles - 1 - line, line)
    j = tl.where(second, place - 1, line + place)  # T - 1 - r + (place - (T - r))

    number = tl.program_id(1).to(tl.int64)
    row = i * BLOCK + tl.arange(0, BLOCK)
    column = j * BLOCK + tl.arange(0, BLOCK)
    inner = tl.arange(0, DEEP)
    # beyond the edge a row is read again; what comes of it is not stored
    left = a + number * a_number + (row % rows)[:, None] * a_row + inner[None, :] * a_deep
    right = b + number * b_number + (column % rows)[None, :] * b_row + inner[:, None] * b_deep
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, depth, DEEP):
        if WHOLE:
            x, y = tl.load(left), tl.load(right)
        else:
            x = tl.load(left, mask=inner[None, :] < depth - start, other=0.0)
            y = tl.load(right, mask=inner[:, None] < depth - start, other=0.0)
        total = tl.dot(x, y, total, input_precision="ieee")
        left += DEEP * a_deep
        right += DEEP * b_deep

    total = total * alpha
    inside = (row[:, None] < rows) & (column[None, :] < rows)
    base = number * rows * rows
    here = base + row[:, None] * rows + column[None, :]
    if ADD:
        total += beta * tl.load(add + here, mask=inside, other=0.0).to(tl.float32)
    total += tl.where(row[:, None] == column[None, :], diagonal, 0.0)
    value = total.to(out.dtype.element_ty)
    tl.store(out + here, value, mask=inside)
    if i != j:
        mirrored = base + column[:, None] * rows + row[None, :]
        tl.store(out + mirrored, tl.trans(value), mask=(column[:, None] < rows) & (row[None, :] < rows))
