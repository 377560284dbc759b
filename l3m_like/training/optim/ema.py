"""Averaged weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from l3m_like.distributed.gradients import local


class EMA:
    """An exponential moving average of the trainable parameters in fp32 (or wider): ``e += (1 - decay) (p - e)``.

    In bf16 a decay of 0.9999 would not move at all. Sharded like the parameters.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.parameters = dict(parameters)
        self.average = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for name, p in self.parameters.items()
        }

    @torch.no_grad()
    def update(self, skipped: Tensor | None = None) -> None:
        """Move towards the parameters; by nothing where the device scalar ``skipped`` is 1."""
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for name, average in self.average.items():
            averages, targets = by_dtype.setdefault(average.dtype, ([], []))
            averages.append(local(average))
            targets.append(local(self.parameters[name]).to(average.dtype))
        for dtype, (averages, targets) in by_dtype.items():
            weight = torch.full((), 1.0 - self.decay, dtype=dtype, device=averages[0].device)
            weight = weight if skipped is None else weight * (1.0 - skipped.to(dtype))
            torch._foreach_lerp_(averages, targets, [weight] * len(averages))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange parameters and averages in place; call again to undo."""
        for name, average in self.average.items():
            ours, theirs = local(average), local(self.parameters[name])
            held = theirs.clone()
            theirs.copy_(ours)
            ours.copy_(held)
