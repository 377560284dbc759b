"""Token embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError
from l3m_like.core.init import Init, Normal
from l3m_like.layers.patch_embed import sincos_at, sincos_positions
from l3m_like.layers.vocabulary import TokenEmbedding


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
        self.embed = TokenEmbedding(vocab_size, dim)

    def compute(self, ids: Tensor) -> Tensor:
        return self.embed(ids)

    def flops(self, ids: Tensor) -> int:
        return 0  # a lookup is no matmul

    def limits(self, ids: Tensor, **ports: Tensor) -> dict[str, int]:
        return {"ids": self.embed.num_embeddings}

    def tp_plan(self) -> dict[str, str]:
        return {"embed": "vocab"}

    def init_spec(self) -> dict[str, Init]:
        return {"embed.weight": Normal(0.02)}


class PlacedTokenEmbed(TokenEmbed):
    """Token vectors plus vectors of their positions: learned ones (GPT), or fixed sinusoids.

    Reads   ids [B, S] int64; positions [B, S] int64 (without: 0, 1, 2, ...)
    Writes  tokens [B, S, D]

    Args:
        vocab_size, dim: as ``TokenEmbed``.
        max_positions: rows of the table of positions; no position may be above.
        fixed: the sinusoids of a grid of one column (``PatchEmbed``), which are the second half of a vector.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    def __init__(self, vocab_size: int, dim: int, max_positions: int, fixed: bool = False, **ports: Any) -> None:
        super().__init__(vocab_size, dim, **ports)
        if max_positions < 1:
            raise UserError(f"PlacedTokenEmbed: max_positions must be at least 1, got {max_positions}.")
        if fixed and dim % 4:
            raise UserError(f"PlacedTokenEmbed: dim must be a multiple of 4 for its sinusoids, got {dim}.")
        self.max_positions = max_positions
        self.place = None if fixed else nn.Embedding(max_positions, dim)

    def compute(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if ids.shape[1] > self.max_positions and positions is None:
            raise UserError(
                f"PlacedTokenEmbed: {ids.shape[1]} tokens, and vectors for {self.max_positions} positions; raise "
                "max_positions or lower sequence."
            )
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        tokens = self.embed(ids)
        if self.place is not None:
            return tokens + self.place(positions)
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        if positions.numel() < self.max_positions:
            place = sincos_at(positions, torch.zeros_like(positions), tokens.shape[-1]).to(dtype)
        else:
            place = sincos_positions(self.max_positions, 1, tokens.shape[-1], dtype, tokens.device)[positions]
        return (tokens + place).to(tokens.dtype)

    def flops(self, ids: Tensor, positions: Tensor | None = None) -> int:  # type: ignore[override]
        return 0

    def limits(self, ids: Tensor, positions: Tensor | None = None) -> dict[str, int]:  # type: ignore[override]
        return {**super().limits(ids), "positions": self.max_positions}

    def tp_plan(self) -> dict[str, str]:
        return {"embed": "vocab"} if self.place is None else {"embed": "vocab", "place": "replicated"}

    def init_spec(self) -> dict[str, Init]:
        return {f"{name}.weight": Normal(0.02) for name, _ in self.named_children()}
