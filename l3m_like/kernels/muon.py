"""What Muon does to a matrix besides orthogonalising it: one pass before and one after, over all matrices of a shape at once.

Bytes per element, with bf16 gradients and a bf16 copy of the weight: ``momentum_pass`` 12 (the gradient, the momentum twice, the
update), ``apply_pass`` 12 (the update, the weight twice, its copy), and ``scaled``
(``scale.py``), which Newton-Schulz starts with, 4.

Gradients, weights and copies lie where autograd and the model have put them. The kernels find them by a table of addresses, so
that a launch is one of a batch and not of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from l3m_like.kernels.launch import jit, tl, triton
from l3m_like.kernels.table import addresses

_BLOCK = 4096


def momentum_pass_reference(
    grads: Sequence[Tensor | None],
    momentum: Tensor,
    *,
    mu: float,
    nesterov: bool,
    dtype: torch.dtype,
    split: int = 1,
    grad_scale: Tensor | None = None,
    found_inf: Tensor,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition; arguments and result as ``momentum_pass``. No host sync."""
    bad = found_inf.bool()
    update = torch.empty_like(momentum)
    for to, grad in zip(update, grads, strict=True):
        to.zero_() if grad is None else to.copy_(grad)
    if grad_scale is not None:
        update.div_(grad_scale)
    update.masked_fill_(bad, 0.0)
    momentum.mul_(torch.full((), mu, dtype=momentum.dtype, device=momentum.device).masked_fill(bad, 1.0)).add_(update)
    update = update.add_(momentum, alpha=mu) if nesterov else momentum.clone()
    update = update.to(dtype) if out is None else out.copy_(update)
    parts = update.unflatten(1, (split, -1)).flatten(0, 1)
    wide = torch.promote_types(dtype, torch.float32)
    return parts, torch.linalg.vector_norm(parts, dim=(1, 2), keepdim=True, dtype=wide)


def momentum_pass(
    grads: Sequence[Tensor | None],
    momentum: Tensor,
    *,
    mu: float,
    nesterov: bool,
    dtype: torch.dtype,
    split: int = 1,
    grad_scale: Tensor | None = None,
    found_inf: Tensor,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``M = mu M + G`` in place, and what is to be orthogonalised: ``G + mu M``, or M.

    Args:
        grads: N of [rows, cols], any floating-point dtype; None counts as zeros.
        momentum: [N, rows, cols], float32, contiguous.
        dtype: of the update.
        split: parts of the rows that are orthogonalised apart.
        grad_scale: device scalar that gradients are divided by.
        found_inf: device scalar; where it is 1, the momentum stays and the results are not written: they are any numbers.
        out: [N, rows, cols] of ``dtype``, contiguous: where the update is written. None: a new tensor.

    Returns:
        The update [N * split, rows / split, cols], and the Frobenius norm of its parts [N * split, 1, 1], float32.
    """
    count, rows, cols = momentum.shape
    there = [grad.contiguous() for grad in grads if grad is not None]
    kinds = {grad.dtype for grad in there}
    if len(kinds) > 1:  # some were summed in float32, others came once
        there = [grad.float() for grad in there]
    left = iter(there)
    table, aligned = addresses([None if grad is None else next(left) for grad in grads], momentum.device)
    size = rows // split * cols
    update = torch.empty(momentum.shape, dtype=dtype, device=momentum.device) if out is None else out
    update = update.view(count * split, rows // split, cols)
    squares = torch.empty(count * split, triton.cdiv(size, _BLOCK), dtype=torch.float32, device=momentum.device)
    _muon_momentum_kernel[(squares.shape[1], count * split)](
        table,
        there[0] if there else momentum,
        momentum,
        update,
        squares,
        momentum if grad_scale is None else grad_scale,
        found_inf,
        size,
        split,
        mu,
        SCALED=grad_scale is not None,
        NESTEROV=nesterov,
        ALIGNED=aligned,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    return update, squares.sum(1).sqrt_().view(-1, 1, 1)


def apply_pass_reference(
    weights: Sequence[Tensor],
    update: Tensor,
    *,
    rate: float,
    decay: float,
    found_inf: Tensor,
    copies: Sequence[Tensor | None],
) -> None:
    """The definition; arguments as ``apply_pass``. No host sync."""
    bad = found_inf.bool()
    for weight, part, copy in zip(weights, update, copies, strict=True):
        weight.mul_(torch.full((), 1.0 - decay, dtype=weight.dtype, device=weight.device).masked_fill(bad, 1.0))
        weight.add_(part.to(weight.dtype).masked_fill(bad, 0.0), alpha=-rate)
        if copy is not None:
            copy.copy_(weight)


def apply_pass(
    weights: Sequence[Tensor],
    update: Tensor,
    *,
    rate: float,
    decay: float,
    found_inf: Tensor,
    copies: Sequence[Tensor | None],
) -> None:
    """``W = (1 - decay) W - rate update`` in place; autograd's version counters do not move.

    Args:
        weights: N of [rows, cols], float32, contiguous.
        update: [N, rows, cols], any floating-point dtype, contiguous.
        found_inf: device scalar; where it is 1, nothing changes.
        copies: of the weights, all in one dtype, contiguous; they take the new ones.
    """
    there = [copy for copy in copies if copy is not None]
    assert len({copy.dtype for copy in there}) <= 1
    table, aligned = addresses([*weights, *copies], update.device)
    size = weights[0].numel()
    _muon_apply_kernel[(triton.cdiv(size, _BLOCK), len(weights))](
        table,
        weights[0],
        there[0] if there else weights[0],
        update,
        found_inf,
        size,
        rate,
        decay,
        COPIED=bool(there),
        ALIGNED=aligned,
        BLOCK=_BLOCK,
        num_warps=8,
    )


@jit
def _muon_momentum_kernel(  # type: ignore[no-untyped-def]
    table,
    grad_like,
    momentum,
    update,
    squares,
    grad_scale,
    found_inf,
    size,
    split,
    mu,
    SCALED: tl.constexpr,
    NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(found_inf) > 0:
        return
    part = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    address = tl.load(table + part // split)
    grad = address.to(grad_like.dtype)
    if ALIGNED:
        grad = tl.multiple_of(grad, 16)
    g = tl.load(grad + part % split * size + at, mask=inside & (address != 0), other=0.0).to(tl.float32)
    if SCALED:
        g /= tl.load(grad_scale).to(tl.float32)
    here = part * size + at
    m = mu * tl.load(momentum + here, mask=inside, other=0.0) + g
    tl.store(momentum + here, m, mask=inside)
    u = m
    if NESTEROV:
        u = g + mu * m
    u = u.to(update.dtype.element_ty)
    tl.store(update + here, u, mask=inside)
    u = u.to(tl.float32)
    # partial sums: their order is that of the elements in every step, which atomics would not keep
    tl.store(squares + part * tl.num_programs(0) + tl.program_id(0), tl.sum(u * u))


@jit
def _muon_apply_kernel(  # type: ignore[no-untyped-def]
    table,
    weight_like,
    copy_like,
    update,
    found_inf,
    size,
    rate,
    decay,
    COPIED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(found_inf) > 0:
        return
    number = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    weight = tl.load(table + number).to(weight_like.dtype)
    if ALIGNED:
        weight = tl.multiple_of(weight, 16)
    w = tl.load(weight + at, mask=inside, other=0.0)
    w -= decay * w
    w -= rate * tl.load(update + number * size + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(weight + at, w, mask=inside)
    if COPIED:
        address = tl.load(table + tl.num_programs(1) + number)
        copy = address.to(copy_like.dtype)
        if ALIGNED:
            copy = tl.multiple_of(copy, 16)
        tl.store(copy + at, w.to(copy_like.dtype.element_ty), mask=inside & (address != 0))
