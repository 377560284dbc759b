"""Token embedding."""

from __future__ import annotations

from typing import Any

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
