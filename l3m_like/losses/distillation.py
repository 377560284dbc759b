"""Distillation loss."""

from __future__ import annotations

import torch
from torch import Tensor

from l3m_like.losses.loss import Loss
from l3m_like.losses.token import counted


class Distillation(Loss):
    """Mean divergence from the teacher, over all targets of the whole step.

    Reads   divergence [B, S] float, 0 where there is no target; targets [B, S] int64, -100 = no target; optional only [B, S]
            bool: where it counts
    Counts  targets that are not -100 (and where it counts)
    """

    def compute(self, divergence: Tensor, targets: Tensor, only: Tensor | None = None) -> Tensor:
        divergence = divergence.to(torch.promote_types(divergence.dtype, torch.float32))
        # a plain sum: its gradient is one number for all tokens, which the kernel makes use of
        return divergence.sum() if only is None else torch.where(counted(targets, only), divergence, 0).sum()

    def count(self, targets: Tensor, only: Tensor | None = None) -> Tensor:
        return counted(targets, only).sum()
