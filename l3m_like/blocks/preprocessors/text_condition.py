"""Embedded texts as conditions of a diffusion transformer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError
from l3m_like.core.init import Init, Normal, Zeros
from l3m_like.core.random import uniform
from l3m_like.layers.embedding import TimeEmbed


class DropText(ReadWriteBlock):
    """Say at random that a row has no text, for classifier-free guidance (arXiv:2207.12598).

    Reads   row [B] int64
    Writes  text_kept [B] bool

    Args:
        seed: of the run; drops are functions of (seed, stream, row).
        probability: of a drop.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("text_kept",)

    def __init__(self, seed: int, probability: float, **ports: Any) -> None:
        super().__init__(**ports)
        if not 0 <= probability <= 1:
            raise UserError(f"DropText: probability must be in 0 .. 1, got {probability}.")
        self.seed, self.probability = seed, probability

    def compute(self, row: Tensor) -> Tensor:
        return uniform(row, seed=self.seed, purpose=f"drop_text/{self.stream or ''}") >= self.probability


class TimeTextEmbed(ReadWriteBlock):
    """Condition vector of a time and a text's pooled embedding: the sum of the time's embedding and of the text's, through an MLP
    (as the pooled text of SD3, arXiv:2403.03206). A row without text has a learned embedding instead.

    Reads   time [B] float; text [B, E] floating point; text_kept [B] bool (without it all are)
    Writes  condition [B, D]

    Args:
        text_dim: E.
        dim: D.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("condition",)

    def __init__(self, text_dim: int, dim: int, **ports: Any) -> None:
        super().__init__(**ports)
        if text_dim < 1:
            raise UserError(f"TimeTextEmbed: text_dim must be at least 1, got {text_dim}.")
        self.time = TimeEmbed(dim)
        self.up = nn.Linear(text_dim, dim)
        self.down = nn.Linear(dim, dim)
        self.null = nn.Parameter(torch.empty(text_dim))

    def compute(self, time: Tensor, text: Tensor, text_kept: Tensor | None = None) -> Tensor:
        text = text.to(self.null.dtype)
        if text_kept is not None:
            text = torch.where(text_kept.unsqueeze(-1), text, self.null)
        else:
            text = text + 0 * self.null  # every parameter takes part on every rank
        return self.time(time) + self.down(F.silu(self.up(text)))

    def flops(self, time: Tensor, text: Tensor, text_kept: Tensor | None = None) -> int:
        products = self.up.in_features * self.up.out_features + self.down.in_features * self.down.out_features
        return self.time.flops(time.shape[0]) + 2 * time.shape[0] * products

    def tp_plan(self) -> dict[str, str]:
        return {"up": "replicated", "down": "replicated", "null": "replicated"}

    def optim_spec(self) -> dict[str, str | int]:
        return {"up.weight": "adamw", "down.weight": "adamw"}

    def init_spec(self) -> dict[str, Init]:
        drawn = dict.fromkeys(("up.weight", "down.weight", "null"), Normal(0.02))
        return {**drawn, "up.bias": Zeros(), "down.bias": Zeros()}
