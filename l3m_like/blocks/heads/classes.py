"""Scores of classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.init import Init, Normal, Zeros
from l3m_like.layers.pooling import Pool


class ClassHead(ReadWriteBlock):
    """Pool the features and map them to one score per class.

    Reads   features [B, S, D]
    Writes  logits [B, classes] in the weight's dtype

    Args:
        dim: D.
        classes: how many.
        pool: as in ``EmbeddingHead``.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("logits",)

    def __init__(self, dim: int, classes: int, pool: str | Callable[[int], nn.Module] = "first", **ports: Any) -> None:
        super().__init__(**ports)
        self.pool: Any = Pool(pool) if isinstance(pool, str) else pool(dim)
        self.proj = nn.Linear(dim, classes)

    def compute(self, features: Tensor) -> Tensor:
        return self.proj(self.pool(features).to(self.proj.weight.dtype))

    def flops(self, features: Tensor) -> int:
        rows, tokens = features.shape[0], features.shape[0] * features.shape[1]
        return self.pool.flops(rows, tokens) + 2 * rows * self.proj.weight.numel()

    def tp_plan(self) -> dict[str, str]:
        return {"proj": "replicated"}

    def optim_spec(self) -> dict[str, str | int]:
        return {"proj.weight": "adamw"}

    def init_spec(self) -> dict[str, Init]:
        return {"proj.weight": Normal(0.02), "proj.bias": Zeros()}
