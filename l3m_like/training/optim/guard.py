"""Which steps are skipped."""

from __future__ import annotations

import torch
from torch import Tensor


class Guard:
    """Is this step's gradient norm fit to be used? Decided on the device, from a number that all ranks share.

    A step is bad if its norm is not finite, or if it exceeds ``spike`` times the median of the last ``window`` good norms.
    """

    def __init__(self, device: torch.device, *, spike: float | None, window: int) -> None:
        self.spike = spike
        self.norms = torch.zeros(window, dtype=torch.float64, device=device)
        self.good = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def bad(self, norm: Tensor) -> Tensor:
        """1.0 if the step must be skipped, else 0.0 (fp32 device scalar)."""
        window = self.norms.numel()
        norm = norm.detach().double()
        bad = ~torch.isfinite(norm)
        if self.spike is not None:
            bad = bad | ((self.good >= window) & (norm > self.spike * self.norms.median()))
        slot = (self.good % window).view(1)
        self.norms.index_copy_(0, slot, torch.where(bad, self.norms[slot], norm.view(1)))
        self.good += (~bad).long()
        return bad.float()

    def named_state(self) -> dict[str, Tensor]:
        return {"norms": self.norms, "good": self.good}
