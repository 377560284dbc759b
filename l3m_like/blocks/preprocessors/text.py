"""Token embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError
from l3m_like.core.init import Init, Normal


class TokenEmbed(ReadWriteBlock):
    """Look up token vectors.

    Reads   ids [B, S] int64
    Writes  tokens [B, S, D]

    Args:
        vocab_size: V, rows of the table.
        dim: D.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("tokens",)

    def __init__(self, vocab_size: int, dim: int, **ports: Any) -> None:
        super().__init__(**ports)
        if vocab_size < 1 or dim < 1:
            raise UserError(f"TokenEmbed: vocab_size and dim must be at least 1, got {vocab_size} and {dim}.")
        self.embed = nn.Embedding(vocab_size, dim)

    def compute(self, ids: Tensor) -> Tensor:
        return self.embed(ids)

    def flops(self, ids: Tensor) -> int:
        return 0  # a lookup is no matmul

    def tp_plan(self) -> dict[str, str]:
        return {"embed": "vocab"}

    def init_spec(self) -> dict[str, Init]:
        return {"embed.weight": Normal(0.02)}


class PlacedTokenEmbed(TokenEmbed):
    """Token vectors plus learned vectors of their positions (GPT).

    Reads   ids [B, S] int64; positions [B, S] int64 (without: 0, 1, 2, ...)
    Writes  tokens [B, S, D]

    Args:
        vocab_size, dim: as ``TokenEmbed``.
        max_positions: rows of the table of positions; no position may be above.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    def __init__(self, vocab_size: int, dim: int, max_positions: int, **ports: Any) -> None:
        super().__init__(vocab_size, dim, **ports)
        if max_positions < 1:
            raise UserError(f"PlacedTokenEmbed: max_positions must be at least 1, got {max_positions}.")
        self.place = nn.Embedding(max_positions, dim)

    def compute(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if ids.shape[1] > self.place.num_embeddings and positions is None:
            raise UserError(
                f"PlacedTokenEmbed: {ids.shape[1]} tokens, and vectors for {self.place.num_embeddings} positions; raise "
                "max_positions or lower sequence."
            )
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        return self.embed(ids) + self.place(positions)

    def flops(self, ids: Tensor, positions: Tensor | None = None) -> int:  # type: ignore[override]
        return 0

    def tp_plan(self) -> dict[str, str]:
        return {"embed": "vocab", "place": "replicated"}

    def init_spec(self) -> dict[str, Init]:
        return {"embed.weight": Normal(0.02), "place.weight": Normal(0.02)}
