"""Flow-matching loss."""

from __future__ import annotations

import torch
from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.losses.loss import Loss


class FlowMatching(Loss):
    """Mean squared error of the predicted velocity, over rows, channels and pixels of the whole step.

    Reads   velocity_pred, velocity [B, C, H, W]; optional only [B] bool: the rows that count
    Counts  elements of the loader's image [B, C, H, W] (in these rows)
    """

    def compute(self, velocity_pred: Tensor, velocity: Tensor, only: Tensor | None = None) -> Tensor:
        if velocity_pred.shape != velocity.shape:  # broadcasting would give a number, the wrong one
            raise UserError(
                f"FlowMatching: the prediction has shape {tuple(velocity_pred.shape)}, the target {tuple(velocity.shape)}."
            )
        dtype = torch.promote_types(torch.promote_types(velocity_pred.dtype, velocity.dtype), torch.float32)
        squares = (velocity_pred.to(dtype) - velocity.to(dtype)).square()
        return squares.sum() if only is None else torch.where(only, squares.flatten(1).sum(1), 0).sum()

    def count(self, image: Tensor, only: Tensor | None = None) -> Tensor:
        if only is None:
            return torch.tensor(image.numel(), dtype=torch.int64)
        return only.sum() * image[0].numel()
