"""Rotary positions on a grid: half of every head turns with the row, half with the column (as EVA-02, arXiv:2303.11331)."""

from __future__ import annotations

import torch
from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.layers.rope import Rope


class Rope2d:
    """Cosines and sines for a grid of tokens, in the form of ``Rope``. Holds numbers only.

    Pair j of a head turns by ``theta^(-2 i / (K/2))`` times the row for j = i < K/4, times the column for j = K/4 + i.

    Args:
        head_dim: K, a multiple of 4.
        theta: base of the frequencies.
    """

    def __init__(self, head_dim: int, theta: float = 10000.0) -> None:
        if head_dim % 4 or head_dim < 4:
            raise UserError(f"Rope2d: head_dim must be a multiple of 4, got {head_dim}.")
        self.head_dim = head_dim
        self.axis = Rope(head_dim // 2, theta)

    def __call__(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``(cos, sin)``, each [1, rows * columns, K] in at least float32, for tokens row by row."""
        dtype = torch.promote_types(dtype, torch.float32)
        frequency = self.axis.frequencies(dtype, device)
        row = torch.arange(rows, device=device).repeat_interleave(columns).to(dtype)
        column = torch.arange(columns, device=device).repeat(rows).to(dtype)
        angles = torch.cat((row.unsqueeze(-1) * frequency, column.unsqueeze(-1) * frequency), dim=-1)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(0)
        return angles.cos(), angles.sin()
