"""Cross-entropy of a linear layer's logits, without ever holding all logits.

``linear_cross_entropy(hidden, weight, targets)`` is ``cross_entropy(hidden @ weight.T, targets, reduction="none")``. For a
vocabulary of 150k one row of 4096 tokens has 2.5 GB of float32 logits, and as much again for their gradient. Here one chunk of
tokens has logits at a time, in the dtype of the weight, and they become their own gradient in place.

Where a gradient will be asked for, the forward pass computes it at once, as if every token's loss counted 1: so the logits are
computed once, not twice. If the backward pass then brings one number for all tokens (the mean or sum of the losses), the
gradients are scaled by it; any other gradient is computed from new logits, chunk by chunk. Losses that count differently are
therefore told their ``weights`` here, and summed plainly.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.kernels.launch import HAS_TRITON, INTERPRETED, jit, tl, triton
from l3m_like.kernels.scale import scaled
from l3m_like.kernels.select import NO_TRITON

#: target of a token without a loss
IGNORE = -100

#: logits that exist at a time: 256 MiB of float32, and on CUDA 1.25 GiB of bfloat16 (larger products are faster there)
_CHUNK_ELEMENTS = {"cpu": 1 << 26, "cuda": 5 << 27}
BACKENDS = ("auto", "reference", "torch", "triton")


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The definition: all logits at once. ``(nll, normalizer)``, arguments as ``linear_cross_entropy``."""
    logits = hidden @ weight.T
    logits = _capped(logits.to(torch.promote_types(logits.dtype, torch.float32)), softcap)
    nll = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=IGNORE)
    return nll.view(targets.shape), torch.where(targets == IGNORE, 0, logits.logsumexp(-1))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    softcap: float | None = None,
    normalizer: bool = False,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> Any:
    """Negative log-likelihood of every token.

    Args:
        hidden: [..., D] in the dtype of ``weight``.
        weight: [V, D]; with ``group``, this rank's rows [V / ranks, D] of it, in the order of the ranks.
        targets: int64 [...]; -100 gives 0 and no gradient.
        weights: [...], the factor of every token's loss (no gradient reaches it); None: 1.
        softcap: c, for logits ``c * tanh(logits / c)`` (Gemma 2, arXiv:2408.00118).
        normalizer: also return the logarithm of the softmax's denominator (its square is the z-loss of PaLM,
            arXiv:2204.02311), 0 where there is no target.
        group: the ranks over which the vocabulary is cut; ``hidden`` and ``targets`` are the same on all of them.
        chunk_tokens: tokens whose logits exist at a time (None: as many as fit a fixed number of logits, at least 256).
        backend: "reference" (all logits), "torch", "triton" (CUDA), or "auto".

    Returns:
        [...] in float32 (float64 for float64 inputs); with ``normalizer`` a pair of them.
    """
    backend = resolve(backend, hidden.device, hidden.dtype)
    if backend == "reference":
        if group is not None:
            raise UserError("linear_cross_entropy: the reference knows no cut vocabulary; use 'auto'.")
        nll, norm = linear_cross_entropy_reference(hidden, weight, targets, softcap=softcap)
        nll = nll if weights is None else nll * weights.detach().to(nll.dtype)
        return (nll, norm) if normalizer else nll
    tokens = targets.numel()
    if chunk_tokens is None:
        budget = _CHUNK_ELEMENTS["cpu" if hidden.device.type == "cpu" else "cuda"]
        chunks = math.ceil(tokens / max(256, budget // weight.shape[0]))
        chunk_tokens = 256 * math.ceil(max(tokens, 1) / max(chunks, 1) / 256)  # equal ones, whole tiles of the matrix product
    # the gradient of a normalizer is never one number
    at_once = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad) and not normalizer
    factors = None if weights is None else weights.detach().reshape(-1).to(torch.promote_types(hidden.dtype, torch.float32))
    nll, norm = _LinearCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), factors, softcap, group, chunk_tokens, backend, at_once
    )
    return (nll.view(targets.shape), norm.view(targets.shape)) if normalizer else nll.view(targets.shape)


def check_backend(backend: str) -> str:
    """``backend`` if there is one of that name."""
    if backend not in BACKENDS:
        raise UserError(f"no linear_cross_entropy '{backend}'. {did_you_mean(backend, BACKENDS)}")
    return backend


def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """What ``backend`` stands for on this device."""
    # on the meta device, the memory that is needed is the kernels'
    there = device.type == "meta" or (HAS_TRITON and (device.type == "cuda" or (INTERPRETED and backend == "triton")))
    able = there and dtype != torch.float64
    if check_backend(backend) == "auto":
        return "triton" if able else "torch"
    if backend == "triton" and not able:
        raise UserError(NO_TRITON.format("linear_cross_entropy"))
    return backend


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        factors: Tensor | None,
        softcap: float | None,
        group: dist.ProcessGroup | None,
        chunk: int,
        backend: str,
        at_once: bool,
    ) -> tuple[Tensor, Tensor]:
        run = _Chunks(weight, softcap, group, backend)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        nll = torch.empty(targets.shape, dtype=dtype, device=hidden.device)
        normalizer = torch.empty_like(nll)
        need_hidden, need_weight = (at_once and need for need in ctx.needs_input_grad[:2])
        gradients = run.gradients(hidden, need_hidden, need_weight)
        counted = (targets != IGNORE).to(dtype) if factors is None else torch.where(targets == IGNORE, 0, factors)
        for at in _slices(len(targets), chunk):
            logits = hidden[at] @ weight.T
            nll[at], normalizer[at] = run.statistics(logits, targets[at])
            if at_once:
                run.add(gradients, run.slope(logits, targets[at], normalizer[at], counted[at], None), hidden, at)
        if factors is not None:
            nll *= counted
        ctx.save_for_backward(hidden, weight, targets, factors, normalizer, *gradients)
        ctx.run, ctx.chunk, ctx.at_once = run, chunk, at_once
        ctx.set_materialize_grads(False)
        return nll, torch.where(targets == IGNORE, 0, normalizer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_normalizer: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, factors, normalizer, grad_hidden, grad_weight = ctx.saved_tensors
        run, nothing = ctx.run, (None,) * 7
        run.weight = weight
        if grad_normalizer is None and grad is not None and ctx.at_once and _one_number(grad):
            factor = grad.flatten()[0]
            return run.hidden_gradient(grad_hidden, factor), run.weight_gradient(grad_weight, factor), *nothing
        if grad is not None and factors is not None:
            grad = grad * factors
        grad, grad_normalizer = (None if g is None else torch.where(targets == IGNORE, 0, g) for g in (grad, grad_normalizer))
        gradients = run.gradients(hidden, *ctx.needs_input_grad[:2])
        for at in _slices(len(targets), ctx.chunk):
            logits = hidden[at] @ weight.T
            both = (None if g is None else g[at] for g in (grad, grad_normalizer))
            run.add(gradients, run.slope(logits, targets[at], normalizer[at], *both), hidden, at)
        return run.hidden_gradient(gradients[0]), run.weight_gradient(gradients[1]), *nothing


class _Chunks:
    """What is done with one chunk of logits [N, V], here or in Triton."""

    def __init__(self, weight: Tensor, softcap: float | None, group: dist.ProcessGroup | None, backend: str) -> None:
        self.softcap, self.group, self.triton = softcap, group, backend == "triton"
        self.weight = weight
        self.first = 0 if group is None else dist.get_rank(group) * weight.shape[0]

    def statistics(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """``(nll, normalizer)`` [N]."""
        largest, total, chosen = (_statistics_triton if self.triton else _statistics)(logits, targets, self.first, self.softcap)
        if self.group is not None:
            highest = largest.clone()
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
            both = torch.stack((total * (largest - highest).exp(), chosen))
            dist.all_reduce(both, group=self.group)
            largest, (total, chosen) = highest, both
        normalizer = largest + total.log()
        return torch.where(targets == IGNORE, 0, normalizer - chosen), normalizer

    def slope(
        self, logits: Tensor, targets: Tensor, normalizer: Tensor, grad: Tensor | None, grad_normalizer: Tensor | None
    ) -> Tensor:
        """The gradient of the logits, in their place, for the gradients [N] of nll and of the normalizer."""
        one = torch.zeros_like(normalizer) if grad is None else grad
        every = one if grad_normalizer is None else one + grad_normalizer
        return (_slope_triton if self.triton else _slope)(logits, targets, normalizer, one, every, self.first, self.softcap)

    def gradients(self, hidden: Tensor, need_hidden: bool, need_weight: bool) -> tuple[Tensor | None, Tensor | None]:
        """Room for the gradients of hidden and weight; that of the weight sums over chunks in (at least) float32: in bfloat16
        the later chunks would be rounded away."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        make = torch.empty if len(hidden) else torch.zeros  # the first chunk is written, not added
        grad_weight = make(self.weight.shape, dtype=dtype, device=hidden.device) if need_weight else None
        return torch.empty_like(hidden) if need_hidden else None, grad_weight

    def add(self, gradients: tuple[Tensor | None, Tensor | None], slope: Tensor, hidden: Tensor, at: slice) -> None:
        grad_hidden, grad_weight = gradients
        if grad_hidden is not None:
            grad_hidden[at] = slope @ self.weight
        if grad_weight is None:
            return
        if slope.is_meta:
            pass
        elif slope.is_cuda and slope.dtype != grad_weight.dtype:  # the product's own fp32 sum is taken, without rounding
            if at.start == 0:
                torch.mm(slope.T, hidden[at], out_dtype=grad_weight.dtype, out=grad_weight)
            else:
                torch.addmm(grad_weight, slope.T, hidden[at], out_dtype=grad_weight.dtype, out=grad_weight)
        elif at.start == 0:
            grad_weight.copy_(slope.T @ hidden[at])
        else:
            grad_weight += slope.T @ hidden[at]

    def hidden_gradient(self, grad: Tensor | None, factor: Tensor | None = None) -> Tensor | None:
        if grad is None:
            return None
        if factor is not None:
            grad = self._times(grad, factor, grad.dtype)
        if self.group is not None:
            dist.all_reduce(grad, group=self.group)  # each rank has the part of its logits
        return grad

    def weight_gradient(self, grad: Tensor | None, factor: Tensor | None = None) -> Tensor | None:
        if grad is None:
            return None
        if factor is None:
            return grad.to(self.weight.dtype)
        return self._times(grad, factor, self.weight.dtype)

    def _times(self, grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """By the exact factor, rounded once, in one pass: one that is rounded before is a little too much or less for all."""
        if self.triton and not grad.is_meta:
            return scaled(grad.unsqueeze(0), factor, dtype).squeeze(0)
        return torch.mul(grad, factor.view(1), out=torch.empty_like(grad, dtype=dtype))


def _one_number(grad: Tensor) -> bool:
    """Whether all elements are one number of memory, as the gradient of a sum is."""
    return grad.numel() > 0 and all(stride == 0 or size == 1 for size, stride in zip(grad.shape, grad.stride(), strict=True))


def _slices(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]


# ---- torch -----------------------------------------------------------------------------------------------------------------


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _place(targets: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """The targets as columns of these logits, and whether they are among them."""
    place = targets - first
    return place.clamp(0, size - 1).unsqueeze(-1), (place >= 0) & (place < size)


def _statistics(logits: Tensor, targets: Tensor, first: int, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Per row: the largest logit, the sum of exp(logit - largest), the target's logit (0 if it is elsewhere)."""
    wide = _capped(logits.to(torch.promote_types(logits.dtype, torch.float32)), softcap)
    largest = wide.amax(-1)
    column, here = _place(targets, first, logits.shape[1])
    chosen = torch.where(here, wide.gather(-1, column).squeeze(-1), 0)
    return largest, (wide - largest.unsqueeze(-1)).exp_().sum(-1), chosen


def _slope(
    logits: Tensor, targets: Tensor, normalizer: Tensor, one: Tensor, every: Tensor, first: int, softcap: float | None
) -> Tensor:
    wide = _capped(logits.to(torch.promote_types(logits.dtype, torch.float32)), softcap)
    inner = None if softcap is None else 1 - (wide / softcap).square()
    slope = (wide - normalizer.unsqueeze(-1)).exp_() * every.unsqueeze(-1)
    column, here = _place(targets, first, logits.shape[1])
    slope.scatter_add_(-1, column, torch.where(here, -one, 0).unsqueeze(-1))
    return (slope if inner is None else slope * inner).to(logits.dtype)


# ---- Triton ----------------------------------------------------------------------------------------------------------------


@jit
def _tanh(x):  # type: ignore[no-untyped-def]
    return 2 / (1 + tl.exp(-2 * x)) - 1


@jit
def _statistics_kernel(  # type: ignore[no-untyped-def]
    logits,
    stride,
    targets,
    largest,
    total,
    chosen,
    size,
    first,
    cap,
    CAPPED: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row per program, read once: running maximum and sum (Milakov and Gimelshein, arXiv:1805.02867)."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    # a lane has several places at a time, and one maximum and one correction of its sum for all of them: exponentials limit it
    place = tl.arange(0, PLACES)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, PLACES * BLOCK):
        x = tl.load(logits + start + place, mask=start + place < size, other=float("-inf")).to(tl.float32)
        if CAPPED:
            x = tl.where(start + place < size, cap * _tanh(x / cap), float("-inf"))
        higher = tl.maximum(high, tl.max(x, 0))
        # a lane that has seen nothing but masked places has no maximum to subtract
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        sums = sums * tl.exp(high - shift) + tl.sum(tl.exp(x - shift[None, :]), 0)
        high = higher
    highest = tl.max(high, 0)
    tl.store(largest + row, highest)
    tl.store(total + row, tl.sum(sums * tl.exp(high - highest), 0))
    target = tl.load(targets + row) - first
    here = (target >= 0) & (target < size)
    one = tl.load(logits + target, mask=here, other=0.0).to(tl.float32)
    if CAPPED:
        one = cap * _tanh(one / cap)
    tl.store(chosen + row, tl.where(here, one, 0.0))


@jit
def _slope_kernel(  # type: ignore[no-untyped-def]
    logits, stride, targets, normalizer, one, every, size, first, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    place = tl.load(targets + row) - first
    norm, on, all_of_them = tl.load(normalizer + row), tl.load(one + row), tl.load(every + row)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < size, other=0.0).to(tl.float32)
        if CAPPED:
            x = cap * _tanh(x / cap)
        slope = tl.exp(x - norm) * all_of_them - tl.where(columns == place, on, 0.0)
        if CAPPED:
            slope *= 1 - (x / cap) * (x / cap)
        tl.store(logits + columns, slope.to(logits.dtype.element_ty), mask=columns < size)


def _statistics_triton(logits: Tensor, targets: Tensor, first: int, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    rows, size = logits.shape
    largest, total, chosen = torch.empty(3, rows, dtype=torch.float32, device=logits.device).unbind()
    capped = (softcap or 1.0, softcap is not None)
    if logits.is_meta:
        return largest, total, chosen
    sizes = {"PLACES": 8, "BLOCK": _block(size, 2048), "num_warps": 8}
    _statistics_kernel[(rows,)](logits, logits.stride(0), targets, largest, total, chosen, size, first, *capped, **sizes)
    return largest, total, chosen


def _slope_triton(
    logits: Tensor, targets: Tensor, normalizer: Tensor, one: Tensor, every: Tensor, first: int, softcap: float | None
) -> Tensor:
    rows, size = logits.shape
    capped = (softcap or 1.0, softcap is not None)
    if logits.is_meta:
        return logits
    _slope_kernel[(rows,)](
        logits, logits.stride(0), targets, normalizer, one, every, size, first, *capped, BLOCK=_block(size, 4096), num_warps=16
    )
    return logits


def _block(size: int, most: int) -> int:
    return min(most, triton.next_power_of_2(size))
