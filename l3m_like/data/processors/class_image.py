"""An image and its class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from l3m_like.core.errors import UserError
from l3m_like.core.keys import KeySpec
from l3m_like.data.processors.pixels import EXTENSIONS, Pixels

if TYPE_CHECKING:
    from l3m_like.data.dataset import Visit


class ClassImage(Pixels):
    """``png``/``jpg``/``jpeg``/``webp`` and ``cls`` -> ``image`` float32 [C, size, size], ``image_label`` int64 [].

    The arguments are those of ``Pixels``.

    Raises:
        UserError: a sample without image or class; see ``Pixels``.
    """

    def keys(self) -> dict[str, KeySpec]:
        return self.image_keys() | {"image_label": KeySpec(torch.int64, (), meaning="class number")}

    def __call__(self, sample: Mapping[str, bytes], visit: Visit) -> dict[str, np.ndarray]:
        if "cls" not in sample:
            raise UserError(f"the sample has {sorted(sample)}; it needs 'cls' and one of {list(EXTENSIONS)}.")
        return {"image": self.image_of(sample, visit), "image_label": np.array(int(sample["cls"]), dtype=np.int64)}
