"""What a model will see: the first batches of the real loader, and what they are made of."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.data.dataset import Dataset
from l3m_like.data.loader import EvalLoader, Loader
from l3m_like.data.packing import IGNORED, Draw, Fetch, FitPack, Piece, State

SHOWN_ROWS = 48


@dataclass(frozen=True)
class Document:
    """A piece of a row: ``name`` with its span, source in the mixture, size of the whole sample, and the span."""

    name: str
    source: str
    size: int
    start: int
    stop: int


@dataclass
class Row:
    """What one row is made of.

    Args:
        documents: in order.
        waits: of the samples that are used up in this row, for how many rows of their lane each was held before.
        cost: in the packer's unit; None: it has none.
    """

    documents: list[Document] = field(default_factory=list)
    waits: list[int] = field(default_factory=list)
    cost: float | None = None


class Watched:
    """A packer, and what it does: everything is that of ``pack``, and ``rows`` are those that it has collated."""

    def __init__(self, pack: Any) -> None:
        self.pack = pack
        pack.separate = True  # rows are shown document by document, also where training does not keep them apart
        self.rows: list[Row] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pack, name)

    def start(self) -> State:
        return {"pack": self.pack.start(), "row": 0, "since": {}}

    def held(self, state: State) -> list[Any]:
        return self.pack.held(state["pack"])

    def next(self, state: State, draw: Draw, fetch: Fetch) -> tuple[list[Piece], State]:
        number, since = state["row"], dict(state["since"])

        def drawing() -> Any:
            drawn = draw()
            if drawn is not None:
                since[drawn[0]] = number
            return drawn

        pieces, inner = self.pack.next(state["pack"], drawing, fetch)
        held = set(self.pack.held(inner))
        waits = [number - first for ref, first in since.items() if ref not in held]
        kept = {ref: first for ref, first in since.items() if ref in held}
        return _Pieces(pieces, waits), {"pack": inner, "row": number + 1, "since": kept}

    def collate(self, rows: Sequence[Sequence[Piece]], sources: Sequence[str] = ()) -> dict[str, Tensor]:
        price = self.pack.cost if isinstance(self.pack, FitPack) else None
        for row in rows:
            documents = [Document(str(piece), piece.item.source, piece.item.size, piece.start, piece.stop) for piece in row]
            cost = None if price is None else sum(price.of(piece.item, piece.stop - piece.start) for piece in row)
            self.rows.append(Row(documents, getattr(row, "waits", []), cost))
        return self.pack.collate(rows, sources)


class _Pieces(list[Piece]):
    """The pieces of a row, which carry their waits to where the row is collated."""

    def __init__(self, pieces: Sequence[Piece], waits: list[int]) -> None:
        super().__init__(pieces)
        self.waits = waits


@dataclass
class Seen:
    """What was seen of a dataset.

    Args:
        dataset: its packer is ``Watched``.
        batches: number of batches (of steps, over all micro-batches).
        how: the loader, in words.
        shown: the first micro-batches, about ``SHOWN_ROWS`` rows.
        units: tokens or rows that are no padding; ``units_by_source`` of a mixture.
        trained: targets that a loss counts; None: there are no targets.
        left_out: samples that were bad or too long, as in ``Step.left_out``.
        index_seconds, first_seconds, seconds: until the loader stood; of the first batch; of all others.
        first_rows, first_units: of the first batch.
    """

    dataset: Dataset
    how: str
    batches: int = 0
    shown: list[dict[str, Tensor]] = field(default_factory=list)
    units: int = 0
    units_by_source: dict[str, int] = field(default_factory=dict)
    trained: int | None = None
    left_out: list[dict[str, Any]] = field(default_factory=list)
    index_seconds: float = 0.0
    first_seconds: float = 0.0
    seconds: float = 0.0
    first_rows: int = 0
    first_units: int = 0

    @property
    def rows(self) -> list[Row]:
        """What each row is made of, in order."""
        return self.dataset.pack.rows  # type: ignore[attr-defined]

    @property
    def pack(self) -> Any:
        """The packer itself."""
        return self.dataset.pack.pack  # type: ignore[attr-defined]

    @property
    def stream(self) -> str | None:
        """The stream of packed text; None: rows are samples."""
        return getattr(self.pack, "stream", None)

    @property
    def capacity(self) -> int:
        """Places of all rows, in ``units``."""
        return len(self.rows) * self.pack.units_per_row

    @property
    def documents(self) -> list[Document]:
        return [document for row in self.rows for document in row.documents]

    @property
    def longest_wait(self) -> int:
        return max((wait for row in self.rows for wait in row.waits), default=0)

    @property
    def rates(self) -> dict[str, float] | None:
        """Rows, and tokens or the like, per second after the first batch; None of a single batch."""
        if not self.seconds:
            return None
        rates = {"rows": (len(self.rows) - self.first_rows) / self.seconds} if self.stream is not None else {}
        return rates | {self.dataset.unit: (self.units - self.first_units) / self.seconds}

    def shares(self) -> dict[str, tuple[float, float, float]]:
        """Of each source of a mixture, its part of the weights, of the samples and of the units."""
        mix = self.dataset.mix
        if mix is None:
            return {}
        samples = {name: sum(d.source == name and d.start == 0 for d in self.documents) for name in self.dataset.names}
        columns = (mix.weights, samples, self.units_by_source)
        return {name: tuple(c[name] / max(1e-9, sum(c.values())) for c in columns) for name in self.dataset.names}  # type: ignore[misc]

    def facts(self) -> dict[str, str]:
        """The summary, in words."""
        facts = {"data": self.dataset.describe(), "batches": f"{self.batches:,} of {self.first_rows:,} rows, {self.how}"}
        if self.stream is not None:
            facts["packing"] = (
                f"{self.units:,} of {self.capacity:,} places are tokens: {self.units / self.capacity:.2%} efficiency"
            )
            documents = self.documents
            cut = sum(d.stop - d.start < d.size for d in documents)
            per_row = len(documents) / len(self.rows)
            facts["documents"] = f"{len(documents):,}, {per_row:.2f} a row; {cut:,} are parts of longer ones"
        if self.trained is not None:
            facts["trained"] = f"{self.trained:,} targets, {self.trained / max(1, self.units):.2%} of the tokens"
        if isinstance(self.pack, FitPack):
            facts["longest wait"] = f"{self.longest_wait} rows of a lane (at most the buffer, {self.pack.buffer})"
        for name, (weight, samples, units) in self.shares().items():
            facts[f"from {name}"] = f"weight {weight:.1%}: {samples:.1%} of samples, {units:.1%} of {self.dataset.unit}"
        facts["first batch"] = f"{self.first_seconds:.2f} s, after {self.index_seconds:.2f} s for the index"
        if self.rates is not None:
            facts["rate"] = ", ".join(f"{rate:,.0f} {unit}/s" for unit, rate in self.rates.items()) + " (the loader alone)"
        dropped = sum(entry["dropped"] for entry in self.left_out)
        facts["left out"] = f"{len(self.left_out) - dropped} bad samples, {dropped} too long" if self.left_out else "none"
        return facts

    def add(self, micro: Sequence[dict[str, Tensor]], left_out: Iterable[dict[str, Any]]) -> None:
        """One more batch."""
        self.batches += 1
        self.left_out += left_out
        for batch in micro:
            self.units += self.dataset.units(batch)
            for name in self.dataset.names:
                self.units_by_source[name] = self.units_by_source.get(name, 0) + self.dataset.units(batch, name)
            if (targets := batch.get(f"{self.stream}_targets")) is not None:
                self.trained = (self.trained or 0) + int((targets != IGNORED).sum())
            if sum(len(each["row"]) for each in self.shown) < SHOWN_ROWS:
                self.shown.append(batch)


def inspect_training(dataset: Dataset, batches: int, **arguments: Any) -> Seen:
    """The first ``batches`` of a ``Loader`` with these arguments. None is made ahead, so that the time of each is its own.

    Raises:
        UserError: as the loader; the data ends before the first batch.
    """
    dataset.pack = Watched(dataset.pack)  # type: ignore[assignment]
    began = time.perf_counter()
    loader = Loader(dataset, **arguments, prefetch=0)
    how = f"{loader.lanes} lanes, {arguments.get('workers', 0)} workers"

    def steps() -> Iterator[tuple[list[dict[str, Tensor]], list[dict[str, Any]]]]:
        while (step := loader.next_step()) is not None:
            yield step.micro, step.left_out

    try:
        return _look(Seen(dataset, how, index_seconds=time.perf_counter() - began), steps(), batches)
    finally:
        loader.close()


def inspect_evaluation(dataset: Dataset, batches: int, *, batch: int, seed: int = 0) -> Seen:
    """The first ``batches`` of an ``EvalLoader`` with these arguments.

    Raises:
        UserError: as the loader.
    """
    dataset.pack = Watched(dataset.pack)  # type: ignore[assignment]
    began = time.perf_counter()
    if dataset.indexed:
        len(dataset)
    seen = Seen(dataset, "one pass in file order", index_seconds=time.perf_counter() - began)
    return _look(seen, (([made], []) for made, _ in EvalLoader(dataset, batch=batch, seed=seed)), batches)


def _look(seen: Seen, steps: Iterator[tuple[list[dict[str, Tensor]], list[dict[str, Any]]]], batches: int) -> Seen:
    if batches < 1:
        raise UserError(f"--batches is {batches}; it is at least 1.")
    for number in range(batches):
        began = time.perf_counter()
        made = next(steps, None)
        seconds = time.perf_counter() - began
        if made is None:
            break
        seen.add(*made)
        if number:
            seen.seconds += seconds
        else:
            seen.first_seconds, seen.first_rows, seen.first_units = seconds, len(seen.rows), seen.units
    if not seen.batches:
        raise UserError(f"{seen.dataset.source.path}: the data ends before the first batch. Take a smaller batch, or more data.")
    return seen
