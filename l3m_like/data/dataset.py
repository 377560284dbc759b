"""A dataset: where samples come from, what is done to each, and how they become rows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.core.keys import KeySpec, Limit
from l3m_like.core.random import key_of
from l3m_like.data.mixing import Mix
from l3m_like.data.packing import Packer, Piece, Ref


@dataclass(frozen=True)
class Item:
    """A processed sample and where it came from: its name for people, and the name of its source in a mixture."""

    reference: str
    data: Mapping[str, np.ndarray]
    source: str = ""

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


class Stream(Protocol):
    """Shards that are read from their beginning: no index, and so no random access."""

    path: str

    def shards(self) -> list[str]:
        """The shards' names, in an order that is the same on every machine. Reads no more than the listing."""

    def open(self, shard: int, skip: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """``(reference, raw sample)`` of one shard from sample number ``skip`` on; any thread may call it.

        Instead of the raw sample, a function that gives it: then workers call it, and what it raises concerns this sample alone.

        Raises:
            UserError: the rest of the shard cannot be read.
        """


class BadSample(UserError):
    """A sample that cannot be read or processed; the message begins with its reference."""

    def __init__(self, reference: str, message: str) -> None:
        super().__init__(f"{reference}: {message}")
        self.reference = reference
        self.message = message


class Processor(Protocol):
    def keys(self) -> dict[str, KeySpec]:
        """What one sample holds; a symbolic dimension differs from sample to sample."""

    def check(self) -> None:
        """Read what the processor needs (a tokenizer's file) and compare it with its arguments."""

    def __call__(self, sample: Mapping[str, Any], visit: Visit) -> dict[str, np.ndarray]:
        """The processed sample: a function of its arguments alone, called from several threads."""


@dataclass(frozen=True)
class Part:
    """One source of a dataset with what is done to its samples; ``name`` is "" where there is no mixture."""

    name: str
    source: Any  # Source or Stream
    process: Processor

    @property
    def indexed(self) -> bool:
        return not hasattr(self.source, "shards")

    @property
    def sizes_vary(self) -> bool:
        """Whether a sample has another size in each epoch (a processor that adds or removes by draw says so)."""
        return bool(getattr(self.process, "sizes_vary", False))

    def work(self, reference: str, read: Callable[[], Mapping[str, Any]], *, epoch: int = 0, seed: int = 0) -> Item:
        """A sample, read and processed; any thread may do it.

        Raises:
            BadSample: it cannot be.
        """
        try:
            return Item(reference, self.process(read(), Visit(reference, epoch, seed)), self.name)
        except BadSample:
            raise
        except UserError as error:
            raise BadSample(reference, str(error)) from error
        except Exception as error:
            raise BadSample(reference, f"{type(error).__name__}: {error}") from error

    def at(self, index: int, *, epoch: int = 0, seed: int = 0) -> Item:
        """Sample ``index`` of an indexed source, read and processed.

        Raises:
            BadSample: it cannot be.
        """
        return self.work(self.source.reference(index), functools.partial(self.source.read, index), epoch=epoch, seed=seed)


class Dataset:
    """Sources, what is done to their samples, and how these become rows. The constructor reads no file.

    Args:
        source: a Source or Stream, or a named dict of them (a mixture).
        process: a processor, or one for each name.
        pack: the packer.
        mix: of a mixture: how much each source gives.
        shuffle: False: samples come in file order.
        block: how many samples of a Stream each lane shuffles together (it holds as many in memory).

    Raises:
        UserError: packer and processor do not fit; names of sources, processors and weights differ.
    """

    def __init__(
        self, source: Any, process: Any, pack: Packer, mix: Mix | None = None, *, shuffle: bool = True, block: int = 64
    ) -> None:
        several = isinstance(source, Mapping)
        if several != (mix is not None):
            raise UserError("a dict of sources needs `mix: {weights: ...}`, and one source has none.")
        if block < 1:
            raise UserError(f"block is {block}; it is a number of samples, at least 1.")
        sources = dict(source) if several else {"": source}
        if mix is not None:
            mix.check(list(sources))
        if isinstance(process, Mapping) and set(process) != set(sources):
            raise UserError(f"process has {sorted(process)}, but source has {sorted(sources)}: one for each, or one for all.")
        self.parts = {
            name: Part(name, each, process[name] if isinstance(process, Mapping) else process) for name, each in sources.items()
        }
        self.pack = pack
        self.mix = mix
        self.shuffle = shuffle
        self.block = block
        self.names = tuple(sources) if several else ()
        #: of the model that the batches are for, see ``Trace.limits``
        self.limits: Mapping[str, Limit] = {}
        self._mixed = (self.names,) if several else ()  # what a packer is told of a mixture
        self.keys()  # refuses a packer that cannot take what the processor makes

    @property
    def source(self) -> Any:
        """The (first) source."""
        return next(iter(self.parts.values())).source

    @property
    def process(self) -> Any:
        """The (first) processor."""
        return next(iter(self.parts.values())).process

    @property
    def indexed(self) -> bool:
        """Whether every source has an index."""
        return all(part.indexed for part in self.parts.values())

    def __len__(self) -> int:
        """Number of samples (reads the sources' indices).

        Raises:
            UserError: a Stream, which cannot know.
        """
        for part in self.parts.values():
            if not part.indexed:
                raise UserError(f"{part.source.path} is a stream: its length is not known. Give `steps`, not `epochs`.")
        return sum(len(part.source) for part in self.parts.values())

    def describe(self) -> str:
        """What the stream of samples is made of, as far as it is known without reading it."""
        lines = []
        for part in self.parts.values():
            name = f"{part.name}: " if part.name else ""
            if part.indexed:
                lines.append(f"{name}{len(part.source)} samples from {part.source.reference(0)}")
            else:
                shards = part.source.shards()
                lines.append(f"{name}{len(shards)} shards from {shards[0]} in blocks of {self.block}")
        return ", ".join([*lines, type(self.pack).__name__, *([] if self.shuffle else ["in file order"])])

    @property
    def unit(self) -> str:
        """What rates count: tokens, images, or rows."""
        return str(self.pack.unit or getattr(self.process, "unit", "rows"))

    def units(self, batch: Mapping[str, Tensor], source: str | None = None) -> int:
        """How many of them a batch holds (of one source)."""
        return self.pack.units(batch, source)

    def keys(self) -> dict[str, KeySpec]:
        """The keys of a batch, without touching a file; ``spec.shape(B=rows)`` is the shape of any of them."""
        samples = {name: part.process.keys() for name, part in self.parts.items()}
        first_name, first = next(iter(samples.items()))
        for name, sample in samples.items():
            if {k: (v.dtype, v.dims) for k, v in sample.items()} != {k: (v.dtype, v.dims) for k, v in first.items()}:
                raise UserError(f"process: '{name}' makes {sorted(sample)}, '{first_name}' {sorted(first)}: make them the same.")
        specs = self.pack.keys(first, *self._mixed)
        return specs | {"row": KeySpec(torch.int64, ("B",), None, "running number of the row in the run")}

    def item(self, index: int, *, epoch: int = 0, seed: int = 0) -> Item:
        """Sample ``index`` (of an indexed dataset; those of its sources one after the other), read and processed.

        Raises:
            BadSample: it cannot be.
        """
        for part in self.parts.values():
            if index < len(part.source):
                return part.at(index, epoch=epoch, seed=seed)
            index -= len(part.source)
        raise IndexError(index)

    def items(self, seed: int = 0) -> Iterator[Item]:
        """Every sample once, in file order."""
        for part in self.parts.values():
            if part.indexed:
                for index in range(len(part.source)):
                    yield part.at(index, seed=seed)
            else:
                for shard in range(len(part.source.shards())):
                    for reference, raw in part.source.open(shard, 0):
                        yield part.work(reference, functools.partial(given, raw), seed=seed)

    def rows(self, items: Iterator[Item]) -> Iterator[list[Piece]]:
        """The rows that the packer makes of ``items``, to the last."""
        held: dict[Ref, Item] = {}
        numbers = itertools.count()

        def draw() -> tuple[Ref, Item] | None:
            for item in items:
                why = self.pack.too_large(item)
                if why is None:
                    ref = (item.source, next(numbers))
                    held[ref] = item
                    return ref, item
                if self.pack.too_long != "drop":
                    raise BadSample(item.reference, why)
            return None

        state = self.pack.start()
        while True:
            pieces, state = self.pack.next(state, draw, held.__getitem__)
            if not pieces:
                return
            yield pieces
            needed = set(self.pack.held(state))
            for ref in [ref for ref in held if ref not in needed]:
                del held[ref]

    def collate(self, rows: Sequence[Sequence[Piece]], first_row: int) -> dict[str, Tensor]:
        """The batch of these rows, the first of which has the running number ``first_row``.

        Raises:
            UserError: numbers beyond ``limits``.
        """
        row = torch.arange(first_row, first_row + len(rows), dtype=torch.int64)
        batch = self.pack.collate(rows, *self._mixed) | {"row": row}
        for key, limit in self.limits.items():
            if key in batch:
                self._refuse_beyond(key, limit, batch[key], rows)
        return batch

    def _refuse_beyond(self, key: str, limit: Limit, values: Tensor, rows: Sequence[Sequence[Piece]]) -> None:
        wrong = (values < 0) | (values >= limit.below)
        if wrong.any():
            number, *place = wrong.nonzero()[0].tolist()
            value = int(values[(number, *place)])
            more = f"Give the model {value + 1} of them or more (classes, vocab_size), or correct" if value >= 0 else "Correct"
            raise UserError(
                f"{' + '.join(map(str, rows[number]))}: {key} is {value}, but {limit.by} takes 0 .. {limit.below - 1}. "
                f"{more} the data."
            )

    def check_processors(self) -> None:
        """Let the processors read what they need, so that no sample is blamed for a tokenizer that is not there.

        Raises:
            DataMissing: a file is not on this machine. UserError: it is of another kind, or does not fit.
        """
        for part in self.parts.values():
            part.process.check()

    def check(self) -> dict[str, Tensor]:
        """Read real samples, compare the batch that they make with ``keys()``, and return that batch (one row).

        Raises:
            DataMissing: the data is not on this machine. UserError: it is not what ``keys()`` declares.
        """
        self.check_processors()
        for part in self.parts.values():
            if part.indexed:
                len(part.source)
            next(Dataset(part.source, part.process, self.pack).items())
        pieces = next(self.rows(self.items()))
        batch = self.collate([pieces], 0)
        declared = self.keys()
        if set(batch) != set(declared):
            raise UserError(f"{self.source.path}: the data makes {sorted(batch)}, but declares {sorted(declared)}.")
        for name, spec in declared.items():
            found, said = (batch[name].dtype, tuple(batch[name].shape)), (spec.dtype, spec.shape(B=1))
            if found != said:
                raise UserError(f"{pieces[0]}: '{name}' is {found}, but {said} is declared.")
        return batch


def given(raw: Any) -> Any:
    """A stream's raw sample, or what the function in its place gives."""
    return raw() if callable(raw) else raw
