"""Rows of other ranks, with gradients: what losses over the whole batch need.

Every rank computes the loss of its own rows. What it took from another rank's rows has a gradient there, so the backward pass
sends it back; a gather without that trains towards another minimum, in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(rows: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """``rows`` [B, ...] of all ranks of ``groups``, the first varying fastest: [B * ranks, ...]. B is the same on all of them."""
    return _Gather.apply(rows, tuple(groups)) if groups else rows


def pass_rows_on(rows: Tensor, ranks: Sequence[int], place: int) -> Tensor:
    """Send ``rows`` to the rank after this one (``ranks[place]``) in the circle of ``ranks``; returns what the one before sends,
    which has the same shape."""
    return _Pass.apply(rows, tuple(ranks), place) if len(ranks) > 1 else rows


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, groups: tuple[Any, ...]) -> Tensor:
        ctx.groups = groups
        for group in groups:  # the inner axis first, so that rows come in the order of dp_rank
            whole = rows.new_empty(rows.shape[0] * group.size(), *rows.shape[1:])
            dist.all_gather_into_tensor(whole, rows.contiguous(), group=group)
            rows = whole
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        for group in reversed(ctx.groups):
            own = grad.new_empty(grad.shape[0] // group.size(), *grad.shape[1:])
            dist.reduce_scatter_tensor(own, grad.contiguous(), group=group)
            grad = own
        return grad, None


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: tuple[int, ...], place: int) -> Tensor:
        ctx.ranks, ctx.place = ranks, place
        return _exchange(rows, ranks[(place + 1) % len(ranks)], ranks[place - 1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ranks, place = ctx.ranks, ctx.place
        return _exchange(grad, ranks[place - 1], ranks[(place + 1) % len(ranks)]), None, None


def _exchange(rows: Tensor, to: int, source: int) -> Tensor:
    received = torch.empty_like(rows, memory_format=torch.contiguous_format)
    sends = [dist.P2POp(dist.isend, rows.contiguous(), to), dist.P2POp(dist.irecv, received, source)]
    for request in dist.batch_isend_irecv(sends):
        request.wait()
    return received
