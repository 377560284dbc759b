"""Accuracy on multiple-choice questions, by the likelihood of the choices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.kernels.linear_cross_entropy import IGNORE
from l3m_like.losses.loss import Loss

PER = ("choice", "token", "byte")


class ChoiceAccuracy(Loss):
    """The share of questions whose right choice is the likeliest.

    Reads   nll [B, S] float; targets [B, S] int64, -100 = no token of a choice; document_ids [B, S] int, the choice;
            choice_bytes [B, C] int64, 0 = no such choice; answer [B] int64
    Counts  questions, one a row

    Args:
        per: what a choice's log-likelihood is divided by: "choice" (nothing), "token" (its tokens) or "byte" (its UTF-8 bytes,
            as in published numbers called normalised).
    """

    def __init__(self, per: str = "choice", weight: None = None, **ports: Any) -> None:
        if per not in PER:
            raise UserError(f"ChoiceAccuracy: per is '{per}'. {did_you_mean(per, PER)}")
        super().__init__(weight=weight, **ports)
        self.per = per

    def compute(self, nll: Tensor, targets: Tensor, document_ids: Tensor, choice_bytes: Tensor, answer: Tensor) -> Tensor:
        places = [(document_ids == number) & (targets != IGNORE) for number in range(choice_bytes.shape[1])]
        # in float64, so that what else is in the row does not decide between near choices
        sums = torch.stack([torch.where(place, nll, 0).sum(1, dtype=torch.float64) for place in places], dim=1)
        sizes = {"token": torch.stack([place.sum(1) for place in places], dim=1), "byte": choice_bytes}.get(self.per)
        scores = sums if sizes is None else sums / sizes.clamp(min=1)
        chosen = scores.masked_fill(choice_bytes == 0, torch.inf).argmin(1)
        return (chosen == answer).sum(dtype=torch.float32)

    def count(self, answer: Tensor) -> Tensor:
        return torch.tensor(answer.numel(), dtype=torch.int64)
