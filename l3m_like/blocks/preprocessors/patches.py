"""Images as tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.init import Init, Normal
from l3m_like.layers.norm import make_norm, norm_spec
from l3m_like.layers.patch_embed import Colours, PatchProjection, sincos_positions

POSITIONS = ("sincos", "learned", "none")


class PatchEmbed(ReadWriteBlock):
    """Cut square images into patches, project them and add their positions.

    Reads   image [B, C, image_size, image_size]
    Writes  tokens [B, N, D], N = (image_size / patch)^2, row by row; with a class token [B, 1 + N, D]

    Args:
        image_size, patch: in pixels (or latent cells); the patch divides the image.
        channels: C.
        dim: D; a multiple of 4 for sinusoids.
        positions: "sincos": fixed 2-D sinusoids, zero for a class token; "learned" vectors, of the class token too; "none".
        class_token: put a learned token in front.
        bias: of the projection.
        norm: of the projected patches before their positions are added: "rms", "layer" or None.
        final_norm: of all tokens after that, likewise (CLIP).
        norm_eps: of both.
        colours: a ``l3m_like.layers.Colours``, which sees the images first (None: they stay as they are).
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("tokens",)

    def __init__(
        self,
        image_size: int,
        patch: int,
        channels: int,
        dim: int,
        positions: str = "sincos",
        class_token: bool = False,
        bias: bool = True,
        norm: str | None = None,
        final_norm: str | None = None,
        norm_eps: float = 1e-6,
        colours: Colours | None = None,
        **ports: Any,
    ) -> None:
        super().__init__(**ports)
        check_patch(image_size, patch)
        self.colours = colours
        if positions not in POSITIONS:
            raise UserError(f"PatchEmbed: no positions '{positions}'. {did_you_mean(positions, POSITIONS)}")
        if positions == "sincos" and dim % 4:
            raise UserError(f"PatchEmbed: dim must be a multiple of 4 for its 2-D sinusoids, got {dim}.")
        self.shape = (channels, image_size, image_size)
        self.side = image_size // patch
        self.dim = dim
        self.positions = positions
        self.projection = PatchProjection(dim, patch=patch, channels=channels, bias=bias)
        self.norm = None if norm is None else make_norm(norm, dim, norm_eps)
        self.class_token = nn.Parameter(torch.empty(dim)) if class_token else None
        self.place = nn.Parameter(torch.empty(self.side**2 + class_token, dim)) if positions == "learned" else None
        self.final_norm = None if final_norm is None else make_norm(final_norm, dim, norm_eps)

    def compute(self, image: Tensor) -> Tensor:
        if tuple(image.shape[1:]) != self.shape:
            raise UserError(
                f"PatchEmbed got images of shape {tuple(image.shape[1:])} but was built for {self.shape}: "
                "make image_size and channels those of the data."
            )
        tokens = self.projection(image if self.colours is None else self.colours(image))
        if self.norm is not None:
            tokens = self.norm(tokens)
        if self.positions == "sincos":
            dtype = torch.promote_types(tokens.dtype, torch.float32)
            tokens = (tokens + sincos_positions(self.side, self.side, self.dim, dtype, tokens.device)).to(tokens.dtype)
        if self.class_token is not None:
            tokens = torch.cat((self.class_token.to(tokens.dtype).expand(tokens.shape[0], 1, -1), tokens), dim=1)
        if self.place is not None:
            tokens = tokens + self.place.to(tokens.dtype)
        return tokens if self.final_norm is None else self.final_norm(tokens)

    def flops(self, image: Tensor) -> int:
        return self.projection.flops(image.shape[0] * self.side**2)

    def tp_plan(self) -> dict[str, str]:
        own = [name for name, _ in self.named_parameters() if not name.startswith("projection.")]
        return dict.fromkeys(own, "replicated")

    def optim_spec(self) -> dict[str, str | int]:
        return {} if self.place is None else {"place": "adamw"}

    def init_spec(self) -> dict[str, Init]:
        spec: dict[str, Init] = {name: Normal(0.02) for name in ("class_token", "place") if getattr(self, name) is not None}
        for name in ("norm", "final_norm"):
            norm = getattr(self, name)
            spec |= {} if norm is None else norm_spec(name, norm)
        return spec


def check_patch(image_size: int, patch: int) -> None:
    """An error unless ``patch`` divides ``image_size``."""
    if patch < 1 or image_size < 1 or image_size % patch:
        raise UserError(f"image_size ({image_size}) must be a multiple of patch ({patch}).")
