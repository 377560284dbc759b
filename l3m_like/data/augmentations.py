"""Random changes of a picture. Each is a function of (picture, draws): the draws alone decide."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from l3m_like.core.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from l3m_like.data.dataset import Draws

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


class Augmentation(Protocol):
    def __call__(self, image: Image, draws: Draws) -> Image:
        """A picture of the same size and mode (``L`` or ``RGB``)."""


class RandomResizedCrop:
    """A part of random area and shape; it is then resized to the square.

    Args:
        scale: least and greatest area, as parts of the whole picture's.
        ratio: least and greatest width / height; its logarithm is uniform.

    Ten tries; a picture too long for all of them gives its middle, in the nearest allowed shape. Source: Szegedy et al.,
    "Going deeper with convolutions" (2015); as in torchvision.
    """

    def __init__(self, scale: Sequence[float] = (0.08, 1.0), ratio: Sequence[float] = (3 / 4, 4 / 3)) -> None:
        for name, (low, high), most in (("scale", scale, 1.0), ("ratio", ratio, math.inf)):
            if not 0 < low <= high <= most:
                raise UserError(f"{name} is [{low}, {high}]; it is the least and the greatest, above 0 and at most {most}.")
        self.scale = scale
        self.ratio = ratio

    def box(self, width: int, height: int, draws: Draws) -> Box:
        """What to cut out of a picture of this size."""
        for _ in range(10):
            area = width * height * draws.uniform(*self.scale)
            ratio = math.exp(draws.uniform(*map(math.log, self.ratio)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = draws.integer(width - w + 1), draws.integer(height - h + 1)
                return left, top, left + w, top + h
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


class MiddleCrop:
    """The middle square of a picture; it is then resized.

    Args:
        part: of the shorter side (0.875: as if it were 256 pixels long, and 224 of them cut out).
    """

    def __init__(self, part: float) -> None:
        if not 0 < part <= 1:
            raise UserError(f"MiddleCrop: part is {part}; it is above 0 and at most 1.")
        self.part = part

    def box(self, width: int, height: int, draws: Draws) -> Box:
        """What to cut out of a picture of this size."""
        side = min(width, height) * self.part
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side


class ColorJitter:
    """Brightness, contrast, saturation and hue, each changed at random, in random order.

    Args:
        brightness, contrast, saturation: x: the factor is uniform in (max(0, 1 - x), 1 + x).
        hue: x at most 0.5: the hue is turned by a uniform in (-x, x) of the circle.
        probability: that a picture is changed at all.

    Raises:
        UserError: a negative argument, hue above 0.5, or none; no probability; a grey picture with ``saturation`` or ``hue``.
    """

    def __init__(
        self,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
        *,
        probability: float = 1.0,
    ) -> None:
        self.amounts = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
        if min(self.amounts.values()) < 0 or hue > 0.5 or not any(self.amounts.values()):
            raise UserError(f"ColorJitter has {self.amounts}; they are at least 0, hue at most 0.5, and one is above 0.")
        if not 0 < probability <= 1:
            raise UserError(f"ColorJitter: probability is {probability}; it is above 0 and at most 1.")
        self.probability = probability

    def __call__(self, image: Image, draws: Draws) -> Image:
        if image.mode == "L" and (self.amounts["saturation"] or self.amounts["hue"]):
            raise UserError("ColorJitter: a grey picture has no saturation and no hue. Set both to 0, or channels: 3.")
        if self.probability < 1 and draws.uniform() >= self.probability:
            return image
        names = list(self.amounts)
        for place in draws.permutation(len(names)):
            amount = self.amounts[names[place]]
            if not amount:
                continue
            if names[place] == "hue":
                image = _turn_hue(image, draws.uniform(-amount, amount))
            else:
                image = _enhance(image, names[place], draws.uniform(max(0.0, 1 - amount), 1 + amount))
        return image


class RandAugment:
    """``operations`` changes of strength ``magnitude``, each one of fourteen.

    Args:
        operations: how many, one after the other.
        magnitude: from 0 to 30.

    Source: Cubuk et al., "RandAugment: practical automated data augmentation" (2020), with torchvision's ranges. Corners that
    come into the picture are black.
    """

    def __init__(self, operations: int = 2, magnitude: int = 9) -> None:
        if operations < 1 or not 0 <= magnitude <= 30:
            raise UserError(f"RandAugment has operations {operations} (at least 1) and magnitude {magnitude} (0 to 30).")
        self.operations = operations
        self.magnitude = magnitude

    def __call__(self, image: Image, draws: Draws) -> Image:
        table = _operations(self.magnitude / 30, image.size)
        names = list(table)
        for _ in range(self.operations):
            operation = table[names[draws.integer(len(names))]]
            image = operation(image, 1.0 if draws.uniform() < 0.5 else -1.0)
        return image


def _operations(m: float, size: tuple[int, int]) -> dict[str, Callable[[Image, float], Image]]:
    """The operations at strength ``m`` in [0, 1], as functions of (picture, sign)."""
    from PIL import ImageOps  # only data workers need it

    middle = (size[0] / 2, size[1] / 2)
    return {
        "identity": lambda image, sign: image,
        # sheared about the upper left corner, as torchvision does
        "shear_x": lambda image, sign: _affine(image, (1, sign * 0.3 * m, 0, 0, 1, 0)),
        "shear_y": lambda image, sign: _affine(image, (1, 0, 0, sign * 0.3 * m, 1, 0)),
        "translate_x": lambda image, sign: _affine(image, (1, 0, sign * int(150 / 331 * size[0] * m), 0, 1, 0)),
        "translate_y": lambda image, sign: _affine(image, (1, 0, 0, 0, 1, sign * int(150 / 331 * size[1] * m))),
        "rotate": lambda image, sign: image.rotate(sign * 30 * m, center=middle),
        "brightness": lambda image, sign: _enhance(image, "brightness", 1 + sign * 0.9 * m),
        "saturation": lambda image, sign: _enhance(image, "saturation", 1 + sign * 0.9 * m),
        "contrast": lambda image, sign: _enhance(image, "contrast", 1 + sign * 0.9 * m),
        "sharpness": lambda image, sign: _enhance(image, "sharpness", 1 + sign * 0.9 * m),
        "posterize": lambda image, sign: ImageOps.posterize(image, 8 - round(4 * m)),
        "solarize": lambda image, sign: ImageOps.solarize(image, round(255 * (1 - m))),
        "autocontrast": lambda image, sign: ImageOps.autocontrast(image),
        "equalize": lambda image, sign: ImageOps.equalize(image),
    }


def _affine(image: Image, coefficients: Sequence[float]) -> Image:
    from PIL import Image as Images

    return image.transform(image.size, Images.Transform.AFFINE, coefficients)


def _enhance(image: Image, what: str, factor: float) -> Image:
    from PIL import ImageEnhance

    kinds = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "saturation": ImageEnhance.Color,
        "sharpness": ImageEnhance.Sharpness,
    }
    return kinds[what](image).enhance(factor)


def _turn_hue(image: Image, part: float) -> Image:
    """The hue turned by ``part`` of the circle."""
    from PIL import Image as Images

    hue, saturation, value = image.convert("HSV").split()
    turned = hue.point([(level + round(part * 255)) % 256 for level in range(256)])
    return Images.merge("HSV", (turned, saturation, value)).convert("RGB")
