"""Flow-matching and diffusion loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.losses.loss import Loss


class FlowMatching(Loss):
    """Mean squared error of a prediction on a noised image, over rows, channels and pixels of the whole step.

    Reads   prediction, target [B, C, H, W]; flow_weight [B], factors on the rows' squared errors; optional only [B] bool: the
            rows that count
    Counts  elements of the loader's image [B, C, H, W] (in these rows)

    Args:
        elements: of a row, where what is noised is a latent that the model makes of the loader's image (None: the image's own).
            Data without one maps the port ``image`` to another of its keys, e.g. ``row``.
        settings: weight, start, reads, stream of ``Loss``.
    """

    def __init__(self, elements: int | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        if elements is not None and elements < 1:
            raise UserError(f"FlowMatching: elements is {elements}; it is the product of a latent's channels and sides.")
        self.elements = elements

    def compute(self, prediction: Tensor, target: Tensor, flow_weight: Tensor, only: Tensor | None = None) -> Tensor:
        if prediction.shape != target.shape:  # broadcasting would give a number, the wrong one
            raise UserError(f"FlowMatching: prediction {tuple(prediction.shape)} and target {tuple(target.shape)}: equal shapes?")
        if self.elements not in (None, prediction[0].numel()):
            raise UserError(f"FlowMatching: elements is {self.elements}, but a row has {prediction[0].numel()}.")
        dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
        squares = (prediction.to(dtype) - target.to(dtype)).square().flatten(1).sum(1) * flow_weight.to(dtype)
        return squares.sum() if only is None else torch.where(only, squares, 0).sum()

    def count(self, image: Tensor, only: Tensor | None = None) -> Tensor:
        elements = self.elements or image[0].numel()
        return torch.tensor(len(image) * elements, dtype=torch.int64) if only is None else only.sum() * elements
