"""Low-rank adapters: a frozen linear map with a small trained one beside it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3m_like.core.errors import UserError
from l3m_like.core.init import Init, Uniform, Zeros


class LoRALinear(nn.Linear):
    """``y = x W^T + bias + scaling * (dropout(x) A^T) B^T`` (Hu et al., arXiv:2106.09685, section 4.1).

    W and the bias keep their names and their tensors, and are frozen; ``lora_a`` is A [rank, in], ``lora_b`` is B [out, rank].
    B starts at zero, so that the map starts as that of ``base``.

    Args:
        base: the layer whose place it takes.
        rank: of the update B A.
        alpha: ``scaling`` is alpha / rank.
        rank_stabilized: ``scaling`` is alpha / sqrt(rank) instead (arXiv:2312.03732), with which large ranks learn as fast.
        dropout: probability with which an entry of the adapter's input is zero in training.
    """

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, rank_stabilized: bool = False, dropout: float = 0.0) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.requires_grad_(False)
        self.rank = rank
        self.scaling = alpha / (math.sqrt(rank) if rank_stabilized else rank)
        self.dropout = dropout
        like: dict[str, Any] = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.lora_b = nn.Parameter(torch.empty(base.out_features, rank, **like))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        update = F.linear(F.linear(F.dropout(x, self.dropout, self.training), self.lora_a), self.lora_b)
        return super().forward(x) + self.scaling * update

    def merged_weight(self) -> Tensor:
        """W + scaling * B A [out, in], for who reads the matrix instead of calling the layer."""
        return self.weight + self.scaling * (self.lora_b @ self.lora_a)

    def tp_cuts(self, style: str) -> dict[str, int | None]:
        """``{parameter: dimension to cut, None: whole}`` of the adapter, where W is cut in ``style``: the map that W's cut
        dimension belongs to is cut with it."""
        if self.dropout:
            raise UserError(f"lora.dropout = {self.dropout} is not built for tensor parallelism. Set it to 0, or parallel.tp: 1.")
        return {"lora_a": None, "lora_b": 0} if style == "colwise" else {"lora_a": 1, "lora_b": None}

    def init_spec(self) -> dict[str, Init]:
        uniform = Uniform(1.0 / math.sqrt(self.in_features))
        spec: dict[str, Init] = {"weight": uniform, "lora_a": uniform, "lora_b": Zeros()}
        return spec if self.bias is None else spec | {"bias": uniform}
