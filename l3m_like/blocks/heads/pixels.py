"""From tokens back to pixels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from l3m_like.blocks.preprocessors.patches import check_patch
from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError
from l3m_like.core.init import Init, Zeros
from l3m_like.layers.modulation import Modulation
from l3m_like.layers.norm import LayerNorm
from l3m_like.layers.patch_embed import unpatchify


class PatchDecode(ReadWriteBlock):
    """adaLN final layer of DiT and SiT: norm, modulation, linear map to patches (zero-initialised), image.

    Reads   hidden [B, N, D]; condition [B, D]
    Writes  image [B, channels, image_size, image_size] in the weight's dtype

    Args:
        dim: D.
        image_size, patch: as in ``PatchEmbed``.
        channels: of the written image.
        out_channels: that the linear map computes (None: ``channels``). SiT's published models compute twice as many
            (a learned variance) and use the first half.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("image",)

    def __init__(
        self, dim: int, image_size: int, patch: int, channels: int, out_channels: int | None = None, **ports: Any
    ) -> None:
        super().__init__(**ports)
        check_patch(image_size, patch)
        out_channels = channels if out_channels is None else out_channels
        if out_channels < channels:
            raise UserError(f"PatchDecode: out_channels ({out_channels}) must be at least channels ({channels}).")
        self.image_size = image_size
        self.patch = patch
        self.channels = channels
        self.norm = LayerNorm(dim)
        self.modulation = Modulation(dim, 2)
        self.proj = nn.Linear(dim, patch * patch * out_channels)

    def compute(self, hidden: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition)
        patches = self.proj(self.norm(hidden.to(self.proj.weight.dtype), shift, scale))
        return unpatchify(patches, self.patch, self.image_size, self.image_size)[:, : self.channels]

    def flops(self, hidden: Tensor, condition: Tensor) -> int:
        tokens = hidden.shape[0] * hidden.shape[1]
        return self.modulation.flops(hidden.shape[0]) + 2 * tokens * self.proj.in_features * self.proj.out_features

    def tp_plan(self) -> dict[str, str]:
        return {"proj": "replicated"}

    def optim_spec(self) -> dict[str, str | int]:
        return {"proj.weight": "adamw"}

    def init_spec(self) -> dict[str, Init]:
        return {"proj.weight": Zeros(), "proj.bias": Zeros()}
