"""The half of a row that has targets."""

from __future__ import annotations

from torch import Tensor

from l3m_like.core.block import ReadWriteBlock


class NoisyHalf(ReadWriteBlock):
    """Leave out the clean half of rows made by ``CleanCopy``; rows without targets (when sampling) have none and stay whole.

    Reads   hidden [B, 2 S, D]; masked_targets [B, S] (absent: hidden is [B, S, D])
    Writes  noisy_hidden [B, S, D]
    """

    outputs = ("noisy_hidden",)

    def compute(self, hidden: Tensor, masked_targets: Tensor | None = None) -> Tensor:
        return hidden if masked_targets is None else hidden[:, : masked_targets.shape[1]]
