"""One AdamW step of many tensors (Loshchilov and Hutter, arXiv:1711.05101), in one launch and one pass over their memory.

Beyond torch's fused AdamW: gradients may be in half precision, and are not written back when they are scaled; half-precision
copies of the weights are written in the same pass. With bf16 copies that is 28 bytes per weight, where torch's kernel, clipping
and the casts of weights and gradients take 48. Tensors lie where autograd and the model have put them: the kernel finds them by
a table of addresses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from l3m_like.kernels.launch import jit, tl
from l3m_like.kernels.table import Table, addresses

_BLOCK = 1024


@dataclass(frozen=True)
class Weight:
    """A weight and its state, float32, contiguous, of one shape (``step``: a scalar, the steps done); ``copy``, in half
    precision, takes the new weight."""

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    copy: Tensor | None = None


def adamw_reference(
    weights: Sequence[Weight],
    grads: Sequence[Tensor | None],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """The definition, in place; arguments as ``AdamWTable.step``."""
    if found_inf is not None and bool(found_inf):
        return
    for one, grad in zip(weights, grads, strict=True):
        if grad is None:
            continue
        weight = one.weight
        grad = grad.to(weight.dtype) if grad_scale is None else grad.to(weight.dtype) / grad_scale
        count = float(one.step) + 1
        one.exp_avg.lerp_(grad, 1 - betas[0])
        one.exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
        size = (one.exp_avg_sq / (1 - betas[1] ** count)).sqrt() + eps
        weight.mul_(1 - lr * weight_decay).addcdiv_(one.exp_avg, size, value=-lr / (1 - betas[0] ** count))
        one.step.add_(1)
        if one.copy is not None:
            one.copy.copy_(weight)


class AdamWTable(Table):
    """The tensors that are stepped together. They must stay where they are; ``weights`` all have a copy of one dtype, or none.

    Loads are wide where all sizes and addresses are multiples of 16.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.weights = list(weights)
        super().__init__([(w.weight, w.exp_avg, w.exp_avg_sq, w.step, w.copy) for w in self.weights], _BLOCK)
        self.copy = self.weights[0].copy

    def step(
        self,
        grads: Sequence[Tensor | None],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Step in place by Triton, the counts of steps too; autograd's version counters do not move.

        Args:
            grads: of the weights' shapes, all in one floating-point dtype; unchanged. None: that weight is left alone.
            lr, betas, eps, weight_decay: of AdamW; the decay is multiplied by the learning rate.
            grad_scale: float32 device scalar that gradients are divided by.
            found_inf: float32 device scalar; where it is 1, nothing changes.
        """
        there = [None if grad is None else grad.contiguous() for grad in grads]
        some = next(grad for grad in there if grad is not None)
        table, aligned = addresses(there, some.device)
        _adamw_kernel[(len(self.places),)](
            self.addresses,
            table,
            self.places,
            some,
            self.weights[0].weight,
            self.weights[0].weight if self.copy is None else self.copy,
            self.weights[0].weight if grad_scale is None else grad_scale,
            self.weights[0].weight if found_inf is None else found_inf,
            lr,
            lr * weight_decay,
            BETA1=betas[0],
            BETA2=betas[1],
            LOG1=math.log(betas[0]) if betas[0] else -math.inf,
            LOG2=math.log(betas[1]) if betas[1] else -math.inf,
            EPS=eps,
            SCALED=grad_scale is not None,
            CHECKED=found_inf is not None,
            COPIED=self.copy is not None,
            ALIGNED=self.aligned and aligned,
            BLOCK=_BLOCK,
            num_warps=8,
        )
        number = len(there)
        _adamw_count_kernel[(-(-number // 1024),)](
            self.addresses,
            table,
            self.weights[0].weight,
            self.weights[0].weight if found_inf is None else found_inf,
            number,
            CHECKED=found_inf is not None,
            BLOCK=1024,
        )


@jit
def _adamw_kernel(  # type: ignore[no-untyped-def]
    table,
    grads,
    places,
    grad_like,
    weight_like,
    copy_like,
    grad_scale,
    found_inf,
    lr,
    decay,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG1: tl.constexpr,
    LOG2: tl.constexpr,
    EPS: tl.constexpr,
    SCALED: tl.constexpr,
    CHECKED: tl.constexpr,
    COPIED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if CHECKED and tl.load(found_inf) > 0:
        return
    program = tl.program_id(0).to(tl.int64)
    number = tl.load(places + 2 * program).to(tl.int64)
    grad_address = tl.load(grads + number)
    if grad_address == 0:
        return
    row = table + 6 * number
    weight = tl.load(row).to(weight_like.dtype)
    exp_avg = tl.load(row + 1).to(weight_like.dtype)
    exp_avg_sq = tl.load(row + 2).to(weight_like.dtype)
    step = tl.load(row + 3).to(weight_like.dtype)
    size = tl.load(row + 5)
    grad = grad_address.to(grad_like.dtype)
    if ALIGNED:
        weight, exp_avg = tl.multiple_of(weight, 16), tl.multiple_of(exp_avg, 16)
        exp_avg_sq, grad = tl.multiple_of(exp_avg_sq, 16), tl.multiple_of(grad, 16)
        size = tl.multiple_of(size, 16)  # the mask, too, keeps loads narrow
    at = tl.load(places + 2 * program + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        g /= tl.load(grad_scale)
    # 1 - beta^n loses its digits in float32 while n is small
    count = tl.load(step).to(tl.float64) + 1
    correction1 = (1 - tl.exp(count * LOG1)).to(tl.float32)
    correction2 = (1 - tl.exp(count * LOG2)).to(tl.float32)
    m = tl.load(exp_avg + at, mask=inside, other=0.0)
    m += (1 - BETA1) * (g - m)
    v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
    v = BETA2 * v + (1 - BETA2) * g * g
    w = tl.load(weight + at, mask=inside, other=0.0)
    w -= decay * w
    w -= lr / correction1 * (m / (tl.sqrt(v) / tl.sqrt(correction2) + EPS))
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)
    tl.store(weight + at, w, mask=inside)
    if COPIED:
        copy = tl.load(row + 4).to(copy_like.dtype)
        if ALIGNED:
            copy = tl.multiple_of(copy, 16)
        tl.store(copy + at, w.to(copy_like.dtype.element_ty), mask=inside)


@jit
def _adamw_count_kernel(  # type: ignore[no-untyped-def]
    table, grads, weight_like, found_inf, number, CHECKED: tl.constexpr, BLOCK: tl.constexpr
):
    """Another step of each weight that has a gradient. In a launch of its own: all programs of the other read the counts."""
    if CHECKED and tl.load(found_inf) > 0:
        return
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < number
    there = there & (tl.load(grads + at, mask=there, other=0) != 0)
    step = tl.load(table + 6 * at + 3, mask=there, other=0).to(weight_like.dtype)
    tl.store(step, tl.load(step, mask=there, other=0.0) + 1, mask=there)
