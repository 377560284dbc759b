"""Next-token loss."""

from __future__ import annotations

import torch
from torch import Tensor

from l3m_like.kernels.linear_cross_entropy import IGNORE
from l3m_like.losses.loss import Loss


class TokenNLL(Loss):
    """Mean negative log-likelihood of the targets, over all targets of the whole step.

    Reads   nll [B, S] float, 0 where there is no target; targets [B, S] int64, -100 = no target; optional only [B, S] bool:
            where it counts
    Counts  targets that are not -100 (and where it counts)

    ``only`` is for metrics. Of a trained term the gradient is then no longer one number for all tokens, and the head computes
    its logits a second time; ``weighted_nll`` of ``LanguageModelHead``, whose weights are 0 and 1, does not.
    """

    def compute(self, nll: Tensor, targets: Tensor, only: Tensor | None = None) -> Tensor:
        nll = nll.to(torch.promote_types(nll.dtype, torch.float32))
        # a plain sum: its gradient is one number for all tokens, which the linear cross-entropy makes use of
        return nll.sum() if only is None else torch.where(counted(targets, only), nll, 0).sum()

    def count(self, targets: Tensor, only: Tensor | None = None) -> Tensor:
        return counted(targets, only).sum()


def counted(targets: Tensor, only: Tensor | None) -> Tensor:
    """Where a token counts: it has a target, and is one of ``only``."""
    return targets != IGNORE if only is None else (targets != IGNORE) & only


class CaptionNLL(Loss):
    """Mean negative log-likelihood of the tokens of captions, over all captions of the whole step.

    Reads   nll [B, T] float, 0 where there is padding
    Counts  the tokens of the loader's mask [B, T]
    """

    def compute(self, nll: Tensor) -> Tensor:
        return nll.to(torch.promote_types(nll.dtype, torch.float32)).sum()

    def count(self, mask: Tensor) -> Tensor:
        return mask.sum()
