"""Pretrained image encoders as blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError
from l3m_like.layers.timm_vit import TimmViT


def three_colours(image: Tensor) -> Tensor:
    """[B, 1 or 3, H, W] -> [B, 3, H, W]; grey images three times."""
    if image.shape[1] not in (1, 3):
        raise UserError(f"images have {image.shape[1]} channels; an encoder of pictures takes 1 (grey) or 3.")
    return image.expand(-1, 3, -1, -1)


class ImageEncoder(ReadWriteBlock):
    """The patch tokens of a vision transformer as a latent image: the encoder of a representation autoencoder (RAE,
    arXiv:2510.11690). It belongs into a ``Frozen``, with its weights from ``init.parts``: a folder of timm, or its hub's name.

    Reads   image [B, 1 or 3, H, W] in [-1, 1]
    Writes  latent [B, D, h, w], normalised per place (LayerNorm without weights), in the weights' dtype

    Args:
        encoder: ``l3m_like.layers.TimmViT``.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("latent",)

    def __init__(self, encoder: TimmViT, **ports: Any) -> None:
        super().__init__(**ports)
        self.encoder = encoder

    def compute(self, image: Tensor) -> Tensor:
        return self.encoder(three_colours(image)).mT.unflatten(-1, self.encoder.grid(image))

    def shard_units(self) -> Iterable[nn.Module]:
        return self.encoder.model.blocks

    def flops(self, image: Tensor) -> int:
        return self.encoder.flops(image)


class ImageFeatures(ReadWriteBlock):
    """What some layers of a vision transformer put out, without its last norm: what a discriminator looks at.

    Reads   image [B, 1 or 3, H, W] in [-1, 1]
    Writes  features [B, K, N, D]

    Args:
        encoder: ``l3m_like.layers.TimmViT``.
        layers: numbers of K layers, from 0, ascending.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("features",)

    def __init__(self, encoder: TimmViT, layers: Sequence[int], **ports: Any) -> None:
        super().__init__(**ports)
        depth = len(encoder.model.blocks)
        if not layers or list(layers) != sorted(set(layers)) or not 0 <= min(layers) <= max(layers) < depth:
            raise UserError(f"ImageFeatures: layers is {list(layers)}; numbers below {depth}, in ascending order.")
        self.encoder = encoder
        self.layers = tuple(layers)

    def compute(self, image: Tensor) -> Tensor:
        return self.encoder.hidden(three_colours(image), self.layers)

    def shape(self, image: Tensor) -> tuple[int, int, int, int]:
        """(B, K, N, D) for images [B, C, H, W]."""
        rows, columns = self.encoder.grid(image)
        return len(image), len(self.layers), rows * columns, self.encoder.dim

    def shard_units(self) -> Iterable[nn.Module]:
        return self.encoder.model.blocks

    def flops(self, image: Tensor) -> int:
        return self.encoder.flops(image, max(self.layers) + 1)
