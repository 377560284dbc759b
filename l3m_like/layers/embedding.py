"""Embeddings of scalars."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3m_like.core.errors import UserError
from l3m_like.core.init import Init, Normal, Zeros


def sinusoid(time: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """``[cos(t f) | sin(t f)]`` with f_i = 10000^(-i / (width/2)), i < width/2 (as DiT and SiT); time [...] -> [..., width]."""
    half = width // 2
    frequency = torch.exp(torch.arange(half, device=time.device).to(dtype) * (-math.log(10000.0) / half))
    angle = time.to(dtype).unsqueeze(-1) * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class TimeEmbed(nn.Module):
    """A time [B] as a vector [B, D]: sinusoid (at least float32) -> Linear -> SiLU -> Linear.

    Args:
        dim: D.
        frequencies: width of the sinusoid, even.
    """

    def __init__(self, dim: int, *, frequencies: int = 256) -> None:
        super().__init__()
        if frequencies % 2:
            raise UserError(f"TimeEmbed: frequencies must be even, got {frequencies}.")
        self.dim = dim
        self.frequencies = frequencies
        self.up = nn.Linear(frequencies, dim)
        self.down = nn.Linear(dim, dim)

    def forward(self, time: Tensor) -> Tensor:
        weight = self.up.weight
        wave = sinusoid(time, self.frequencies, torch.promote_types(weight.dtype, torch.float32))
        return self.down(F.silu(self.up(wave.to(weight.dtype))))

    def flops(self, rows: int) -> int:
        return 2 * rows * self.dim * (self.frequencies + self.dim)

    def tp_plan(self) -> dict[str, str]:
        return {"up": "replicated", "down": "replicated"}

    def optim_spec(self) -> dict[str, str | int]:
        return {"up.weight": "adamw", "down.weight": "adamw"}

    def init_spec(self) -> dict[str, Init]:
        return {"up.weight": Normal(0.02), "up.bias": Zeros(), "down.weight": Normal(0.02), "down.bias": Zeros()}


class FourierFeatures(nn.Module):
    """A time [B] as ``[sin | cos](2 pi t w)`` [B, 2 F], at least float32, with F normal frequencies w that are not trained
    (Gaussian Fourier features, arXiv:2006.10739)."""

    full_precision = True  # bf16 rounds w = 2 .. 4 by up to 1/128: so much of a turn at t = 1

    def __init__(self, frequencies: int) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.empty(frequencies), requires_grad=False)

    def forward(self, time: Tensor) -> Tensor:
        wide = torch.promote_types(self.frequency.dtype, torch.float32)
        angle = 2 * math.pi * time.to(wide).unsqueeze(-1) * self.frequency.to(wide)
        return torch.cat((angle.sin(), angle.cos()), dim=-1)

    def tp_plan(self) -> dict[str, str]:
        return {"frequency": "replicated"}

    def init_spec(self) -> dict[str, Init]:
        return {"frequency": Normal(1.0)}


class FourierTimeEmbed(nn.Module):
    """A time [B] as a vector [B, D]: ``FourierFeatures`` -> Linear -> SiLU -> Linear.

    Args:
        dim: D.
        frequencies: how many.
    """

    def __init__(self, dim: int, *, frequencies: int = 256) -> None:
        super().__init__()
        self.dim = dim
        self.features = FourierFeatures(frequencies)
        self.up = nn.Linear(2 * frequencies, dim)
        self.down = nn.Linear(dim, dim)

    def forward(self, time: Tensor) -> Tensor:
        return self.down(F.silu(self.up(self.features(time).to(self.up.weight.dtype))))

    def flops(self, rows: int) -> int:
        return 2 * rows * self.dim * (self.up.in_features + self.dim)

    def tp_plan(self) -> dict[str, str]:
        return {"up": "replicated", "down": "replicated"}

    def optim_spec(self) -> dict[str, str | int]:
        return {"up.weight": "adamw", "down.weight": "adamw"}

    def init_spec(self) -> dict[str, Init]:
        return {"up.weight": Normal(0.02), "up.bias": Zeros(), "down.weight": Normal(0.02), "down.bias": Zeros()}
