"""What processors of pictures share: from an encoded picture to an array."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from l3m_like.core.errors import UserError
from l3m_like.core.keys import KeySpec
from l3m_like.data.augmentations import Augmentation, MiddleCrop, RandomResizedCrop

if TYPE_CHECKING:
    from PIL.Image import Image

    from l3m_like.data.dataset import Visit

EXTENSIONS = ("png", "jpg", "jpeg", "webp")


class Pixels:
    """A picture -> float32 [channels, size, size] in [-1, 1].

    Args:
        size: side of the square picture in pixels; one of another size is cut to a square around its middle and resized
            (bicubic).
        channels: 1 (grey) or 3 (RGB).
        flip: mirror left-right with chance 1/2, drawn anew for every sample and epoch.
        crop: takes another part than the whole middle.
        augment: further changes of the square, in this order.

    A picture is turned as its EXIF data says; 16 bits become 8; what is transparent becomes white.

    Raises:
        UserError: other channels; a picture that cannot be decoded.
    """

    unit = "images"

    def __init__(
        self,
        size: int,
        channels: int = 3,
        flip: bool = False,
        crop: RandomResizedCrop | MiddleCrop | None = None,
        augment: Sequence[Augmentation] = (),
    ) -> None:
        if channels not in (1, 3):
            raise UserError(f"channels is {channels}; it is 1 (grey) or 3 (RGB).")
        if size < 1:
            raise UserError(f"size is {size}; it is a number of pixels, at least 1.")
        self.size = size
        self.channels = channels
        self.flip = flip
        self.crop = crop
        self.augment = tuple(augment)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    def image_keys(self) -> dict[str, KeySpec]:
        return {"image": KeySpec(torch.float32, self.shape, meaning="pixels in [-1, 1]")}

    def check(self) -> None:
        """Nothing to read ahead."""

    def image_of(self, sample: Mapping[str, bytes], visit: Visit) -> np.ndarray:
        """The sample's picture, float32 [channels, size, size]."""
        extension = next((name for name in EXTENSIONS if name in sample), None)
        if extension is None:
            raise UserError(f"the sample has {sorted(sample)}; it needs one of {list(EXTENSIONS)}.")
        return self.array(decode(sample[extension], self.channels), visit)

    def array(self, image: Image, visit: Visit) -> np.ndarray:
        """float32 [channels, size, size] of a decoded picture; with the same ``visit`` the same part and the same changes."""
        from PIL import Image as Images  # only data workers need it
        from PIL import ImageOps

        square, bicubic = (self.size, self.size), Images.Resampling.BICUBIC
        if self.crop is not None:
            image = image.resize(square, bicubic, box=self.crop.box(*image.size, visit.draws("crop")))
        elif image.size != square:
            image = ImageOps.fit(image, square, method=bicubic)
        if self.flip and visit.uniform("flip") < 0.5:
            image = ImageOps.mirror(image)
        for place, change in enumerate(self.augment):
            image = change(image, visit.draws(f"augment/{place}"))
        pixels = np.asarray(image, dtype=np.float32).reshape(self.size, self.size, self.channels)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1) / np.float32(127.5) - 1)

    def visible(self, array: np.ndarray) -> np.ndarray:
        """uint8 [.., size, size, channels] of what ``array`` made, [.., channels, size, size]: for people to look at."""
        pixels = np.moveaxis((array + 1) * 127.5, -3, -1)
        return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def decode(content: bytes, channels: int) -> Image:
    """The picture upright, of mode ``L`` (1 channel) or ``RGB`` (3).

    Raises:
        UserError: it cannot be decoded; with what PIL says.
    """
    from PIL import Image as Images
    from PIL import ImageOps

    try:
        with Images.open(io.BytesIO(content)) as opened:
            opened.load()  # here a cut-off file is found
            image = ImageOps.exif_transpose(opened)
    except Exception as error:  # broken files raise OSError, SyntaxError, ValueError, struct.error ..
        raise UserError(f"the picture cannot be decoded: {type(error).__name__}: {error}") from error
    if image.mode.startswith("I"):  # 16 bits of grey, which PIL would cut off at 255
        levels: Any = np.asarray(image).astype(np.int64)
        image = Images.fromarray(np.clip((levels + 128) // 257, 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Images.alpha_composite(Images.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")
