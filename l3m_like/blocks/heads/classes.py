"""Scores of classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.init import Init, Normal, Zeros
from l3m_like.layers.norm import make_norm, norm_spec
from l3m_like.layers.pooling import Pool


class ClassHead(ReadWriteBlock):
    """Pool the features and map them to one score per class.

    Reads   features [B, S, D]
    Writes  logits [B, classes] in the weight's dtype

    Args:
        dim: D.
        classes: how many.
        pool: as in ``EmbeddingHead``.
        norm: of what is pooled: "rms", "layer" or None.
        norm_eps: its epsilon.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("logits",)

    def __init__(
        self,
        dim: int,
        classes: int,
        pool: str | Callable[[int], nn.Module] = "first",
        norm: str | None = None,
        norm_eps: float = 1e-5,
        **ports: Any,
    ) -> None:
        super().__init__(**ports)
        self.norm = None if norm is None else make_norm(norm, dim, norm_eps)
        self.pool: Any = Pool(pool) if isinstance(pool, str) else pool(dim)
        self.proj = nn.Linear(dim, classes)

    def compute(self, features: Tensor) -> Tensor:
        pooled = self.pool(features)
        pooled = pooled if self.norm is None else self.norm(pooled)
        return self.proj(pooled.to(self.proj.weight.dtype))

    def flops(self, features: Tensor) -> int:
        rows, tokens = features.shape[0], features.shape[0] * features.shape[1]
        return self.pool.flops(rows, tokens) + 2 * rows * self.proj.weight.numel()

    def tp_plan(self) -> dict[str, str]:
        return {"proj": "replicated"} if self.norm is None else {"proj": "replicated", "norm": "replicated"}

    def optim_spec(self) -> dict[str, str | int]:
        return {"proj.weight": "adamw"}

    def init_spec(self) -> dict[str, Init]:
        spec: dict[str, Init] = {"proj.weight": Normal(0.02), "proj.bias": Zeros()}
        return spec if self.norm is None else spec | norm_spec("norm", self.norm)
