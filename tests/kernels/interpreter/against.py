"""An operation's Triton kernel against its reference in float64: every output and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: largest error, as a part of the largest value
TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def randn_at(shape: tuple[int, ...], seed: int, offset: int = 0) -> Tensor:
    """float32, so many elements away from where its memory begins: at an address that wide loads do not take."""
    flat = torch.randn(offset + torch.Size(shape).numel(), generator=torch.Generator().manual_seed(seed))
    return flat[offset:].view(shape)


def outputs_and_gradients(call: Callable[..., Any], inputs: Sequence[Tensor], view: Callable[..., Any] | None) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = call(*(view(*leaves) if view is not None else leaves))
    outs = out if isinstance(out, tuple) else (out,)
    weights = [randn(*o.shape, seed=i + 1).to(o.dtype) for i, o in enumerate(outs)]
    return [*outs, *torch.autograd.grad(outs, leaves, weights)]


def worst(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest error of any tensor, as a part of its largest value."""
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(ours, exact, strict=True))


def check(
    call: Callable[..., Any],
    inputs: Sequence[Tensor],
    dtype: torch.dtype = torch.float32,
    *,
    view: Callable[..., Any] | None = None,
) -> None:
    """``call(*inputs, backend=...)`` by Triton in ``dtype`` against the reference in float64.

    ``view`` makes the arguments out of the leaves: views of one tensor, say.
    """
    rounded = [x.to(dtype) for x in inputs]
    wanted = outputs_and_gradients(lambda *a: call(*a, backend="torch"), [x.double() for x in rounded], view)
    found = outputs_and_gradients(lambda *a: call(*a, backend="triton"), rounded, view)
    for number, (ours, exact) in enumerate(zip(found, wanted, strict=True)):
        assert ours.dtype == dtype and ours.shape == exact.shape
        worst = float((ours.detach().double() - exact.detach()).abs().max()) / float(exact.detach().abs().max())
        assert worst <= TOLERANCE[dtype], f"tensor {number}: {worst}"
