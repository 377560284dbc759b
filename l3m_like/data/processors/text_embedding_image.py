"""An image and the embedding of its text."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from l3m_like.core.errors import UserError
from l3m_like.core.keys import KeySpec
from l3m_like.data.processors.pixels import EXTENSIONS, Pixels

if TYPE_CHECKING:
    from l3m_like.data.dataset import Visit


class TextEmbeddingImage(Pixels):
    """``png``/``jpg``/``jpeg``/``webp`` and ``npy`` -> ``image`` float32 [C, size, size], ``image_text`` float32 [E]: what a text
    encoder made of the caption, pooled.

    Args:
        text_dim: E.
        pixels: the arguments of ``Pixels``.

    Raises:
        UserError: a sample without image or embedding; an embedding of another size; see ``Pixels``.
    """

    def __init__(self, text_dim: int, **pixels: Any) -> None:
        super().__init__(**pixels)
        self.text_dim = text_dim

    def keys(self) -> dict[str, KeySpec]:
        return self.image_keys() | {"image_text": KeySpec(torch.float32, (self.text_dim,), meaning="pooled embedding of a text")}

    def __call__(self, sample: Mapping[str, bytes], visit: Visit) -> dict[str, np.ndarray]:
        if "npy" not in sample:
            raise UserError(f"the sample has {sorted(sample)}; it needs 'npy' and one of {list(EXTENSIONS)}.")
        text = np.load(io.BytesIO(sample["npy"]), allow_pickle=False).astype(np.float32)
        if text.shape != (self.text_dim,):
            raise UserError(f"the embedding is {list(text.shape)}, but [{self.text_dim}] is configured (text_dim).")
        return {"image": self.image_of(sample, visit), "image_text": text}
