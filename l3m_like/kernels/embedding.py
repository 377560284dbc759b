"""Rows of a table, as ``torch.nn.functional.embedding`` looks them up, with a backward pass that adds the gradients of each row
in the order of its tokens: in float32, rounded once, the same bits every time.

torch's backward also sorts the tokens, and makes three passes. Here the program of a row's first token finds the others behind it
and adds them all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from l3m_like.kernels.launch import jit, power_of_2, tl, triton, use_triton

_COLUMNS = 1024
#: tokens of a row that are added at a time
_TOKENS = 16
#: and by one program: a row of more (a mask token, padding) is added in pieces
_SPAN = 256


def embedding(ids: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """``weight[ids]``: ids int64 [...], weight [V, D] -> [..., D]. The two backends differ in the backward pass."""
    if use_triton("embedding", backend, weight) and torch.is_grad_enabled() and weight.requires_grad:
        return _Embedding.apply(ids, weight)
    return F.embedding(ids, weight)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = len(weight)
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        return None, embedding_gradient(grad, ids, ctx.rows)


def embedding_gradient(grad: Tensor, ids: Tensor, rows: int) -> Tensor:
    """The table's gradient [rows, D] in the dtype of ``grad`` [..., D], that of ``table[ids]``; ids int64 [...]. Rows that nobody
    looked up have 0."""
    grad = grad.reshape(ids.numel(), grad.shape[-1]).contiguous()
    out = grad.new_zeros(rows, grad.shape[1])
    if grad.is_meta or not grad.numel():
        return out
    ids, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(ids, ids, right=True)
    width = grad.shape[1]
    columns = min(_COLUMNS, power_of_2(width))
    sizes = {"D": width, "TOKENS": _TOKENS, "SPAN": _SPAN, "COLUMNS": columns, "num_warps": 8}
    spans, programs = triton.cdiv(len(ids), _SPAN), triton.cdiv(width, columns)
    pieces = torch.empty(spans, width, dtype=torch.float32, device=grad.device)
    if spans > 1:
        _piece_kernel[(spans - 1, programs)](grad, ids, order, ends, pieces, **sizes)
    _gradient_kernel[(len(ids), programs)](grad, ids, order, ends, pieces, out, **sizes)
    return out


@jit
def _sum(grad, order, first, end, columns, D: tl.constexpr, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the gradients of the tokens at ``first`` .. ``end`` in the order of rows; at least one."""
    total = tl.load(grad + tl.load(order + first) * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    for start in range(first + 1, end, TOKENS):
        places = start + tl.arange(0, TOKENS)
        tokens = tl.load(order + places, mask=places < end, other=0)
        inside = (places < end)[:, None] & (columns < D)[None, :]
        more = tl.load(grad + tokens[:, None] * D + columns[None, :], mask=inside, other=0.0)
        total += tl.sum(more.to(tl.float32), axis=0)
    return total


@jit
def _piece_kernel(  # type: ignore[no-untyped-def]
    grad, ids, order, ends, pieces, D: tl.constexpr, TOKENS: tl.constexpr, SPAN: tl.constexpr, COLUMNS: tl.constexpr
):
    """Of a span of SPAN tokens, those of the row that the span before ends with."""
    span = tl.program_id(0) + 1
    first = span * SPAN
    if tl.load(ids + first) == tl.load(ids + first - 1):
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        end = tl.minimum(tl.load(ends + first), first + SPAN)
        total = _sum(grad, order, first, end, columns, D, TOKENS)
        tl.store(pieces + span * D + columns, total, mask=columns < D)


@jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    grad, ids, order, ends, pieces, out, D: tl.constexpr, TOKENS: tl.constexpr, SPAN: tl.constexpr, COLUMNS: tl.constexpr
):
    """A row whose first token this is: its tokens up to the end of their span, and the pieces behind it."""
    first = tl.program_id(0)
    row = tl.load(ids + first)
    before = tl.load(ids + first - 1, mask=first > 0, other=-1)
    if row != before:
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        end = tl.load(ends + first)
        span = first // SPAN + 1
        total = _sum(grad, order, first, tl.minimum(end, span * SPAN), columns, D, TOKENS)
        for piece in range(span, tl.cdiv(end, SPAN)):
            total += tl.load(pieces + piece * D + columns, mask=columns < D, other=0.0)
        tl.store(out + row * D + columns, total.to(out.dtype.element_ty), mask=columns < D)
