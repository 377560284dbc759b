"""Class labels as conditions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError
from l3m_like.core.init import Init, Normal
from l3m_like.core.random import uniform
from l3m_like.layers.embedding import TimeEmbed


class DropLabel(ReadWriteBlock):
    """Replace a label by the null class (number ``classes``) at random, for classifier-free guidance (arXiv:2207.12598).

    Reads   label [B] int64; row [B] int64
    Writes  class_id [B] int64 in 0 .. classes

    Args:
        seed: of the run; drops are functions of (seed, stream, row).
        classes: number of real classes.
        probability: of a drop.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("class_id",)

    def __init__(self, seed: int, classes: int, probability: float, **ports: Any) -> None:
        super().__init__(**ports)
        if not 0 <= probability <= 1:
            raise UserError(f"DropLabel: probability must be in 0 .. 1, got {probability}.")
        self.seed = seed
        self.classes = classes
        self.probability = probability

    def compute(self, label: Tensor, row: Tensor) -> Tensor:
        drop = uniform(row, seed=self.seed, purpose=f"drop_label/{self.stream or ''}") < self.probability
        return torch.where(drop, self.classes, label)

    def limits(self, label: Tensor, row: Tensor) -> dict[str, int]:
        return {"label": self.classes}


class TimeLabelEmbed(ReadWriteBlock):
    """Condition vector of a time and a class: the sum of their embeddings.

    Reads   time [B] float; class_id [B] int64 in 0 .. classes (``classes`` is the null class)
    Writes  condition [B, D]

    Args:
        classes: number of real classes.
        dim: D.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("condition",)

    def __init__(self, classes: int, dim: int, **ports: Any) -> None:
        super().__init__(**ports)
        if classes < 1:
            raise UserError(f"TimeLabelEmbed: classes must be at least 1, got {classes}.")
        self.time = TimeEmbed(dim)
        self.label = nn.Embedding(classes + 1, dim)

    def compute(self, time: Tensor, class_id: Tensor) -> Tensor:
        return self.time(time) + self.label(class_id)

    def flops(self, time: Tensor, class_id: Tensor) -> int:
        return self.time.flops(time.shape[0])

    def limits(self, time: Tensor, class_id: Tensor) -> dict[str, int]:
        return {"class_id": self.label.num_embeddings}

    def tp_plan(self) -> dict[str, str]:
        return {"label": "replicated"}

    def init_spec(self) -> dict[str, Init]:
        return {"label.weight": Normal(0.02)}
