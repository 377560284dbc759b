"""The features of a trunk: its output, normalised."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.init import Init
from l3m_like.layers.norm import make_norm, norm_spec


class Features(ReadWriteBlock):
    """The final norm of a trunk whose output serves several readers: heads, a decoder, probes.

    Reads   hidden [B, S, D]
    Writes  features [B, S, D]

    Args:
        dim: D.
        norm: "rms", or "layer": LayerNorm with weight and bias.
        norm_eps: its epsilon.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("features",)

    def __init__(self, dim: int, norm: str = "layer", norm_eps: float = 1e-6, **ports: Any) -> None:
        super().__init__(**ports)
        self.norm = make_norm(norm, dim, norm_eps)

    def compute(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)

    def flops(self, hidden: Tensor) -> int:
        return 0  # no matmul

    def tp_plan(self) -> dict[str, str]:
        return {"norm": "replicated"}

    def init_spec(self) -> dict[str, Init]:
        return norm_spec("norm", self.norm)
