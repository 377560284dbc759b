"""Order: which sample comes when, as a function that takes no memory.

An epoch is a pseudo-random permutation of 0 .. N-1, computed index by index with a Feistel network over the smallest power of
two that holds N, walked until it falls inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). So a run
resumes at any step at once, and a billion samples need no table.
"""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 8
_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def round_keys(seed: int, purpose: str) -> np.ndarray:
    """uint64 [ROUNDS]: the key of one permutation."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def permuted(positions: np.ndarray, samples: int, keys: np.ndarray) -> np.ndarray:
    """int64: where the permutation of 0 .. ``samples``-1 with these ``keys`` puts ``positions`` (same shape)."""
    bits = max(2, (samples - 1).bit_length())
    low = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << (bits // 2)) - 1), np.uint64((1 << (bits - bits // 2)) - 1)
    out = _scrambled(positions.astype(np.uint64), low, low_mask, high_mask, keys)
    while (outside := out >= samples).any():
        out[outside] = _scrambled(out[outside], low, low_mask, high_mask, keys)
    return out.astype(np.int64)


def _scrambled(x: np.ndarray, low: np.uint64, low_mask: np.uint64, high_mask: np.uint64, keys: np.ndarray) -> np.ndarray:
    """One pass of the network: each half is changed, in turn, by a hash of the other."""
    left, right = x >> low, x & low_mask
    for number, key in enumerate(keys):
        if number % 2:
            left = left ^ (_hash(right + key) & high_mask)
        else:
            right = right ^ (_hash(left + key) & low_mask)
    return (left << low) | right


def _hash(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014); integers wrap."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


class Order:
    """The global order of one source: sample number g -> (epoch, index).

    Args:
        samples: N, at least 1.
        seed: of the run.
        name: of the source in its mixture, so that two sources of one length differ.
        shuffle: False: every epoch is 0 .. N-1.
    """

    def __init__(self, samples: int, seed: int, name: str = "", *, shuffle: bool = True) -> None:
        self.samples, self.seed, self.name, self.shuffle = samples, seed, name, shuffle

    def at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(epoch, index)`` of the sample ``numbers`` (int64 [n])."""
        epochs, positions = np.divmod(numbers, self.samples)
        if not self.shuffle or self.samples == 1:
            return epochs, positions
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = permuted(positions[chosen], self.samples, round_keys(self.seed, f"order/{self.name}/{epoch}"))
        return epochs, indices

    def epoch(self, number: int) -> np.ndarray:
        """int64 [N]: the order of one epoch."""
        return self.at(np.arange(self.samples) + number * self.samples)[1]
