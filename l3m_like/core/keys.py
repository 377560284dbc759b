"""What a key of the data_dict holds: declared by data, filled in by the wiring check."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Limit:
    """The numbers of a key that a model can take: 0 .. ``below`` - 1; ``by`` names the block that says so."""

    below: int
    by: str


@dataclass(frozen=True)
class KeySpec:
    """dtype and dimensions of one key.

    Args:
        dtype: of the tensor.
        dims: one entry per dimension: an int, or a symbol (``"B"`` rows of the micro-batch, ``"D"`` documents ...).
        sequence_dim: the dimension that runs along the sequence (what context parallelism cuts), or None.
        meaning: one line for the key table.
    """

    dtype: torch.dtype
    dims: tuple[int | str, ...]
    sequence_dim: int | None = None
    meaning: str = ""

    def shape(self, **sizes: int) -> tuple[int, ...]:
        """The shape with every symbol replaced, e.g. ``spec.shape(B=8)``."""
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in self.dims)
