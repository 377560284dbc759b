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
        for name, average in self.average.items():
            target = local(self.parameters[name]).to(average.dtype)
            weight = torch.full((), 1.0 - self.decay, dtype=average.dtype, device=target.device)
            local(average).lerp_(target, weight if skipped is None else weight * (1.0 - skipped.to(average.dtype)))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange parameters and averages in place; call again to undo."""
        for name, average in self.average.items():
            ours, theirs = local(average), local(self.parameters[name])
            held = theirs.clone()
            theirs.copy_(ours)
            ours.copy_(held)
