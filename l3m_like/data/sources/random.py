"""Synthetic samples, so that a benchmark needs no files: every sample is a function of (seed, index)."""

from __future__ import annotations

import functools
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from l3m_like.core.errors import UserError
from l3m_like.core.random import key_of


@dataclass(frozen=True)
class LogNormal:
    """Lengths of documents: log-normal with this ``mean`` (before clipping), ``sigma`` of the logarithm, clipped.

    Args:
        mean: tokens.
        sigma: of the logarithm; about 1 for web text.
        shortest, longest: tokens.
    """

    mean: float
    sigma: float
    shortest: int
    longest: int

    def __post_init__(self) -> None:
        if self.mean <= 0 or self.sigma < 0 or not 1 <= self.shortest <= self.longest:
            raise UserError(
                f"LogNormal: mean {self.mean}, sigma {self.sigma}, {self.shortest} to {self.longest} tokens; needed are a mean "
                "above 0, a sigma of at least 0, and 1 <= shortest <= longest."
            )

    def of(self, normal: float) -> int:
        """The length that belongs to a standard normal."""
        length = math.exp(math.log(self.mean) - self.sigma**2 / 2 + self.sigma * normal)
        return round(min(max(length, self.shortest), self.longest))


class RandomTokens:
    """Documents of uniformly random tokens, for ``TokenIds``.

    Args:
        vocab_size: ids are below it.
        length: tokens of every document, or a ``LogNormal``.
        seed: other documents.
        documents: how many there are.
    """

    path = "random tokens"

    def __init__(self, vocab_size: int, length: int | LogNormal, seed: int = 0, documents: int = 1 << 24) -> None:
        if vocab_size < 1 or documents < 1 or (isinstance(length, int) and length < 1):
            raise UserError(f"RandomTokens: vocab_size {vocab_size}, length {length}, {documents} documents; each is at least 1.")
        self.vocab_size, self.length, self.seed, self.documents = vocab_size, length, seed, documents

    def __len__(self) -> int:
        return self.documents

    def read(self, index: int) -> dict[str, Any]:
        """``{"ids": int64 [T]}``."""
        words = _words(self.seed, f"tokens/{index}")
        length = self.length if isinstance(self.length, int) else self.length.of(float(_normals(words, 1)[0]))
        return {"ids": (words.random_raw(length) % np.uint64(self.vocab_size)).astype(np.int64)}

    def reference(self, index: int) -> str:
        return f"{self.path}#{index}"


#: different latents
_LATENTS = 256


class RandomLatents:
    """Standard normal latents and random classes, for ``ClassLatent``.

    A few latents are drawn once and given again and again, since drawing one takes longer than reading one from a file.

    Args:
        channels, size: of the latent [channels, size, size].
        classes: labels are below it.
        seed: other latents.
        samples: how many there are.
    """

    path = "random latents"

    def __init__(self, channels: int, size: int, classes: int, seed: int = 0, samples: int = 1 << 24) -> None:
        if min(channels, size, classes, samples) < 1:
            raise UserError(
                f"RandomLatents: channels {channels}, size {size}, classes {classes}, {samples} samples; each is at least 1."
            )
        self.shape, self.classes, self.seed, self.samples = (channels, size, size), classes, seed, samples
        self._files = functools.cache(self._file)

    def __len__(self) -> int:
        return self.samples

    def read(self, index: int) -> dict[str, bytes]:
        """``npy``: float32 [channels, size, size] as numpy saves it; ``cls``: the class in digits."""
        label = int(_words(self.seed, f"labels/{index}").random_raw(1)[0] % np.uint64(self.classes))
        return {"npy": self._files(index % _LATENTS), "cls": str(label).encode()}

    def _file(self, number: int) -> bytes:
        file = io.BytesIO()
        np.save(file, _normals(_words(self.seed, f"latents/{number}"), math.prod(self.shape)).reshape(self.shape))
        return file.getvalue()

    def reference(self, index: int) -> str:
        return f"{self.path}#{index}"


def _words(seed: int, purpose: str) -> np.random.Philox:
    """Raw 64-bit words: numpy keeps these as they are for ever, and not what its generators make of them."""
    high, low = key_of(seed, purpose)
    return np.random.Philox(key=high << 32 | low)


def _normals(words: np.random.Philox, count: int) -> np.ndarray:
    """float32 [count], by Box and Muller."""
    uniforms = ((words.random_raw(2 * count) >> np.uint64(11)) + 0.5) * 2.0**-53
    return (np.sqrt(-2.0 * np.log(uniforms[:count])) * np.cos(2.0 * math.pi * uniforms[count:])).astype(np.float32)
