"""Normalisation over the last dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """``w * x / sqrt(mean(x^2) + eps)`` (Zhang and Sennrich, 2019); x [..., dim].

    Statistics in at least float32; the normalised value is cast back *before* the multiplication with ``w``, as Llama and
    Qwen do. The module that owns a norm names its ``weight`` in its own ``tp_plan`` and ``init_spec``: what tensor
    parallelism does with it depends on the place where it stands.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        # one fused op; without a weight it has no multiplication to round
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, (x.shape[-1],), eps=self.eps).to(self.weight.dtype) * self.weight


class LayerNorm(nn.Module):
    """LayerNorm without scale and shift (adaLN supplies them); x [..., dim], computed in at least float32."""

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.dim,), eps=self.eps)
