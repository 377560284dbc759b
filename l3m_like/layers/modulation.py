"""adaLN modulation: shifts, scales and gates from a condition vector (Peebles and Xie, arXiv:2212.09748)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from l3m_like.core.init import Init, Zeros


class Modulation(nn.Module):
    """``Linear(SiLU(condition))`` cut into ``num`` vectors [B, 1, D]; zero-initialised, so that a new layer is the identity. A
    condition per token [B, S, D] gives vectors [B, S, D]."""

    def __init__(self, dim: int, num: int) -> None:
        super().__init__()
        self.dim = dim
        self.num = num
        self.proj = nn.Linear(dim, num * dim)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """condition [B, D] -> ``num`` tensors [B, 1, D]; [B, S, D] -> [B, S, D]."""
        vectors = self.proj(F.silu(condition.to(self.proj.weight.dtype)))
        return (vectors.unsqueeze(1) if condition.dim() == 2 else vectors).chunk(self.num, dim=-1)

    def flops(self, rows: int) -> int:
        return 2 * rows * self.dim * self.num * self.dim

    def tp_plan(self) -> dict[str, str]:
        return {"proj": "replicated"}

    def optim_spec(self) -> dict[str, str | int]:
        return {"proj.weight": "adamw"}  # it makes scales and gates, which AdamW trains where they are parameters

    def init_spec(self) -> dict[str, Init]:
        return {"proj.weight": Zeros(), "proj.bias": Zeros()}
