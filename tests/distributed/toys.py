"""Small data for distributed tests: drawn in memory, so that a run starts in no time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from l3m_like.core.keys import KeySpec


class Drawn:
    """A source of ``samples`` samples; sample i is ``self.draw(generator of i)``."""

    path = "drawn"

    def __init__(self, samples: int = 97) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def reference(self, index: int) -> str:
        return f"drawn#{index}"

    def read(self, index: int) -> dict[str, Any]:
        return self.draw(np.random.Generator(np.random.Philox(key=index)))

    def draw(self, generator: np.random.Generator) -> dict[str, Any]:
        raise NotImplementedError


class Texts(Drawn):
    """Documents of 1 to 40 letters: rows hold different numbers of targets."""

    def draw(self, generator: np.random.Generator) -> dict[str, Any]:
        letters = generator.integers(97, 123, size=generator.integers(1, 41), dtype=np.uint8)
        return {"text": letters.tobytes().decode()}


class Pictures(Drawn):
    """Grey images with a class."""

    def __init__(self, samples: int = 97, size: int = 14) -> None:
        super().__init__(samples)
        self.size = size

    def draw(self, generator: np.random.Generator) -> dict[str, Any]:
        image = generator.uniform(-1, 1, (1, self.size, self.size)).astype(np.float32)
        return {"image": image, "image_label": np.array(generator.integers(10))}


class AsPicture:
    """The processor of ``Pictures``: takes the samples as they are."""

    unit = "images"

    def __init__(self, size: int = 14) -> None:
        self.size = size

    def keys(self) -> dict[str, KeySpec]:
        return {"image": KeySpec(torch.float32, (1, self.size, self.size)), "image_label": KeySpec(torch.int64, ())}

    def check(self) -> None: ...

    def __call__(self, sample: dict[str, Any], visit: Any) -> dict[str, np.ndarray]:
        return sample
