"""Losses and metrics of classification."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.losses.loss import Loss


class Classification(Loss):
    """Cross-entropy, mean over rows; of images that ``MixImages`` mixed, with both labels by their parts.

    Reads   logits [B, classes]; label [B] int64; optional partner_label [B] int64 and partner_weight [B] float in 0 .. 1
    Counts  rows

    Args:
        weight: of the term.
        label_smoothing: part of a target that is spread over all classes (Szegedy et al., arXiv:1512.00567, section 7); not in
            an evaluation.
        ports: reads, stream of ``ReadWriteBlock``.
    """

    def __init__(self, weight: float | None = 1.0, *, label_smoothing: float = 0.0, **ports: Any) -> None:
        super().__init__(weight, **ports)
        if not 0 <= label_smoothing < 1:
            raise UserError(f"Classification: label_smoothing is {label_smoothing}; it is at least 0 and below 1.")
        self.label_smoothing = label_smoothing

    def compute(
        self, logits: Tensor, label: Tensor, partner_label: Tensor | None = None, partner_weight: Tensor | None = None
    ) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        smoothing = self.label_smoothing if torch.is_grad_enabled() else 0.0
        own = F.cross_entropy(logits, label, reduction="none", label_smoothing=smoothing)
        if partner_label is None or partner_weight is None:
            return own.sum()
        other = F.cross_entropy(logits, partner_label, reduction="none", label_smoothing=smoothing)
        return torch.lerp(own, other, partner_weight.to(own.dtype)).sum()

    def count(self, label: Tensor) -> Tensor:
        return torch.tensor(label.numel(), dtype=torch.int64)

    def limits(self, logits: Tensor, **ports: Tensor) -> dict[str, int]:
        return {"label": logits.shape[-1]}


class ClassAccuracy(Loss):
    """The share of rows whose class is among the ``top`` highest scores: a metric.

    Reads   logits [B, classes]; label [B] int64
    Counts  rows

    Args:
        top: 1, or more.
        ports: reads, stream of ``ReadWriteBlock``.
    """

    def __init__(self, top: int = 1, weight: None = None, **ports: Any) -> None:
        super().__init__(weight, **ports)
        if top < 1:
            raise UserError(f"ClassAccuracy: top is {top}; it is at least 1.")
        self.top = top

    def compute(self, logits: Tensor, label: Tensor) -> Tensor:
        found = logits.detach().topk(self.top, dim=-1).indices == label.unsqueeze(-1)
        return found.any(-1).sum(dtype=torch.float32)

    def count(self, label: Tensor) -> Tensor:
        return torch.tensor(label.numel(), dtype=torch.int64)

    def limits(self, logits: Tensor, label: Tensor) -> dict[str, int]:
        return {"label": logits.shape[-1]}
