"""The input of a decoder that sees what its encoder did not: places of masked patches (MAE), a caption (AIMv2)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError
from l3m_like.core.init import Init, Normal, XavierUniform, Zeros
from l3m_like.kernels.linear_cross_entropy import IGNORE
from l3m_like.layers.patch_embed import sincos_positions


class RestorePatches(ReadWriteBlock):
    """Put features back to their places, a learned token where a patch was left out, and add positions (MAE, arXiv:2111.06377).

    Reads   features [B, 1 + K, D], the class token first; restore [B, N] int64 of ``MaskPatches``, N a square number
    Writes  restored [B, 1 + N, decoder_dim]

    Args:
        dim: D.
        decoder_dim: a multiple of 4.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("restored",)

    def __init__(self, dim: int, decoder_dim: int, **ports: Any) -> None:
        super().__init__(**ports)
        if decoder_dim % 4:
            raise UserError(f"RestorePatches: decoder_dim must be a multiple of 4 for its 2-D sinusoids, got {decoder_dim}.")
        self.proj = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(decoder_dim))

    def compute(self, features: Tensor, restore: Tensor) -> Tensor:
        tokens = self.proj(features.to(self.proj.weight.dtype))
        (batch, number), dim = restore.shape, tokens.shape[-1]
        front, kept = tokens[:, :1], tokens[:, 1:]
        unseen = self.mask_token.to(tokens.dtype).expand(batch, number - kept.shape[1], dim)
        patches = torch.cat((kept, unseen), dim=1).gather(1, restore.unsqueeze(-1).expand(-1, -1, dim))
        side = math.isqrt(number)
        places = sincos_positions(side, side, dim, torch.promote_types(tokens.dtype, torch.float32), tokens.device)
        return torch.cat((front, (patches + places).to(tokens.dtype)), dim=1)

    def flops(self, features: Tensor, restore: Tensor) -> int:
        return 2 * features.shape[0] * features.shape[1] * self.proj.weight.numel()

    def tp_plan(self) -> dict[str, str]:
        return {"proj": "replicated", "mask_token": "replicated"}

    def optim_spec(self) -> dict[str, str | int]:
        return {"proj.weight": "adamw"}

    def init_spec(self) -> dict[str, Init]:
        return {"proj.weight": XavierUniform(), "proj.bias": Zeros(), "mask_token": Normal(0.02)}


class JoinCaption(ReadWriteBlock):
    """Image features and caption tokens as one sequence, the image first (AIMv2, Fini et al., arXiv:2411.14402, section 2).

    Reads   features [B, N, D]; text [B, T, decoder_dim]
    Writes  tokens [B, N + T, decoder_dim]

    Args:
        dim: D.
        decoder_dim: of the decoder.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("tokens",)

    def __init__(self, dim: int, decoder_dim: int, **ports: Any) -> None:
        super().__init__(**ports)
        self.proj = nn.Linear(dim, decoder_dim)

    def compute(self, features: Tensor, text: Tensor) -> Tensor:
        image = self.proj(features.to(self.proj.weight.dtype))
        return torch.cat((image, text.to(image.dtype)), dim=1)

    def flops(self, features: Tensor, text: Tensor) -> int:
        return 2 * features.shape[0] * features.shape[1] * self.proj.weight.numel()

    def tp_plan(self) -> dict[str, str]:
        return {"proj": "replicated"}

    def optim_spec(self) -> dict[str, str | int]:
        return {"proj.weight": "adamw"}

    def init_spec(self) -> dict[str, Init]:
        return {"proj.weight": Normal(0.02), "proj.bias": Zeros()}


class SplitCaption(ReadWriteBlock):
    """A causal decoder's output parted by what comes next: the place before each patch but the first, and before each token of
    the caption (the last patch is before the first token).

    Reads   hidden [B, N + T, D]; ids [B, T] int64; mask [B, T] bool, False: padding
    Writes  patches [B, N - 1, D]; text [B, T, D]; targets [B, T] int64, -100 where there is padding
    """

    outputs = ("patches", "text", "targets")

    def compute(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        last = hidden.shape[1] - ids.shape[1] - 1
        return hidden[:, :last], hidden[:, last:-1], torch.where(mask, ids, IGNORE)
