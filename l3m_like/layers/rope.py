"""Rotary position embeddings (Su et al., arXiv:2104.09864), rotate-half form."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from l3m_like.core.errors import UserError, did_you_mean

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class Rope:
    """Cosines and sines of rotary positions. Holds numbers only: the tables are computed in each forward, so they survive
    meta initialisation and any cast of the model.

    Args:
        head_dim: K, even.
        theta: base of the frequencies ``theta^(-2i/K)``.
        scaling: None, or Llama 3.1's ``{type: llama3, factor, low_freq_factor, high_freq_factor,
            original_max_position_embeddings}``: wavelengths above original/low are stretched by ``factor``, those below
            original/high are kept, those between are interpolated.
    """

    def __init__(self, head_dim: int, theta: float, scaling: Mapping[str, float | str] | None = None) -> None:
        if head_dim % 2 or head_dim < 2:
            raise UserError(f"Rope: head_dim must be even, got {head_dim}.")
        if not theta > 1:
            raise UserError(f"Rope: theta must be above 1, got {theta} (10000 is usual).")
        self.head_dim = head_dim
        self.theta = float(theta)
        self.scaling = _check_scaling(scaling)

    def frequencies(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Angular frequencies [K/2] (radians per position)."""
        even = torch.arange(0, self.head_dim, 2, device=device).to(dtype)
        frequency = 1.0 / self.theta ** (even / self.head_dim)
        if self.scaling is None:
            return frequency
        factor, low, high, original = (self.scaling[name] for name in _LLAMA3)
        wavelength = 2 * math.pi / frequency
        smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)  # 0: stretched, 1: kept
        return (1 - smooth) * frequency / factor + smooth * frequency

    def __call__(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """``(cos, sin)``, each [B, S, K] (or [1, S, K]) in at least float32, for integer positions [B, S] or [S]."""
        dtype = torch.promote_types(dtype, torch.float32)
        if positions.dim() == 1:
            positions = positions.unsqueeze(0)
        angles = positions.to(dtype).unsqueeze(-1) * self.frequencies(dtype, positions.device)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def _check_scaling(scaling: Mapping[str, float | str] | None) -> dict[str, float] | None:
    if scaling is None:
        return None
    kind = scaling.get("type")
    if kind != "llama3":
        raise UserError(f"Rope: scaling.type is {kind!r}; the one that exists is 'llama3'.")
    for name in scaling:
        if name != "type" and name not in _LLAMA3:
            raise UserError(f"Rope: scaling has no '{name}'. {did_you_mean(name, _LLAMA3)}")
    missing = [name for name in _LLAMA3 if name not in scaling]
    if missing:
        raise UserError(f"Rope: scaling llama3 needs {', '.join(missing)} as well.")
    return {name: float(scaling[name]) for name in _LLAMA3}
