"""Losses on pixels of patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.layers.patch_embed import Colours, patch_pixels
from l3m_like.losses.loss import Loss


class PatchRegression(Loss):
    """Mean squared error of predicted patches: of the pixels of a patch, over the masked patches of a row, over rows.

    That is the loss of MAE (arXiv:2111.06377) and, where masked patches are those behind a prefix, of AIM (arXiv:2401.08541, eq.
    3) and AIMv2 (arXiv:2411.14402, eq. 2). With ``normalize`` a target patch has mean 0 and variance 1.

    Reads   patches [B, M, p p C], the predictions of the last M of an image's N patches, inside a patch (row, column, channel);
            image [B, C, H, W]; masked [B, N] bool: the patches that count, at least one of the last M in every row
    Counts  rows

    Args:
        patch: p.
        weight: of the term.
        normalize: each target patch by its own mean and deviation.
        colours: a ``l3m_like.layers.Colours``, which sees the image before that, as in ``PatchEmbed``.
        ports: reads, stream of ``ReadWriteBlock``.
    """

    def __init__(
        self,
        patch: int,
        weight: float | None = 1.0,
        *,
        normalize: bool = True,
        colours: Colours | None = None,
        **ports: Any,
    ) -> None:
        super().__init__(weight, **ports)
        self.patch, self.normalize = patch, normalize
        self.colours = colours

    def compute(self, patches: Tensor, image: Tensor, masked: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(patches.dtype, image.dtype), torch.float32)
        image = image.to(dtype) if self.colours is None else self.colours(image.to(dtype))
        target = patch_pixels(image, self.patch)[:, -patches.shape[1] :]
        if target.shape != patches.shape:  # broadcasting would give a number, the wrong one
            raise UserError(
                f"PatchRegression: predictions {tuple(patches.shape)} of patches {tuple(target.shape)}: equal shapes?"
            )
        if self.normalize:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        errors = (patches.to(dtype) - target).square().mean(-1)
        counted = masked[:, -patches.shape[1] :].to(dtype)
        return ((errors * counted).sum(1) / counted.sum(1)).sum()

    def count(self, row: Tensor) -> Tensor:
        return torch.tensor(row.numel(), dtype=torch.int64)
