"""Linear maps of groups of rows: the rows of group e are multiplied by matrix e (the experts of a mixture).

``x`` [N, K] sorted by group; ``weight`` [E, O, K]; ``ends`` int32 [E]: group e is the rows from ``ends[e - 1]`` (0 for the first)
up to ``ends[e]``; the last is N. Groups may be empty. Nothing of a shape depends on ``ends``.

On CUDA in bfloat16 the three products (forward, and two backward) are torch's grouped GEMM, which reads ``ends`` on the device.
Elsewhere it is a loop over the groups, which is the definition; it reads ``ends`` on the host, so an accelerator waits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l3m_like.core.errors import UserError

#: operators of our own, so that a compiled graph holds the loop as one node
_LIBRARY = torch.library.Library("l3m_like_grouped", "DEF")
_LIBRARY.define("rows(Tensor x, Tensor weight, Tensor ends) -> Tensor")
_LIBRARY.define("outer(Tensor grad, Tensor x, Tensor ends) -> Tensor")


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``out[i] = weight[group of i] @ x[i]``, [N, O] (shapes: see the module's docstring)."""
    return _GroupedLinear.apply(x, weight, ends)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return _times(x, weight.mT, ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = _times(grad, weight, ends) if ctx.needs_input_grad[0] else None
        grad_weight = _outer(grad, x, ends) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


def _times(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [N, K], weight [E, K, O] -> [N, O]."""
    if _has_gemm(x, weight):
        return torch._grouped_mm(x, weight, offs=ends)
    return torch.ops.l3m_like_grouped.rows(x, weight, ends)


def _outer(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """grad [N, O], x [N, K] -> [E, O, K], the sum of a group's outer products."""
    if _has_gemm(grad, x):
        return torch._grouped_mm(grad.mT, x, offs=ends)
    return torch.ops.l3m_like_grouped.outer(grad, x, ends)


def _has_gemm(a: Tensor, b: Tensor) -> bool:
    """Rows of 16 bytes are what the grouped GEMM can load."""
    aligned = all(size % 8 == 0 for size in (a.shape[-1], *b.shape[-2:][b.dim() == 2 :]))
    return a.device.type in ("cuda", "meta") and a.dtype == b.dtype == torch.bfloat16 and aligned


def rows_reference(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The definition of the first product: x [N, K], weight [E, K, O] -> [N, O]."""
    return torch.cat([part @ matrix for part, matrix in zip(x.split(_sizes(ends)), weight.unbind(), strict=True)])


def outer_reference(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """The definition of the weights' gradient: grad [N, O], x [N, K] -> [E, O, K]."""
    sizes = _sizes(ends)
    return torch.stack([g.mT @ part for g, part in zip(grad.split(sizes), x.split(sizes), strict=True)])


def _sizes(ends: Tensor) -> list[int]:
    if ends.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UserError(
            "experts in this dtype read the sizes of their groups on the host, which a CUDA graph cannot hold: generate in "
            "bfloat16, or without compile."
        )
    borders = [0, *ends.tolist()]
    return [end - start for start, end in zip(borders, borders[1:], strict=False)]


def _rows_shape(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


def _outer_shape(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])


_LIBRARY.impl("rows", rows_reference, "CompositeExplicitAutograd")
_LIBRARY.impl("outer", outer_reference, "CompositeExplicitAutograd")
_LIBRARY.impl("rows", _rows_shape, "Meta")
_LIBRARY.impl("outer", _outer_shape, "Meta")
