"""Flow-matching and diffusion loss."""

from __future__ import annotations

import torch
from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.losses.loss import Loss


class FlowMatching(Loss):
    """Mean squared error of a prediction on a noised image, over rows, channels and pixels of the whole step.

    Reads   prediction, target [B, C, H, W]; flow_weight [B], factors on the rows' squared errors; optional only [B] bool: the
            rows that count
    Counts  elements of the loader's image [B, C, H, W] (in these rows)
    """

    def compute(self, prediction: Tensor, target: Tensor, flow_weight: Tensor, only: Tensor | None = None) -> Tensor:
        if prediction.shape != target.shape:  # broadcasting would give a number, the wrong one
            raise UserError(f"FlowMatching: prediction {tuple(prediction.shape)} and target {tuple(target.shape)}: equal shapes?")
        dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
        squares = (prediction.to(dtype) - target.to(dtype)).square().flatten(1).sum(1) * flow_weight.to(dtype)
        return squares.sum() if only is None else torch.where(only, squares, 0).sum()

    def count(self, image: Tensor, only: Tensor | None = None) -> Tensor:
        if only is None:
            return torch.tensor(image.numel(), dtype=torch.int64)
        return only.sum() * image[0].numel()
