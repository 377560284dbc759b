"""A dataset: where samples come from, what is done to each, and how they become rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.core.keys import KeySpec
from l3m_like.core.random import key_of
from l3m_like.data.packing import Packer, Piece


@dataclass(frozen=True)
class Item:
    """A processed sample and where it came from."""

    reference: str
    data: Mapping[str, np.ndarray]

    @property
    def size(self) -> int:
        """What a packer may cut: the number of tokens, or 1 of a sample that is taken whole."""
        return len(self.data["ids"]) if "ids" in self.data else 1


@dataclass(frozen=True)
class Visit:
    """The visit of one sample in one epoch: what its random draws depend on, and nothing else."""

    reference: str
    epoch: int
    seed: int

    def uniform(self, purpose: str) -> float:
        """A uniform in (0, 1): a function of (seed, sample, epoch, purpose)."""
        high, low = key_of(self.seed, f"{purpose}/{self.reference}/{self.epoch}")
        return ((high << 21 | low >> 11) + 0.5) * 2.0**-53


    def draws(self, purpose: str) -> Draws:
        """A stream of draws, for a purpose that needs more than one."""
        high, low = key_of(self.seed, f"{purpose}/{self.reference}/{self.epoch}")
        return Draws(high << 32 | low)


class Draws:
    """Numbers drawn one after the other: a function of the 64-bit ``key`` and of how many were drawn before.

    Made from the raw words of Philox4x64-10, which numpy keeps as they are for ever; what its generators make of them it may
    change.
    """

    def __init__(self, key: int) -> None:
        self._words = np.random.Philox(key=key)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A uniform in (low, high)."""
        return low + (high - low) * ((self._word() >> 11) + 0.5) * 2.0**-53

    def integer(self, stop: int) -> int:
        """One of 0 .. stop - 1, all with the same chance (to within stop / 2**64)."""
        return self._word() * stop >> 64

    def permutation(self, size: int) -> list[int]:
        """0 .. size - 1 in any order, all with the same chance (Fisher and Yates)."""
        order = list(range(size))
        for last in range(size - 1, 0, -1):
            other = self.integer(last + 1)
            order[last], order[other] = order[other], order[last]
        return order

    def _word(self) -> int:
        return int(self._words.random_raw())


class Source(Protocol):
    """An index of samples. ``len`` reads the index; after it, ``read`` and ``reference`` may be called from any thread."""

    path: str

    def __len__(self) -> int: ...

    def read(self, index: int) -> Mapping[str, Any]:
        """The raw sample."""

    def reference(self, index: int) -> str:
        """A name for people that is the same on every machine, e.g. ``shakespeare.jsonl#123``."""


class Processor(Protocol):
    def keys(self) -> dict[str, KeySpec]:
        """What one sample holds; a symbolic dimension differs from sample to sample."""

    def check(self) -> None:
        """Read what the processor needs (a tokenizer's file) and compare it with its arguments."""

    def __call__(self, sample: Mapping[str, Any], visit: Visit) -> dict[str, np.ndarray]:
        """The processed sample: a function of its arguments alone, called from several threads."""


class Dataset:
    """Source, processor and packer of one stream of rows. The constructor reads no file.

    Raises:
        UserError: packer and processor do not fit.
    """

    def __init__(self, source: Source, process: Processor, pack: Packer) -> None:
        self.source = source
        self.process = process
        self.pack = pack
        self.keys()  # refuses a packer that cannot take what the processor makes

    def __len__(self) -> int:
        """Number of samples (reads the source's index)."""
        return len(self.source)

    @property
    def unit(self) -> str:
        """What rates count: tokens, images, or rows."""
        return str(self.pack.unit or getattr(self.process, "unit", "rows"))

    def units(self, batch: Mapping[str, Tensor]) -> int:
        """How many of them a batch holds."""
        return self.pack.units(batch)

    def keys(self) -> dict[str, KeySpec]:
        """The keys of a batch, without touching a file; ``spec.shape(B=rows)`` is the shape of any of them."""
        specs = self.pack.keys(self.process.keys())
        return specs | {"row": KeySpec(torch.int64, ("B",), None, "running number of the row in the run")}

    def item(self, index: int, *, epoch: int = 0, seed: int = 0) -> Item:
        """Sample ``index``, read and processed.

        Raises:
            UserError: it cannot be; the message begins with the sample's reference.
        """
        reference = self.source.reference(index)
        try:
            return Item(reference, self.process(self.source.read(index), Visit(reference, epoch, seed)))
        except UserError as error:
            raise UserError(f"{reference}: {error}") from error
        except Exception as error:
            raise UserError(f"{reference}: {type(error).__name__}: {error}") from error

    def collate(self, rows: Sequence[Sequence[Piece]], first_row: int) -> dict[str, Tensor]:
        """The batch of these rows, the first of which has the running number ``first_row``."""
        return self.pack.collate(rows) | {"row": torch.arange(first_row, first_row + len(rows), dtype=torch.int64)}

    def check(self) -> dict[str, Tensor]:
        """Read one real sample, compare the batch it makes with ``keys()``, and return that batch (one row).

        Raises:
            DataMissing: the data is not on this machine. UserError: it is not what ``keys()`` declares.
        """
        len(self)
        self.process.check()
        pieces, _ = self.pack.next(self.pack.start(), lambda sample: self.item(sample) if sample < len(self) else None)
        batch = self.collate([pieces], 0)
        declared = self.keys()
        if set(batch) != set(declared):
            raise UserError(f"{self.source.path}: the data makes {sorted(batch)}, but declares {sorted(declared)}.")
        for name, spec in declared.items():
            found, said = (batch[name].dtype, tuple(batch[name].shape)), (spec.dtype, spec.shape(B=1))
            if found != said:
                raise UserError(f"{pieces[0]}: '{name}' is {found}, but {said} is declared.")
        return batch
