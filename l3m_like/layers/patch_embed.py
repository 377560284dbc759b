"""Images as rows of patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from l3m_like.core.errors import UserError
from l3m_like.core.init import Init, XavierUniform, Zeros


def patchify(image: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, N, C*p*p]; patches row by row, inside one in the order (C, p, p) of a convolution's weight."""
    batch, channels, height, width = image.shape
    grid = image.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def unpatchify(patches: Tensor, patch: int, height: int, width: int) -> Tensor:
    """[B, N, p*p*C] -> [B, C, H, W]; inside a patch in the order (p, p, C), which is that of DiT and SiT."""
    batch = patches.shape[0]
    grid = patches.reshape(batch, height // patch, width // patch, patch, patch, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)


def patch_pixels(image: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, N, p*p*C]: patches row by row, inside one in the order (p, p, C), that of ``unpatchify``."""
    return patchify(image, patch).unflatten(-1, (image.shape[1], -1)).mT.flatten(-2)


def sincos_positions(rows: int, columns: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fixed 2-D sinusoids [rows*columns, dim]: the first half encodes the column, the second the row, each
    ``[sin | cos]`` with frequencies 10000^(-i / (dim/4)) (as MAE, DiT and SiT). Computed in float64, once per forward."""
    column = torch.arange(columns, device=device).repeat(rows)
    row = torch.arange(rows, device=device).repeat_interleave(columns)
    return sincos_at(row, column, dim).to(dtype)


def sincos_at(row: Tensor, column: Tensor, dim: int) -> Tensor:
    """As ``sincos_positions``, of places [...] int64 -> [..., dim] float64."""
    quarter = dim // 4
    frequency = 10000.0 ** (-torch.arange(quarter, device=row.device).double() / quarter)
    angles = [place.double().unsqueeze(-1) * frequency for place in (column, row)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=-1)


class PatchProjection(nn.Module):
    """Linear map of image patches: [B, C, H, W] -> [B, N, D] (a convolution with stride = kernel = patch)."""

    def __init__(self, dim: int, *, patch: int, channels: int, bias: bool = True) -> None:
        super().__init__()
        if patch < 1:
            raise UserError(f"patch must be at least 1, got {patch}.")
        self.patch = patch
        self.proj = nn.Linear(channels * patch * patch, dim, bias=bias)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(patchify(image.to(self.proj.weight.dtype), self.patch))

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.proj.in_features * self.proj.out_features

    def tp_plan(self) -> dict[str, str]:
        return {"proj": "replicated"}

    def optim_spec(self) -> dict[str, str | int]:
        return {"proj.weight": "adamw"}

    def init_spec(self) -> dict[str, Init]:
        spec: dict[str, Init] = {"proj.weight": XavierUniform()}
        return spec if self.proj.bias is None else spec | {"proj.bias": Zeros()}


class Colours:
    """Takes the mean and deviation of the colours out of images in [-1, 1]: [B, C, H, W] -> (pixel in [0, 1] - mean) / std.

    Args:
        mean, std: of the colours in [0, 1], a number for each channel.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        if len(mean) != len(std) or min(std) <= 0:
            raise UserError(f"Colours: mean {list(mean)} and std {list(std)}: a number for each channel, std above 0.")
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, image: Tensor) -> Tensor:
        if image.shape[1] != len(self.mean):
            raise UserError(f"Colours: images have {image.shape[1]} channels, mean and std {len(self.mean)} numbers.")
        mean, std = (per_channel(image, numbers) for numbers in (self.mean, self.std))
        return ((image + 1) / 2 - mean) / std


def per_channel(like: Tensor, numbers: Sequence[float]) -> Tensor:
    """``numbers`` as [1, C, 1, 1] of the dtype and device of ``like``; by fills, which do not wait for the device."""
    return torch.stack([like.new_full((), number) for number in numbers]).view(1, -1, 1, 1)
