"""Cross-entropy of a linear layer's logits, without ever holding all logits.

``linear_cross_entropy(hidden, weight, targets)`` is ``cross_entropy(hidden @ weight.T, targets, reduction="none")``.
For a vocabulary of 150k one row of 4096 tokens has 2.5 GB of float32 logits, and as much again for their gradient; here
only one chunk of tokens has logits at a time, and they are computed again in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

#: target of a token without a loss
IGNORE = -100

#: logits that exist at a time (float32: 256 MiB)
_CHUNK_ELEMENTS = 1 << 26


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The definition: all logits at once. Arguments and result as ``linear_cross_entropy``."""
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=IGNORE)
    return nll.view(targets.shape)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
    """Negative log-likelihood of every token, chunked over tokens.

    Args:
        hidden: [..., D] in the dtype of ``weight``.
        weight: [V, D].
        targets: int64 [...]; -100 gives 0 and no gradient.
        chunk_tokens: tokens whose logits exist at a time (None: as many as give 2^26 logits, at least 256).

    Returns:
        [...] in float32 (float64 for float64 inputs).
    """
    if chunk_tokens is None:
        chunk_tokens = max(256, _CHUNK_ELEMENTS // weight.shape[0])
    nll = _LinearCrossEntropy.apply(hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), chunk_tokens)
    return nll.view(targets.shape)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        nll = torch.empty(targets.shape, dtype=dtype, device=hidden.device)
        normalizer = torch.empty_like(nll)
        for at in _chunks(len(targets), chunk):
            logits = (hidden[at] @ weight.T).to(dtype)
            normalizer[at] = logits.logsumexp(-1)
            chosen = logits.gather(-1, targets[at].clamp(min=0).unsqueeze(-1)).squeeze(-1)
            nll[at] = torch.where(targets[at] == IGNORE, 0, normalizer[at] - chosen)
        ctx.save_for_backward(hidden, weight, targets, normalizer)
        ctx.chunk = chunk
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizer = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dtype = normalizer.dtype
        grad = torch.where(targets == IGNORE, 0, grad)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # the sum over chunks in (at least) float32: in bfloat16 the later chunks would be rounded away
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if need_weight else None
        for at in _chunks(len(targets), ctx.chunk):
            logits = (hidden[at] @ weight.T).to(dtype)
            slope = logits.sub_(normalizer[at].unsqueeze(-1)).exp_()  # softmax
            slope.scatter_add_(-1, targets[at].clamp(min=0).unsqueeze(-1), slope.new_full((), -1.0).expand(len(slope), 1))
            slope = slope.mul_(grad[at].unsqueeze(-1)).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[at] = slope @ weight
            if grad_weight is not None:
                grad_weight += slope.T @ hidden[at]
        return grad_hidden, grad_weight.to(weight.dtype) if grad_weight is not None else None, None, None


def _chunks(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]
