"""One AdamW step of one tensor (Loshchilov and Hutter, arXiv:1711.05101), in one pass over its memory.

Beyond torch's fused AdamW: the gradient may be in half precision, and is not written back when it is scaled; a half-precision
copy of the weight is written in the same pass. With a bf16 copy that is 28 bytes per weight, where torch's kernel, clipping and
the casts of weights and gradients take 48.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without an accelerator may do without
    triton = None

_BLOCK = 2048


def adamw_reference(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    copy: Tensor | None = None,
) -> None:
    """The definition, in place; arguments as ``adamw``."""
    if found_inf is not None and bool(found_inf):
        return
    grad = grad.to(weight.dtype) if grad_scale is None else grad.to(weight.dtype) / grad_scale
    count = float(step) + 1
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    size = (exp_avg_sq / (1 - betas[1] ** count)).sqrt() + eps
    weight.mul_(1 - lr * weight_decay).addcdiv_(exp_avg, size, value=-lr / (1 - betas[0] ** count))
    if copy is not None:
        copy.copy_(weight)


def adamw(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    copy: Tensor | None = None,
) -> None:
    """Step ``weight`` and its moments in place by Triton; autograd's version counters do not move.

    Args:
        weight, exp_avg, exp_avg_sq: float32, contiguous, of one shape.
        grad: of that shape, any floating-point dtype; unchanged.
        step: float32 scalar, the number of steps before this one; unchanged.
        lr, betas, eps, weight_decay: of AdamW; the decay is multiplied by the learning rate.
        grad_scale: float32 device scalar that the gradient is divided by.
        found_inf: float32 device scalar; where it is 1, nothing changes.
        copy: of the same shape, takes the new weight in its own dtype.
    """
    size = weight.numel()
    _kernel[(triton.cdiv(size, _BLOCK),)](
        weight,
        grad.contiguous(),
        exp_avg,
        exp_avg_sq,
        step,
        weight if grad_scale is None else grad_scale,
        weight if found_inf is None else found_inf,
        weight if copy is None else copy,
        lr,
        lr * weight_decay,
        size,
        BETA1=betas[0],
        BETA2=betas[1],
        LOG1=math.log(betas[0]) if betas[0] else -math.inf,
        LOG2=math.log(betas[1]) if betas[1] else -math.inf,
        EPS=eps,
        SCALED=grad_scale is not None,
        CHECKED=found_inf is not None,
        COPIED=copy is not None,
        BLOCK=_BLOCK,
        num_warps=8,
    )


def takes(weight: Tensor) -> bool:
    """Whether a launch of its own pays for ``weight`` (a shard) here: float32 on CUDA, and not small."""
    return triton is not None and weight.is_cuda and weight.dtype == torch.float32 and weight.numel() >= 1 << 18


if triton is not None:

    @triton.jit
    def _kernel(  # type: ignore[no-untyped-def]
        weight,
        grad,
        exp_avg,
        exp_avg_sq,
        step,
        grad_scale,
        found_inf,
        copy,
        lr,
        decay,
        size,
        BETA1: tl.constexpr,
        BETA2: tl.constexpr,
        LOG1: tl.constexpr,
        LOG2: tl.constexpr,
        EPS: tl.constexpr,
        SCALED: tl.constexpr,
        CHECKED: tl.constexpr,
        COPIED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        if CHECKED and tl.load(found_inf) > 0:
            return
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
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
            tl.store(copy + at, w.to(copy.dtype.element_ty), mask=inside)
