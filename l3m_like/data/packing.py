"""From samples to rows: which pieces of which samples make the next row, and how rows become a batch.

A packer is a pure function of (state, samples): its state is JSON-able numbers that point to samples of its lane, never
tensors, so it can be saved, moved to another process and continued.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.keys import KeySpec

if TYPE_CHECKING:
    from l3m_like.data.dataset import Item

#: the k-th sample of a source in its lane: (source's name, k)
Ref = tuple[str, int]
#: takes the lane's next sample; None: there is none
Draw = Callable[[], "tuple[Ref, Item] | None"]
#: a sample that was drawn before
Fetch = Callable[[Ref], "Item"]
State = dict[str, Any]
IGNORED = -100  # a target that no loss counts
PADDING = -1  # the document id of padding
TOO_LONG = ("error", "drop", "split")


@dataclass(frozen=True)
class Piece:
    """A sample, or a part of one, that a row holds: from ``start`` to ``stop`` of its ``size``."""

    item: Item
    start: int
    stop: int

    def __str__(self) -> str:
        """``shakespeare.jsonl#12`` or, of a part, ``shakespeare.jsonl#12[256:512]``."""
        whole = (self.start, self.stop) == (0, self.item.size)
        return self.item.reference if whole else f"{self.item.reference}[{self.start}:{self.stop}]"


@dataclass(frozen=True)
class BorderSpec(KeySpec):
    """Of ``cu_seqlens``, whose size D follows from the number of rows: B * per_row + 1."""

    per_row: int = 1

    def shape(self, **sizes: int) -> tuple[int, ...]:
        return (sizes["B"] * self.per_row + 1,)


class Packer(Protocol):
    #: every row is one sample: the number of rows is then known without reading any
    one_row_per_sample: bool

    def start(self) -> State:
        """The state before the first row (JSON values)."""

    def held(self, state: State) -> list[Ref]:
        """The samples that ``state`` still needs."""

    def next(self, state: State, draw: Draw, fetch: Fetch) -> tuple[list[Piece], State]:
        """The pieces of the next row, and the state after it; no pieces: there are no more samples."""

    def too_large(self, item: Item) -> str | None:
        """Why this sample can be in no row, or None."""

    #: what happens to such a sample: "error" or "drop" (it is noted in the ledger)
    too_long: str
    #: what to change where it is an error
    advice: str

    def collate(self, rows: Sequence[Sequence[Piece]], sources: Sequence[str] = ()) -> dict[str, Tensor]:
        """A batch of CPU tensors; with ``sources``, also which elements come from which."""

    def keys(self, sample: Mapping[str, KeySpec], sources: Sequence[str] = ()) -> dict[str, KeySpec]:
        """What ``collate`` makes of samples with these keys."""

    #: what a row is made of, for rates ("tokens"); None: rows are samples, named by the processor
    unit: str | None
    #: how many of them a full row holds
    units_per_row: int
    #: whether a row may be empty (all padding)
    may_be_empty: bool

    def units(self, batch: Mapping[str, Tensor], source: str | None = None) -> int:
        """How many a batch holds (of one source), padding left out."""

    def source_key(self, source: str) -> str:
        """The key that says, of a mixture, what comes from ``source`` (bool)."""


class Stack:
    """One row per sample: every array of the sample, stacked on a new first dimension.

    Of a mixture also ``from_<source>`` bool [B].
    """

    one_row_per_sample = True
    may_be_empty = False
    too_long = "error"
    advice = ""
    unit: str | None = None
    units_per_row = 1

    def units(self, batch: Mapping[str, Tensor], source: str | None = None) -> int:
        return len(batch["row"]) if source is None else int(batch[self.source_key(source)].sum())

    def source_key(self, source: str) -> str:
        return f"from_{source}"

    def start(self) -> State:
        return {}

    def held(self, state: State) -> list[Ref]:
        return []

    def next(self, state: State, draw: Draw, fetch: Fetch) -> tuple[list[Piece], State]:
        drawn = draw()
        return ([] if drawn is None else [Piece(drawn[1], 0, drawn[1].size)]), {}

    def too_large(self, item: Item) -> str | None:
        return None

    def collate(self, rows: Sequence[Sequence[Piece]], sources: Sequence[str] = ()) -> dict[str, Tensor]:
        names = rows[0][0].item.data
        batch = {name: torch.from_numpy(np.stack([row[0].item.data[name] for row in rows])) for name in names}
        origins = [row[0].item.source for row in rows]
        return batch | {f"from_{source}": torch.tensor([origin == source for origin in origins]) for source in sources}

    def keys(self, sample: Mapping[str, KeySpec], sources: Sequence[str] = ()) -> dict[str, KeySpec]:
        for name, spec in sample.items():
            if any(isinstance(dim, str) for dim in spec.dims):
                raise UserError(f"pack: Stack needs samples of one size, but '{name}' is {spec.dims}. Use ConcatPack for text.")
        specs = {name: KeySpec(spec.dtype, ("B", *spec.dims), None, spec.meaning) for name, spec in sample.items()}
        return specs | {f"from_{name}": KeySpec(torch.bool, ("B",), None, f"comes from {name}") for name in sources}


class TokenPack:
    """Documents in rows of ``length`` tokens; how they are chosen is for the subclass to say.

    Args:
        length: tokens per row (S).
        max_documents: the most documents in one row, so that ``cu_seqlens`` has one size for the whole run; a row that has
            so many is closed and padded. None: one per 32 tokens, at least 8.
        stream: prefix of the keys.
        separate: keep documents apart. False: the tokens of a row are one sequence, as in many pretraining recipes: positions
            run over the row, no key says where documents begin, and attention is the fastest; targets still end with a
            document. Padding at a row's end then needs a causal mask to stay unseen.

    Writes (B rows): ``text_ids`` int64 [B,S]; ``text_targets`` int64 [B,S], the next token of the same document, -100 at its
    end, in padding, and where the sample's ``trained`` says so; ``text_positions`` int64 [B,S] from 0 in each document;
    ``text_document_ids`` int32 [B,S] from 0 in each row, -1 in padding; ``text_cu_seqlens`` int32
    [B * (max_documents + 1) + 1], the borders of documents (and of the padding at a row's end) over B*S, filled up with B*S;
    of a mixture also ``text_from_<source>`` bool [B,S].
    """

    one_row_per_sample = False
    may_be_empty = True
    too_long = "error"
    advice = "Set pack.too_long: drop or split, or a longer row."
    unit: str | None = "tokens"

    def __init__(self, length: int, max_documents: int | None = None, stream: str = "text", separate: bool = True) -> None:
        if length < 1:
            raise UserError(f"length is {length}; it is the number of tokens in a row, at least 1.")
        if max_documents is not None and max_documents < 1:
            raise UserError(f"max_documents is {max_documents}; it is at least 1.")
        self.length = self.units_per_row = length
        if not separate:
            max_documents = length  # there are no borders to make room for
        self.max_documents = min(length, max(8, length // 32)) if max_documents is None else max_documents
        self.stream = stream
        self.separate = separate

    def units(self, batch: Mapping[str, Tensor], source: str | None = None) -> int:
        if source is not None:
            return int(batch[self.source_key(source)].sum())
        if self.separate:
            return int((batch[f"{self.stream}_document_ids"] != PADDING).sum())
        used = (batch[f"{self.stream}_targets"] != IGNORED).any(1)
        return int(((batch[f"{self.stream}_positions"].amax(1) + 1) * used).sum())

    def source_key(self, source: str) -> str:
        return f"{self.stream}_from_{source}"

    def too_large(self, item: Item) -> str | None:
        return None

    def collate(self, rows: Sequence[Sequence[Piece]], sources: Sequence[str] = ()) -> dict[str, Tensor]:
        shape = (len(rows), self.length)
        ids = np.zeros(shape, dtype=np.int64)
        targets = np.full(shape, IGNORED, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        documents = np.full(shape, PADDING, dtype=np.int32)
        origins = {source: np.zeros(shape, dtype=np.bool_) for source in sources}
        borders: list[int] = []
        for row, pieces in enumerate(rows):
            at = 0
            for number, piece in enumerate(pieces):
                tokens, trained = piece.item.data["ids"], piece.item.data.get("trained")
                span = slice(at, at + piece.stop - piece.start)
                ids[row, span] = tokens[piece.start : piece.stop]
                following = tokens[piece.start + 1 : piece.stop + 1]  # one short at the document's end
                if trained is not None:
                    following = np.where(trained[piece.start + 1 : piece.stop + 1], following, IGNORED)
                targets[row, at : at + len(following)] = following
                positions[row, span] = np.arange(piece.stop - piece.start) + (0 if self.separate else at)
                documents[row, span] = number
                if sources:
                    origins[piece.item.source][row, span] = True
                borders.append(row * self.length + at)
                at = span.stop
            if at < self.length:
                borders.append(row * self.length + at)
        arrays: dict[str, np.ndarray] = {"ids": ids, "targets": targets, "positions": positions}
        if self.separate:
            size = len(rows) * (self.max_documents + 1) + 1  # + 1 per row: its padding; + 1: the end
            cu_seqlens = np.full(size, len(rows) * self.length, dtype=np.int32)
            cu_seqlens[: len(borders)] = borders
            arrays |= {"document_ids": documents, "cu_seqlens": cu_seqlens}
        arrays |= {f"from_{source}": mask for source, mask in origins.items()}
        return {f"{self.stream}_{name}": torch.from_numpy(array) for name, array in arrays.items()}

    def keys(self, sample: Mapping[str, KeySpec], sources: Sequence[str] = ()) -> dict[str, KeySpec]:
        name = type(self).__name__
        if "ids" not in sample:
            raise UserError(f"pack: {name} packs token ids, but process makes {sorted(sample)}. Use Tokenize, or Stack.")
        if others := sorted(set(sample) - {"ids", "trained"}):
            raise UserError(f"pack: {name} packs 'ids' (and 'trained'), but process also makes {others}. Use Stack.")
        grid = ("B", self.length)
        specs = {
            "ids": KeySpec(torch.int64, grid, 1, "tokens"),
            "targets": KeySpec(torch.int64, grid, 1, "the next token of the same document, -100: none"),
            "positions": KeySpec(torch.int64, grid, 1, f"position in the {'document' if self.separate else 'row'}"),
        }
        if self.separate:
            meaning, per_row = "document borders over B*S, filled with B*S", self.max_documents + 1
            specs |= {
                "document_ids": KeySpec(torch.int32, grid, 1, "document of the row, -1: padding"),
                "cu_seqlens": BorderSpec(torch.int32, ("D",), None, meaning, per_row=per_row),
            }
        specs |= {f"from_{source}": KeySpec(torch.bool, grid, 1, f"tokens of {source}") for source in sources}
        return {f"{self.stream}_{name}": spec for name, spec in specs.items()}


class ConcatPack(TokenPack):
    """Documents one after the other; nothing is dropped, and only a row that holds ``max_documents`` (or the last) is padded.

    A document that crosses the end of a row is cut there, and its rest begins the next row, as a document of its own:
    positions restart and attention does not reach back. The last token of a cut part still has its true target.

    Args: as ``TokenPack``.
    """

    def start(self) -> State:
        return {"open": None, "offset": 0}

    def held(self, state: State) -> list[Ref]:
        return [] if state["open"] is None else [tuple(state["open"])]

    def next(self, state: State, draw: Draw, fetch: Fetch) -> tuple[list[Piece], State]:
        room, offset = self.length, state["offset"]
        pieces: list[Piece] = []
        drawn = None if state["open"] is None else (ref := tuple(state["open"]), fetch(ref))
        while room and len(pieces) < self.max_documents:
            drawn = drawn or draw()
            if drawn is None:
                break
            ref, document = drawn
            stop = min(document.size, offset + room)
            pieces.append(Piece(document, offset, stop))
            room -= stop - offset
            drawn, offset = (None, 0) if stop == document.size else (drawn, stop)
        return pieces, {"open": None if drawn is None else list(drawn[0]), "offset": offset}


@dataclass(frozen=True)
class Cost:
    """What a sample costs to compute: ``tokens * n + squared * n^2 + sum of arrays[name] * len(sample[name])``.

    With the widths of a Transformer, its linear layers cost ``tokens`` per token and attention ``squared`` per pair.
    """

    tokens: float = 1.0
    squared: float = 0.0
    arrays: Mapping[str, float] | None = None

    def of(self, item: Item, tokens: int) -> float:
        """The cost of ``tokens`` of ``item``, its arrays included."""
        others = sum(price * len(item.data[name]) for name, price in (self.arrays or {}).items())
        return self.tokens * tokens + self.squared * tokens**2 + others


class FitPack(TokenPack):
    """Whole documents, chosen from a bounded buffer so that rows are full; none is cut.

    A row begins with the document that has waited longest, and so none waits for more than ``buffer`` rows. Then, while
    there is room, the largest one that fits (``best``) or the earliest that does (``first``) is added, and the buffer filled up.

    Args:
        length, max_documents, stream, separate: as ``TokenPack``.
        fit: ``best`` or ``first``.
        buffer: documents that wait; more of them fill rows better, and mix the order more.
        cost: what a document costs; with ``max_cost``, rows also close at that sum, so that they balance compute and not only
            tokens. A document that alone costs more is too long.
        too_long: what happens to a document of more than ``length`` tokens: ``error``, ``drop`` (it is noted in the ledger) or
            ``split`` (into parts of ``length``, each a document of its own; behind one part, the rest waits with the others).

    Raises:
        UserError: an unknown word, or ``cost`` and ``max_cost`` not both given.
    """

    def __init__(
        self,
        length: int,
        fit: str = "best",
        buffer: int = 32,
        cost: Cost | None = None,
        max_cost: float | None = None,
        too_long: str = "error",
        max_documents: int | None = None,
        stream: str = "text",
        separate: bool = True,
    ) -> None:
        super().__init__(length, max_documents, stream, separate)
        if fit not in ("best", "first"):
            raise UserError(f"fit is '{fit}'. {did_you_mean(fit, ('best', 'first'))}")
        if too_long not in TOO_LONG:
            raise UserError(f"too_long is '{too_long}'. {did_you_mean(too_long, TOO_LONG)}")
        if buffer < 1:
            raise UserError(f"buffer is {buffer}; it is a number of documents, at least 1.")
        if (cost is None) != (max_cost is None):
            raise UserError("cost and max_cost belong together: give both, or none.")
        self.fit, self.buffer, self.cost, self.max_cost, self.too_long = fit, buffer, cost, max_cost, too_long
        if too_long == "split":
            self.advice = "Raise pack.max_cost, or shorten the rows."

    def start(self) -> State:
        return {"waiting": []}

    def held(self, state: State) -> list[Ref]:
        return [(name, k) for name, k, *_ in state["waiting"]]

    def too_large(self, item: Item) -> str | None:
        if self.too_long != "split" and item.size > self.length:
            return f"it has {item.size} tokens, more than a row's {self.length}"
        if self.cost is not None and self.max_cost is not None:
            cost = self.cost.of(item, min(item.size, self.length))
            if cost > self.max_cost:
                return f"it costs {cost:g}, more than a row's {self.max_cost:g}"
        return None

    def next(self, state: State, draw: Draw, fetch: Fetch) -> tuple[list[Piece], State]:
        # [source, k, start, stop, cost of the next part], longest wait first
        waiting = list(state["waiting"])
        chosen: list[Piece] = []
        room, money = self.length, float("inf") if self.max_cost is None else self.max_cost
        while len(chosen) < self.max_documents:
            while len(waiting) < self.buffer and (drawn := draw()) is not None:
                waiting.append(self._entry(*drawn, 0))
            fitting = [i for i, entry in enumerate(waiting) if self._size(entry) <= room and entry[4] <= money]
            if not fitting:
                break
            # among equals the earlier
            best = fitting[0] if not chosen or self.fit == "first" else max(fitting, key=lambda i: self._size(waiting[i]))
            entry = waiting.pop(best)
            name, k, start, stop, cost = entry
            piece = Piece(fetch((name, k)), start, start + self._size(entry))
            chosen.append(piece)
            room, money = room - self._size(entry), money - cost
            if piece.stop < stop:
                waiting.append(self._entry((name, k), piece.item, piece.stop))
        return chosen, {"waiting": waiting}

    def _entry(self, ref: Ref, item: Item, start: int) -> list[Any]:
        """A document from ``start`` on."""
        return [*ref, start, item.size, 0.0 if self.cost is None else self.cost.of(item, min(item.size - start, self.length))]

    def _size(self, entry: Sequence[Any]) -> int:
        """Tokens of the next part."""
        return min(entry[3] - entry[2], self.length)


class OnePerRow(TokenPack):
    """One document per row, padded to ``length``: no packing.

    Args:
        length, stream, separate: as ``TokenPack``.
        too_long: ``error``, ``drop`` (noted in the ledger) or ``split`` (each part has a row of its own).
    """

    def __init__(self, length: int, too_long: str = "error", stream: str = "text", separate: bool = True) -> None:
        super().__init__(length, 1, stream, separate)
        if too_long not in TOO_LONG:
            raise UserError(f"too_long is '{too_long}'. {did_you_mean(too_long, TOO_LONG)}")
        self.too_long = too_long

    def start(self) -> State:
        return {"open": None, "offset": 0}

    def held(self, state: State) -> list[Ref]:
        return [] if state["open"] is None else [tuple(state["open"])]

    def too_large(self, item: Item) -> str | None:
        if self.too_long != "split" and item.size > self.length:
            return f"it has {item.size} tokens, more than a row's {self.length}"
        return None

    def next(self, state: State, draw: Draw, fetch: Fetch) -> tuple[list[Piece], State]:
        drawn = draw() if state["open"] is None else (ref := tuple(state["open"]), fetch(ref))
        if drawn is None:
            return [], self.start()
        ref, document = drawn
        start = state["offset"]
        stop = min(document.size, start + self.length)
        rest = stop < document.size
        return [Piece(document, start, stop)], {"open": list(ref) if rest else None, "offset": stop if rest else 0}
