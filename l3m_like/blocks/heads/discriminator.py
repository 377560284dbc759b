"""A discriminator of reconstructions and images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError
from l3m_like.core.meta_model import Frozen
from l3m_like.layers.diff_augment import DiffAugment
from l3m_like.layers.discriminator import SpectralConv


class Discriminator(ReadWriteBlock):
    """Tells reconstructions from images; both are augmented first (training GANs with limited data, arXiv:2006.10738).

    Where it is trained, it sees both, the reconstruction in the 256 steps that an image has. An update that trains the generator
    names it in `inference`: then it sees the reconstruction alone, and gradients go through it.

    Reads   reconstruction [B, C, H, W]; row [B] int64; image [B, C, H, W] (for real_logits), both in [-1, 1]
    Writes  fake_logits [B, L], and in the training graph real_logits [B, L], in at least float32

    Args:
        pixels: ``pixels(images)`` -> logits [B, L], such as ``l3m_like.layers.PatchDiscriminator``.
        tokens: instead, ``tokens(features)`` -> logits [B, L]: ``l3m_like.layers.TokenDiscriminator``.
        features: of which tokens: a Frozen that passes gradients, around ``ImageFeatures``.
        augment: of what it sees; None: nothing is changed.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("fake_logits", "real_logits")
    optional_outputs = ("fake_logits", "real_logits")
    inference_outputs = ("fake_logits",)

    def __init__(
        self,
        pixels: nn.Module | None = None,
        tokens: nn.Module | None = None,
        features: Frozen | None = None,
        augment: DiffAugment | None = None,
        writes: Any = ("fake_logits", "real_logits"),
        **ports: Any,
    ) -> None:
        super().__init__(writes=writes, **ports)
        if features is not None and not (isinstance(features, Frozen) and features.passes_gradients):
            raise UserError("Discriminator: features must be a Frozen with passes_gradients: true, or no generator would learn.")
        network = pixels if tokens is None else tokens
        if network is None or (pixels is not None and tokens is not None) or (tokens is None) != (features is None):
            raise UserError("Discriminator: give either pixels (a network on images) or tokens and features (of a frozen one).")
        self.features = features
        self.network = network
        self.augment = augment

    def compute(
        self, reconstruction: Tensor, row: Tensor, image: Tensor | None = None, *, outputs: Sequence[str]
    ) -> dict[str, Tensor]:
        if "real_logits" not in outputs:
            return {"fake_logits": self._logits(self._changed(reconstruction, row, "fake"))}
        if image is None:
            raise UserError(f"Discriminator writes real_logits, which needs the key '{self.reads['image']}'.")
        fake = self._changed(to_8_bit(reconstruction), row, "fake")
        real = self._changed(image.to(fake.dtype), row, "real")
        logits = self._logits(torch.cat((fake, real))).chunk(2)
        return {name: value for name, value in zip(self.outputs, logits, strict=True) if name in outputs}

    def _changed(self, image: Tensor, row: Tensor, purpose: str) -> Tensor:
        return image if self.augment is None else self.augment(image, row, f"{self.stream or ''}/{purpose}")

    def _logits(self, image: Tensor) -> Tensor:
        seen = image if self.features is None else self.features({"image": image})["features"]
        logits = self.network(seen)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def after_step(self, mesh: Any, skipped: Tensor | None = None) -> None:
        for module in self.network.modules():
            if isinstance(module, SpectralConv):
                weight = module.weight
                module.follow(weight.full_tensor() if isinstance(weight, DTensor) else weight, skipped)

    def flops(self, reconstruction: Tensor, row: Tensor, image: Tensor | None = None) -> int:
        network: Any = self.network
        if self.features is None:
            once = network.flops(reconstruction)
        else:
            block: Any = next(block for _, block in self.features.model.blocks())
            once = block.flops(reconstruction) + network.flops(torch.empty(block.shape(reconstruction), device="meta"))
        return once if image is None else 2 * once


def to_8_bit(image: Tensor) -> Tensor:
    """Clipped to [-1, 1] and rounded to the 256 steps of a stored image; the gradient is that of the clipping alone."""
    clipped = image.clamp(-1, 1)
    return clipped + (((clipped + 1) * 127.5).round() / 127.5 - 1 - clipped).detach()
