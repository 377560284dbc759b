"""The divergence between a teacher's and a student's next-token distributions, without ever holding all logits of either.

With the teacher's distribution p and the student's q, both of logits divided by the temperature t, per token and times t^2, so
that gradients stay as large as those of the cross-entropy (Hinton et al., arXiv:1503.02531):

- ``forward_kl``: KL(p || q) = sum p (ln p - ln q), which makes the student cover all that the teacher does;
- ``reverse_kl``: KL(q || p), which makes it stay where the teacher is (MiniLLM, arXiv:2306.08543);
- ``jensen_shannon``: beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (arXiv:2306.13649, eq. 1).

As in ``linear_cross_entropy``, one chunk of tokens has logits at a time, and the forward pass computes the gradients at once, as
if every token counted 1; a backward pass that brings one number for all tokens scales them, any other computes new logits.

A teacher may also be given as the probabilities of its k likeliest tokens. Both distributions are then compared over k + 1
outcomes, the last of which is "any other token". So a student that equals its teacher has no divergence, and no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.kernels.linear_cross_entropy import IGNORE, _Chunks, _one_number, _slices

DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon")

#: logits of the student that exist at a time; about six tensors as large do in float32
_CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}


@dataclass(frozen=True)
class Divergence:
    """Which divergence; see the module's docstring.

    Raises:
        UserError: no such divergence; ``beta`` outside of (0, 1); a temperature that is not positive.
    """

    kind: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in DIVERGENCES:
            raise UserError(f"no divergence '{self.kind}'. {did_you_mean(self.kind, DIVERGENCES)}")
        if not 0 < self.beta < 1:
            raise UserError(f"beta = {self.beta}: it lies between 0 and 1. For its ends write forward_kl or reverse_kl.")
        if not self.temperature > 0:
            raise UserError(f"temperature = {self.temperature}: it must be above 0.")

    def of(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The divergence of log-probabilities [..., C], without the factor of the temperature: [...]."""
        if self.kind == "forward_kl":
            return _kl(log_p, log_q)
        if self.kind == "reverse_kl":
            return _kl(log_q, log_p)
        middle = self._middle(log_p, log_q)
        return self.beta * _kl(log_p, middle) + (1 - self.beta) * _kl(log_q, middle)

    def weighted_slope(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """``q_c * (d divergence / d q_c)`` [..., C], up to a multiple of q, which the softmax does not let through."""
        if self.kind == "forward_kl":
            return -log_p.exp()
        if self.kind == "reverse_kl":
            return _product(log_q, log_q - log_p)
        return (1 - self.beta) * _product(log_q, log_q - self._middle(log_p, log_q))

    def _middle(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return torch.logaddexp(log_p + math.log(self.beta), log_q + math.log1p(-self.beta))


def linear_distillation_reference(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, targets: Tensor, divergence: Divergence
) -> Tensor:
    """The definition: all logits at once. Arguments as ``linear_distillation``."""
    log_q, log_p = (
        (x @ w.T / divergence.temperature).log_softmax(-1) for x, w in ((hidden, weight), (teacher_hidden, teacher_weight))
    )
    return torch.where(targets == IGNORE, 0, divergence.temperature**2 * divergence.of(log_p, log_q))


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    targets: Tensor,
    divergence: Divergence,
    *,
    chunk_tokens: int | None = None,
) -> Tensor:
    """The divergence of every token. Gradients go to the student alone.

    Args:
        hidden: of the student, [..., D] in the dtype of ``weight``.
        weight: [V, D]; whole on every rank of tensor parallelism, as all vocabulary matrices are.
        teacher_hidden: [..., Dt] in the dtype of ``teacher_weight``; Dt need not be D.
        teacher_weight: [V, Dt], the same vocabulary.
        targets: int64 [...]; a token without one (-100) gives 0 and no gradient. Nothing else is read of it.
        divergence: which one, at which temperature.
        chunk_tokens: tokens whose logits exist at a time (None: as many as fit a fixed number of logits).

    Returns:
        [...] in float32 (float64 for float64 inputs).
    """
    return _distill(hidden, weight, targets, _Whole(divergence), teacher_hidden, teacher_weight, chunk_tokens)


def linear_distillation_top_k(
    hidden: Tensor,
    weight: Tensor,
    log_probs: Tensor,
    ids: Tensor,
    targets: Tensor,
    divergence: Divergence,
    *,
    chunk_tokens: int | None = None,
) -> Tensor:
    """The divergence of every token over the teacher's k likeliest tokens and "any other".

    Args:
        log_probs: [..., k] natural logarithms of the teacher's probabilities, at temperature 1.
        ids: int64 [..., k], the tokens that they are of, all different.
        hidden, weight, targets, divergence, chunk_tokens: as for ``linear_distillation``.

    Raises:
        UserError: another temperature than 1, at which the mass outside of the k tokens is not known.
    """
    if divergence.temperature != 1:
        raise UserError(f"temperature = {divergence.temperature}: with a teacher's top k only 1 is possible; else give it whole.")
    return _distill(hidden, weight, targets, _TopK(divergence), log_probs, ids, chunk_tokens)


@torch.no_grad()
def linear_top_k(hidden: Tensor, weight: Tensor, k: int, *, chunk_tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of a teacher, chunk by chunk, without a gradient.

    Args:
        hidden: [..., D].
        weight: [V, D] in the same dtype.
        k: how many.

    Returns:
        ``(log_probs, ids)`` [..., k]: float32 (float64 for float64 inputs) and int64, the likeliest first.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    log_probs = torch.empty(len(rows), k, dtype=_wide(rows), device=rows.device)
    ids = torch.empty(len(rows), k, dtype=torch.int64, device=rows.device)
    for at in _slices(len(rows), chunk_tokens or _chunk_tokens(weight)):
        logits = (rows[at] @ weight.T).to(_wide(rows))
        top, ids[at] = logits.topk(k, dim=-1)
        # of the first from what the others have: so that 1 - p of a sure teacher keeps its digits
        others = logits.scatter_(-1, ids[at][:, :1], -math.inf).logsumexp(-1, keepdim=True)
        log_probs[at] = top - top[:, :1] - torch.logaddexp(torch.zeros_like(others), others - top[:, :1])
    return log_probs.view(*hidden.shape[:-1], k), ids.view(*hidden.shape[:-1], k)


# ---- one chunk -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Whole:
    """A teacher given by hidden states [N, Dt] and its vocabulary matrix [V, Dt]."""

    divergence: Divergence

    def rows(self, first: Tensor, second: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        return first[at], second

    def __call__(self, logits: Tensor, hidden: Tensor, weight: Tensor, sloped: bool) -> tuple[Tensor, Tensor | None]:
        """``(divergence [N], its gradient by the logits [N, V])``."""
        temperature = self.divergence.temperature
        log_q = (logits.to(_wide(logits)) / temperature).log_softmax(-1)
        log_p = ((hidden @ weight.T).to(log_q.dtype) / temperature).log_softmax(-1)
        value = temperature**2 * self.divergence.of(log_p, log_q)
        if not sloped:
            return value, None
        slope = self.divergence.weighted_slope(log_p, log_q)
        del log_p
        slope.addcmul_(log_q.exp_(), slope.sum(-1, keepdim=True), value=-1)
        return value, slope.mul_(temperature)


@dataclass(frozen=True)
class _TopK:
    """A teacher given by log-probabilities and ids [N, k]."""

    divergence: Divergence

    def rows(self, first: Tensor, second: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        return first[at], second[at]

    def __call__(self, logits: Tensor, log_probs: Tensor, ids: Tensor, sloped: bool) -> tuple[Tensor, Tensor | None]:
        wide = logits.to(_wide(logits))
        wide = wide - wide.logsumexp(-1, keepdim=True)
        other = wide.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
        log_q = torch.cat((wide.gather(-1, ids), other), dim=-1)
        log_p = log_probs.to(wide.dtype)
        left = -torch.expm1(log_p.double().logsumexp(-1, keepdim=True))
        left = left.clamp(min=torch.finfo(wide.dtype).tiny).log().to(wide.dtype)  # below 0 by rounding
        log_p = torch.cat((log_p, left), dim=-1)
        value = self.divergence.of(log_p, log_q)
        if not sloped:
            return value, None
        by_outcome = self.divergence.weighted_slope(log_p, log_q)
        q, total = log_q.exp(), by_outcome.sum(-1, keepdim=True)
        # each other token has its share of the last outcome
        slope = wide.exp_() * (by_outcome[:, -1:] / q[:, -1:].clamp(min=torch.finfo(wide.dtype).tiny) - total)
        return value, slope.scatter_(-1, ids, by_outcome[:, :-1] - q[:, :-1] * total)


def _distill(
    hidden: Tensor, weight: Tensor, targets: Tensor, rule: Any, first: Tensor, second: Tensor, chunk: int | None
) -> Tensor:
    at_once = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    first = first.detach().flatten(0, -2)
    second = second.detach() if isinstance(rule, _Whole) else second.flatten(0, -2)
    rows = hidden.reshape(-1, hidden.shape[-1])
    value = _Distillation.apply(rows, weight, targets.reshape(-1), first, second, rule, chunk or _chunk_tokens(weight), at_once)
    return value.view(targets.shape)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        first: Tensor,
        second: Tensor,
        rule: Any,
        chunk: int,
        at_once: bool,
    ) -> Tensor:
        run = _Chunks(weight, None, None, "torch")
        value = torch.empty(targets.shape, dtype=_wide(hidden), device=hidden.device)
        need_hidden, need_weight = (at_once and need for need in ctx.needs_input_grad[:2])
        gradients = run.gradients(hidden, need_hidden, need_weight)
        for at in _slices(len(targets), chunk):
            counted = targets[at] != IGNORE
            found, slope = rule(hidden[at] @ weight.T, *rule.rows(first, second, at), at_once)
            value[at] = torch.where(counted, found, 0)
            if at_once:
                run.add(gradients, (slope * counted.unsqueeze(-1)).to(hidden.dtype), hidden, at)
        ctx.save_for_backward(hidden, weight, targets, first, second, *gradients)
        ctx.rule, ctx.chunk, ctx.run = rule, chunk, run
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, first, second, grad_hidden, grad_weight = ctx.saved_tensors
        run, nothing = ctx.run, (None,) * 6
        run.weight = weight
        if _one_number(grad):
            factor = grad.flatten()[0]
            return run.hidden_gradient(grad_hidden, factor), run.weight_gradient(grad_weight, factor), *nothing
        grad = torch.where(targets == IGNORE, 0, grad)
        gradients = run.gradients(hidden, *ctx.needs_input_grad[:2])
        for at in _slices(len(targets), ctx.chunk):
            _, slope = ctx.rule(hidden[at] @ weight.T, *ctx.rule.rows(first, second, at), True)
            run.add(gradients, (slope * grad[at].unsqueeze(-1)).to(hidden.dtype), hidden, at)
        return run.hidden_gradient(gradients[0]), run.weight_gradient(gradients[1]), *nothing


def _chunk_tokens(weight: Tensor) -> int:
    budget = _CHUNK_ELEMENTS["cpu" if weight.device.type == "cpu" else "cuda"]
    return 256 * math.ceil(budget / weight.shape[0] / 256)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _product(log_p, log_p - log_q).sum(-1)


def _product(log_p: Tensor, x: Tensor) -> Tensor:
    """``p * x``, 0 where p is 0 and x is not finite."""
    p = log_p.exp()
    return torch.where(p > 0, p * x, 0)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
