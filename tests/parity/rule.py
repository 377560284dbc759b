"""The two-part rule for gradients: relative to the parameter's own largest gradient, with a floor from the model's largest."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

#: dtype -> (relative to max|g_p|, relative to max|g|)
TOLERANCE = {torch.float64: (1e-8, 1e-13), torch.float32: (1e-4, 1e-6)}


def check_gradients(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], *, vanishing: Mapping[str, str] | None = None
) -> None:
    """Assert that two sets of gradients agree.

    ``vanishing``: ``{end of a name: reason}`` for parameters whose gradient is below 1e-6 of the largest; no other may be, since
    the floor would hide an error in it.
    """
    assert set(ours) == set(theirs)
    vanishing = vanishing or {}
    largest = max(float(g.abs().max()) for g in theirs.values())
    relative, floor = TOLERANCE[next(iter(ours.values())).dtype]
    wrong, hidden = [], []
    for name, theirs_p in theirs.items():
        own = float(theirs_p.abs().max())
        difference = float((ours[name] - theirs_p).abs().max())
        if not difference <= relative * own + floor * largest:
            wrong.append(f"{name}: {difference:.3g} against {own:.3g}")
        if own < 1e-6 * largest and not name.endswith(tuple(vanishing)):
            hidden.append(name)
    assert not wrong, "\n".join(wrong)
    assert not hidden, f"gradients too small to be tested: {hidden}"


def check_values(ours: Tensor, theirs: Tensor) -> None:
    """Assert that two outputs agree, to the same relative tolerance."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    bound = TOLERANCE[ours.dtype][0] * float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) <= bound


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def perturb(model: nn.Module, seed: int = 0) -> None:
    """Random weights without a zero or a one among them: N(0, 0.1) for matrices and biases, 1 + N(0, 0.1) for norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
