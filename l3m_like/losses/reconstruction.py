"""Losses and metrics of reconstructed images in [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from l3m_like.losses.loss import Loss


class PixelL1(Loss):
    """Mean absolute difference, over rows, channels and pixels. (In units of [0, 1] it is half as large.)

    Reads   reconstruction, image [B, C, H, W]
    Counts  elements of the loader's image
    """

    def compute(self, reconstruction: Tensor, image: Tensor) -> Tensor:
        dtype = torch.promote_types(reconstruction.dtype, torch.float32)
        return (reconstruction.to(dtype) - image.to(dtype)).abs().sum()

    def count(self, image: Tensor) -> Tensor:
        return torch.tensor(image.numel(), dtype=torch.int64)


class MeanLPIPS(Loss):
    """Mean perceptual distance of the rows.

    Reads   lpips [B] (``l3m_like.blocks.PerceptualDistance``)
    Counts  rows of the loader's image [B, C, H, W]
    """

    def compute(self, lpips: Tensor) -> Tensor:
        return lpips.sum()

    def count(self, image: Tensor) -> Tensor:
        return torch.tensor(len(image), dtype=torch.int64)


class PSNR(Loss):
    """Peak signal-to-noise ratio in dB, a mean over rows: ``10 log10(4 / mean squared difference)`` after clipping to [-1, 1].

    Reads   reconstruction, image [B, C, H, W]
    Counts  rows of the loader's image
    """

    def compute(self, reconstruction: Tensor, image: Tensor) -> Tensor:
        dtype = torch.promote_types(reconstruction.dtype, torch.float32)
        return psnr(reconstruction.detach().to(dtype), image.to(dtype)).sum()

    def count(self, image: Tensor) -> Tensor:
        return torch.tensor(len(image), dtype=torch.int64)


def psnr(reconstruction: Tensor, image: Tensor) -> Tensor:
    """[B, C, H, W] x 2 in [-1, 1] -> [B], in dB; 120 at most, where the images are equal."""
    squares = (reconstruction.clamp(-1, 1) - image).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / squares.clamp(min=4e-12))
