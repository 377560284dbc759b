"""Next-token loss."""

from __future__ import annotations

import torch
from torch import Tensor

from l3m_like.kernels.linear_cross_entropy import IGNORE
from l3m_like.losses.loss import Loss


class TokenNLL(Loss):
    """Mean negative log-likelihood of the targets, over all targets of the whole step.

    Reads   nll [B, S] float; targets [B, S] int64, -100 = no target
    Counts  targets that are not -100
    """

    def compute(self, nll: Tensor, targets: Tensor) -> Tensor:
        nll = nll.to(torch.promote_types(nll.dtype, torch.float32))
        return torch.where(targets == IGNORE, 0, nll).sum()

    def count(self, targets: Tensor) -> Tensor:
        return (targets != IGNORE).sum()
