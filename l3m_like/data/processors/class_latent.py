"""A cached latent, or its moments, and its class."""

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


class ClassLatent:
    """``npy`` and ``cls`` -> ``image`` float32 [C, size, size], the latent that an image encoder made of a picture, and its
    ``image_label`` int64 [].

    Args:
        size: side of the square latent.
        channels: of the latent.
        flip: with chance 1/2 take ``flip.npy`` instead, the latent of the mirrored picture (a mirrored latent is not the same).

    Raises:
        UserError: another shape; a sample without latent or class.
    """

    unit = "images"
    key = "image"
    meaning = "latent of an image"

    def __init__(self, size: int, channels: int, flip: bool = False) -> None:
        self.shape = (channels, size, size)
        self.flip = flip

    def keys(self) -> dict[str, KeySpec]:
        return {
            self.key: KeySpec(torch.float32, self.shape, meaning=self.meaning),
            "image_label": KeySpec(torch.int64, (), meaning="class number"),
        }

    def check(self) -> None:
        """Nothing to read ahead."""

    def __call__(self, sample: Mapping[str, bytes], visit: Visit) -> dict[str, np.ndarray]:
        name = "flip.npy" if self.flip and visit.uniform("flip") < 0.5 else "npy"
        if name not in sample or "cls" not in sample:
            raise UserError(f"the sample has {sorted(sample)}; it needs '{name}' and 'cls'.")
        latent = np.load(io.BytesIO(sample[name]), allow_pickle=False).astype(np.float32)
        if latent.shape != self.shape:
            raise UserError(f"the latent is {latent.shape}, but [channels, size, size] = {list(self.shape)} is configured.")
        return {self.key: latent, "image_label": np.array(int(sample["cls"]), dtype=np.int64)}


class ClassMoments(ClassLatent):
    """The same, but the array holds mean and standard deviation of a latent, [2 C, size, size]: ``image_moments``, from which
    ``SampleLatent`` draws anew in every epoch. Arguments are those of ``ClassLatent``."""

    key = "image_moments"
    meaning = "mean and standard deviation of an image's latent"

    def __init__(self, size: int, channels: int, flip: bool = False) -> None:
        super().__init__(size, 2 * channels, flip)
