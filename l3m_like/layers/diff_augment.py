"""Differentiable augmentation of what a discriminator sees (Zhao et al., arXiv:2006.10738)."""

from __future__ import annotations

import torch
from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.core.random import uniform


class DiffAugment:
    """Shift, brightness, saturation, contrast and cutout, drawn per image; gradients go through. Holds numbers only.

    Args:
        seed: of the run.
        translation: largest shift, as a part of the side; what comes in is 0.
        color: brightness is changed by up to half this, saturation by a factor in 1 +- this, contrast in 1 +- half of it; 0: off.
        cutout: side of the square that is set to 0, as a part of the image's; 0: off.
        probability: that an image is augmented.
    """

    def __init__(
        self, seed: int, *, translation: float = 0.125, color: float = 1.0, cutout: float = 0.0, probability: float = 1.0
    ) -> None:
        for name, value in (("translation", translation), ("color", color), ("cutout", cutout), ("probability", probability)):
            if not 0 <= value <= 1:
                raise UserError(f"DiffAugment: {name} is {value}; it must be in 0 .. 1.")
        self.seed = seed
        self.translation = translation
        self.color = color
        self.cutout = cutout
        self.probability = probability

    def __call__(self, image: Tensor, row: Tensor, purpose: str) -> Tensor:
        """image [B, C, H, W] in [-1, 1], row [B] int64 -> the same shape; draws are functions of (seed, purpose, row)."""
        # places are whole pixels whatever the image's dtype: float64 holds them, and does not round a draw up to 1
        drawn = uniform(row, (8,), seed=self.seed, purpose=f"diff_augment/{purpose}", dtype=torch.float64).view(-1, 8, 1, 1, 1)
        u = drawn.to(image.dtype)
        out = image
        if self.translation:
            out = self._shifted(out, drawn[:, 0], drawn[:, 1])
        if self.color:
            out = out + self.color * (u[:, 2] - 0.5)
            grey = out.mean(1, keepdim=True)
            out = grey + (out - grey) * (1 + self.color * (2 * u[:, 3] - 1))
            mean = out.mean((1, 2, 3), keepdim=True)
            out = mean + (out - mean) * (1 + self.color * (u[:, 4] - 0.5))
        if self.cutout:
            out = out * self._outside(out, drawn[:, 5], drawn[:, 6])
        return out if self.probability == 1 else torch.where(drawn[:, 7] < self.probability, out, image)

    def _shifted(self, image: Tensor, down: Tensor, right: Tensor) -> Tensor:
        """Whole pixels, by products with shifted identities: the same numbers, and a backward pass in a fixed order."""
        sides = image.shape[-2:]
        move_rows, move_columns = (self._move(side, drawn, image) for side, drawn in zip(sides, (down, right), strict=True))
        return move_rows @ image @ move_columns.mT

    def _move(self, side: int, drawn: Tensor, like: Tensor) -> Tensor:
        """[B, 1, side, side] with a one where output i takes input i + shift."""
        most = int(side * self.translation + 0.5)
        shift = (drawn * (2 * most + 1)).long() - most
        place = torch.arange(side, device=like.device)
        return (place.view(1, 1, 1, -1) == place.view(1, 1, -1, 1) + shift).to(like.dtype)

    def _outside(self, image: Tensor, down: Tensor, right: Tensor) -> Tensor:
        """[B, 1, H, W]: 0 in a square whose middle is anywhere."""
        inside = []
        for side, drawn in zip(image.shape[-2:], (down, right), strict=True):
            size = int(side * self.cutout + 0.5)
            first = (drawn * (side + 1 - size % 2)).long() - size // 2
            place = torch.arange(side, device=image.device).view(1, 1, -1)
            inside.append((place >= first.flatten(1).unsqueeze(-1)) & (place < first.flatten(1).unsqueeze(-1) + size))
        return ~(inside[0].unsqueeze(-1) & inside[1].unsqueeze(-2))
