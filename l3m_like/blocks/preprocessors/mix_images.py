"""Two images as one, with both their labels: mixup and CutMix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError
from l3m_like.core.random import uniform

#: tries of Johnk's method for a Beta variate; with a parameter up to 1, at most one row in 2^32 has none that is taken
_TRIES = 32


class MixImages(ReadWriteBlock):
    """Mix every image with its partner, by mixup (Zhang et al., arXiv:1710.09412) or CutMix (Yun et al., arXiv:1905.04899).

    Rows 0 and 1 of a batch are partners, 2 and 3, and so on (samples come in random order). Partners share a rank and a
    micro-batch, and each row draws for itself, so that how a batch is split changes nothing. In evaluation mode images stay.

    Reads   image [B, C, H, W]; label [B] int64; row [B] int64; B is even in training
    Writes  mixed [B, C, H, W]; partner_label [B] int64; partner_weight [B] float32, the partner's part of the image

    Args:
        seed: of the run; draws are functions of (seed, stream, row).
        mixup, cutmix: parameter of their Beta distributions, above 0 and at most 1 (None: not used); with both, a row takes one.
        probability: that a row is mixed at all.
        cutmix_share: of the mixed rows, where both are used.
        ports: reads, writes, stream of ``ReadWriteBlock``.
    """

    outputs = ("mixed", "partner_label", "partner_weight")

    def __init__(
        self,
        seed: int,
        mixup: float | None = 0.8,
        cutmix: float | None = 1.0,
        probability: float = 1.0,
        cutmix_share: float = 0.5,
        **ports: Any,
    ) -> None:
        super().__init__(**ports)
        if mixup is None and cutmix is None:
            raise UserError("MixImages: mixup and cutmix are both null; remove the block.")
        for name, value in (("mixup", mixup), ("cutmix", cutmix)):
            if value is not None and not 0 < value <= 1:
                raise UserError(f"MixImages: {name} is {value}; it is above 0 and at most 1, or null.")
        for name, value in (("probability", probability), ("cutmix_share", cutmix_share)):
            if not 0 <= value <= 1:
                raise UserError(f"MixImages: {name} is {value}; it is in 0 .. 1.")
        self.seed, self.mixup, self.cutmix, self.probability = seed, mixup, cutmix, probability
        self.cutmix_share = 1.0 if mixup is None else 0.0 if cutmix is None else cutmix_share

    def compute(self, image: Tensor, label: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.training:
            return image, label, torch.zeros_like(row, dtype=torch.float32)
        if image.shape[0] % 2:
            raise UserError(
                f"MixImages: {image.shape[0]} rows in a micro-batch; make batch.micro even, so that each has a partner."
            )
        partner = image.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        choice, cuts, y, x = self._uniform(row, (4,), "choice").unbind(1)
        cut = cuts < self.cutmix_share
        part = self._beta(row, self.mixup or 1.0, "mixup")
        box, area = self._box(image, self._beta(row, self.cutmix or 1.0, "cutmix"), y, x)
        mixed = torch.where(choice < self.probability, 1.0, 0.0)
        weight = torch.where(cut, area, part) * mixed
        share = torch.where(cut.view(-1, 1, 1, 1), box, part.view(-1, 1, 1, 1)) * mixed.view(-1, 1, 1, 1)
        other = label.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        return torch.lerp(image, partner, share.to(image.dtype)), other, weight.to(torch.float32)

    def _uniform(self, row: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
        return uniform(row, shape, seed=self.seed, purpose=f"mix_images/{self.stream or ''}/{what}", dtype=torch.float64)

    def _beta(self, row: Tensor, a: float, what: str) -> Tensor:
        """Beta(a, a) variates [B] by Johnk's method: x / (x + y) of the first pair u^(1/a), v^(1/a) whose sum is at most 1."""
        pairs = self._uniform(row, (_TRIES, 2), what) ** (1 / a)
        total = pairs.sum(-1)
        first = (total <= 1).to(torch.int8).argmax(1, keepdim=True)
        return (pairs[..., 0] / total).gather(1, first).squeeze(1)

    def _box(self, image: Tensor, part: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """A box [B, 1, H, W] around the place (y, x), of ``part`` of the area where the image does not end first; its area."""
        inside = []
        for size, centre in ((image.shape[2], y), (image.shape[3], x)):
            half, middle = (part.sqrt() * size).long() // 2, (centre * size).long()
            place = torch.arange(size, device=image.device)
            inside.append((place >= (middle - half)[:, None]) & (place < (middle + half)[:, None]))
        box = (inside[0][:, None, :, None] & inside[1][:, None, None, :]).to(part.dtype)
        return box, box.mean((1, 2, 3))
