"""Losses of masked diffusion language models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l3m_like.blocks.preprocessors.mask_tokens import document_sizes, maskable
from l3m_like.losses.loss import Loss


class MaskedDiffusion(Loss):
    """The negative evidence lower bound per token: sum over masked tokens of nll / p, divided by *all* tokens that could have
    been masked, in the whole step (LLaDA, arXiv:2502.09992, equation 3). It is an upper bound of the mean NLL of the text.

    Reads   weighted_nll [B, S] float; optional only [B, S] bool: where it counts
    Counts  the tokens of the loader's ids that ``MaskTokens`` may mask (``never`` aside), by document_ids, positions, targets;
            with ``per_document`` the documents that have any

    Args:
        weight: of the term.
        shift, answers_only, per_document: as of ``MaskTokens``.
        ports: reads, stream of ``ReadWriteBlock``.
    """

    def __init__(
        self,
        weight: float | None = 1.0,
        *,
        shift: bool = False,
        answers_only: bool = False,
        per_document: bool = False,
        **ports: Any,
    ) -> None:
        super().__init__(weight, **ports)
        self.shift, self.answers_only, self.per_document = shift, answers_only, per_document

    def compute(self, weighted_nll: Tensor, only: Tensor | None = None) -> Tensor:
        nll = weighted_nll.to(torch.promote_types(weighted_nll.dtype, torch.float32))
        # a plain sum: its gradient is one number for all tokens, which the linear cross-entropy makes use of
        return nll.sum() if only is None else torch.where(only, nll, 0).sum()

    def count(self, document_ids: Tensor, positions: Tensor, targets: Tensor, only: Tensor | None = None) -> Tensor:
        counted = maskable(document_ids, positions, targets, shift=self.shift, answers_only=self.answers_only)
        counted = counted if only is None else counted & only
        return (document_sizes(document_ids, counted) > 0).sum() if self.per_document else counted.sum()


class MaskedNLL(Loss):
    """Mean negative log-likelihood of the masked tokens, without their weights: a metric.

    Reads   weighted_nll, weights [B, S] float, 0 where nothing is masked
    Counts  masked tokens (known only in the forward)
    """

    count_late = True

    def __init__(self, weight: float | None = None, **ports: Any) -> None:
        super().__init__(weight, **ports)

    def compute(self, weighted_nll: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(weighted_nll.dtype, torch.float32)
        masked = weights > 0
        return (weighted_nll.to(dtype) / torch.where(masked, weights, 1).to(dtype)).sum(), masked.sum()
