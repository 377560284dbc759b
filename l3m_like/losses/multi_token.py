"""Loss of multi-token prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from l3m_like.blocks.postprocessors.multi_token import targets_ahead
from l3m_like.kernels.linear_cross_entropy import IGNORE
from l3m_like.losses.loss import Loss


class AheadNLL(Loss):
    """Mean negative log-likelihood of the tokens after the next ones (DeepSeek-V3, arXiv:2412.19437, eq. 24; its weight there is
    0.3, later 0.1).

    Reads   ahead_nll [B, S] float, 0 where there is no target
    Counts  the places of targets [B, S] whose next place is in the same document (document_ids [B, S]) and has a target
    """

    def compute(self, ahead_nll: Tensor) -> Tensor:
        return ahead_nll.to(torch.promote_types(ahead_nll.dtype, torch.float32)).sum()

    def count(self, targets: Tensor, document_ids: Tensor) -> Tensor:
        return (targets_ahead(targets, document_ids) != IGNORE).sum()
