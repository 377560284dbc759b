"""Normalisation over the last dimension."""

from __future__ import annotations

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.init import Init, Ones, Zeros
from l3m_like.kernels.modulated_norm import (
    gated_modulated_norm,
    gated_residual_reference,
    modulated_norm,
    modulated_norm_and_residual,
)
from l3m_like.kernels.rms_norm import adds_residual, rms_norm, rms_norm_and_residual
from l3m_like.kernels.select import selected


class RMSNorm(nn.Module):
    """``w * x / sqrt(mean(x^2) + eps)`` (Zhang and Sennrich, 2019); x [..., dim].

    Statistics in at least float32; the normalised value is cast back *before* the multiplication with ``w``, as Llama and
    Qwen do. The module that owns a norm names its ``weight`` in its own ``tp_plan`` and ``init_spec``: what tensor
    parallelism does with it depends on the place where it stands.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.backend = selected("rms_norm")
        self.weight = nn.Parameter(torch.ones(dim))

    @overload
    def forward(self, x: Tensor, residual: None = None) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of ``x``; with a ``residual``, ``(norm of x + residual, x + residual)``."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps, backend=self.backend)
        return rms_norm(x, self.weight, self.eps, residual, backend=self.backend)

    def adds_residual(self, x: Tensor) -> bool:
        """Whether ``forward`` adds a residual in its own pass over ``x``."""
        return adds_residual(x, self.weight, backend=self.backend)

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """As ``LayerNorm.modulated``."""
        return self(x) * (1 + scale) + shift

    def with_residual(self, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(norm of x, modulated if a condition gives shift and scale; x)``: as ``LayerNorm.with_residual``."""
        normed, x = rms_norm_and_residual(x, self.weight, self.eps, backend=self.backend)
        return (normed if shift is None or scale is None else normed * (1 + scale) + shift), x

    def of_sum(
        self, x: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ``LayerNorm.of_sum``."""
        x = gated_residual_reference(x, gate, branch, bias)
        return self.modulated(x, shift, scale), x


class LayerNorm(nn.Module):
    """LayerNorm without weights; x [B, S, dim], computed in at least float32. adaLN gives shift, scale and gate, [B, 1, dim] or
    [B, S, dim]."""

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.backend = selected("modulated_norm")

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """``norm(x) * (1 + scale) + shift``."""
        return modulated_norm(x, shift, scale, self.eps, backend=self.backend)

    def with_residual(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """``(modulated norm of x, x)``: the second, for the residual stream, gives its gradient to the norm's backward."""
        return modulated_norm_and_residual(x, shift, scale, self.eps, backend=self.backend)

    def of_sum(
        self, x: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(modulated norm of the sum, sum)`` where the sum is ``x + gate * (branch + bias)``; bias [dim]."""
        return gated_modulated_norm(x, gate, branch, shift, scale, self.eps, bias, backend=self.backend)


class AffineLayerNorm(nn.Module):
    """LayerNorm with a weight and a bias (GPT-2); x [..., dim], computed in at least float32. Its owner names it in ``tp_plan``
    and ``init_spec``, as that of an ``RMSNorm`` does."""

    def __init__(self, dim: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    @overload
    def forward(self, x: Tensor, residual: None = None) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """As ``RMSNorm.forward``."""
        if residual is not None:
            x = x + residual
        wide = torch.promote_types(x.dtype, torch.float32)
        out = F.layer_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.bias.to(wide), self.eps).to(x.dtype)
        return out if residual is None else (out, x)

    def with_residual(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As ``RMSNorm.with_residual``."""
        return self(x), x


#: by their names in configs
NORMS: dict[str, type[nn.Module]] = {"rms": RMSNorm, "layer": AffineLayerNorm}
#: where a condition gives shift and scale
MODULATED_NORMS: dict[str, type[nn.Module]] = {"rms": RMSNorm, "layer": LayerNorm}


def make_norm(kind: str, dim: int, eps: float, *, modulated: bool = False) -> Any:
    """An ``RMSNorm`` ("rms") or ``AffineLayerNorm`` ("layer"); if it is ``modulated``, "layer" is ``LayerNorm``.

    Raises:
        UserError: no such norm.
    """
    if kind not in NORMS:
        raise UserError(f"no norm '{kind}'. {did_you_mean(kind, NORMS)}")
    return (MODULATED_NORMS if modulated else NORMS)[kind](dim, eps=eps)


def norm_spec(name: str, norm: nn.Module) -> dict[str, Init]:
    """How the norm ``name`` is drawn: ones, and a bias of zeros."""
    return {f"{name}.{leaf}": Zeros() if leaf == "bias" else Ones() for leaf, _ in norm.named_parameters()}
