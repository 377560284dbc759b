"""An image and its class."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from l3m_like.core.errors import UserError
from l3m_like.core.keys import KeySpec

if TYPE_CHECKING:
    from l3m_like.data.dataset import Visit

EXTENSIONS = ("png", "jpg", "jpeg", "webp")


class ClassImage:
    """``png``/``jpg``/``jpeg``/``webp`` and ``cls`` -> ``image`` float32 [C, size, size] in [-1, 1], ``image_label`` int64 [].

    Args:
        size: side of the square image in pixels; one of another size is cut to a square around its middle and resized
            (bicubic).
        channels: 1 (grey) or 3 (RGB).
        flip: mirror left-right with chance 1/2, drawn anew for every sample and epoch.

    Raises:
        UserError: other channels; a sample without image or class.
    """

    unit = "images"

    def __init__(self, size: int, channels: int = 3, flip: bool = False) -> None:
        if channels not in (1, 3):
            raise UserError(f"channels is {channels}; it is 1 (grey) or 3 (RGB).")
        if size < 1:
            raise UserError(f"size is {size}; it is a number of pixels, at least 1.")
        self.size = size
        self.channels = channels
        self.flip = flip

    def keys(self) -> dict[str, KeySpec]:
        return {
            "image": KeySpec(torch.float32, (self.channels, self.size, self.size), meaning="pixels in [-1, 1]"),
            "image_label": KeySpec(torch.int64, (), meaning="class number"),
        }

    def check(self) -> None:
        """Nothing to read ahead."""

    def __call__(self, sample: Mapping[str, bytes], visit: Visit) -> dict[str, np.ndarray]:
        from PIL import Image, ImageOps  # only data workers need it

        extension = next((name for name in EXTENSIONS if name in sample), None)
        if extension is None or "cls" not in sample:
            raise UserError(f"the sample has {sorted(sample)}; it needs 'cls' and one of {list(EXTENSIONS)}.")
        image = Image.open(io.BytesIO(sample[extension])).convert("L" if self.channels == 1 else "RGB")
        if image.size != (self.size, self.size):
            image = ImageOps.fit(image, (self.size, self.size), method=Image.Resampling.BICUBIC)
        if self.flip and visit.uniform("flip") < 0.5:
            image = ImageOps.mirror(image)
        pixels = np.asarray(image, dtype=np.float32).reshape(self.size, self.size, self.channels) / 127.5 - 1.0
        label = np.array(int(sample["cls"]), dtype=np.int64)
        return {"image": np.ascontiguousarray(pixels.transpose(2, 0, 1)), "image_label": label}
