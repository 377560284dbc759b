"""Images as tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError
from l3m_like.layers.patch_embed import PatchProjection, sincos_positions


class PatchEmbed(ReadWriteBlock):
    """Cut square images into patches, project them and add fixed 2-D sinusoids.

    Reads   image [B, C, image_size, image_size]
    Writes  tokens [B, N, D], N = (image_size / patch)^2, row by row

    Args:
        image_size, patch: in pixels (or latent cells); the patch divides the image.
        channels: C.
        dim: D, a multiple of 4.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("tokens",)

    def __init__(self, image_size: int, patch: int, channels: int, dim: int, **ports: Any) -> None:
        super().__init__(**ports)
        check_patch(image_size, patch)
        if dim % 4:
            raise UserError(f"PatchEmbed: dim must be a multiple of 4 for its 2-D sinusoids, got {dim}.")
        self.shape = (channels, image_size, image_size)
        self.side = image_size // patch
        self.dim = dim
        self.projection = PatchProjection(dim, patch=patch, channels=channels)

    def compute(self, image: Tensor) -> Tensor:
        if tuple(image.shape[1:]) != self.shape:
            raise UserError(
                f"PatchEmbed got images of shape {tuple(image.shape[1:])} but was built for {self.shape}: "
                "make image_size and channels those of the data."
            )
        tokens = self.projection(image)
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        return (tokens + sincos_positions(self.side, self.side, self.dim, dtype, tokens.device)).to(tokens.dtype)

    def flops(self, image: Tensor) -> int:
        return self.projection.flops(image.shape[0] * self.side**2)


def check_patch(image_size: int, patch: int) -> None:
    """An error unless ``patch`` divides ``image_size``."""
    if patch < 1 or image_size < 1 or image_size % patch:
        raise UserError(f"image_size ({image_size}) must be a multiple of patch ({patch}).")
