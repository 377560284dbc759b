"""From samples to rows: which pieces of which samples make the next row, and how rows become a batch.

A packer is a pure function of (state, samples): its state is JSON-able numbers that point into a lane's sequence of samples,
never tensors, so it can be saved, moved to another process and continued.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.core.keys import KeySpec

if TYPE_CHECKING:
    from l3m_like.data.dataset import Item

State = dict[str, int]
IGNORED = -100  # a target that no loss counts
PADDING = -1  # the document id of padding


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
        """The state before the first row. ``state["sample"]`` is always the first sample that is still needed."""

    def next(self, state: State, item: Callable[[int], Item | None]) -> tuple[list[Piece], State]:
        """The pieces of the next row, and the state after it. ``item(k)`` is the k-th sample of the lane, None after the last."""

    def collate(self, rows: Sequence[Sequence[Piece]]) -> dict[str, Tensor]:
        """A batch of CPU tensors."""

    def keys(self, sample: Mapping[str, KeySpec]) -> dict[str, KeySpec]:
        """What ``collate`` makes of samples with these keys."""

    #: what a row is made of, for rates ("tokens"); None: rows are samples, named by the processor
    unit: str | None
    #: how many of them a full row holds
    units_per_row: int

    def units(self, batch: Mapping[str, Tensor]) -> int:
        """How many a batch holds, padding left out."""


class Stack:
    """One row per sample: every array of the sample, stacked on a new first dimension."""

    one_row_per_sample = True
    unit = None
    units_per_row = 1

    def units(self, batch: Mapping[str, Tensor]) -> int:
        return len(batch["row"])

    def start(self) -> State:
        return {"sample": 0}

    def next(self, state: State, item: Callable[[int], Item | None]) -> tuple[list[Piece], State]:
        sample = item(state["sample"])
        return ([] if sample is None else [Piece(sample, 0, sample.size)]), {"sample": state["sample"] + 1}

    def collate(self, rows: Sequence[Sequence[Piece]]) -> dict[str, Tensor]:
        names = rows[0][0].item.data
        return {name: torch.from_numpy(np.stack([row[0].item.data[name] for row in rows])) for name in names}

    def keys(self, sample: Mapping[str, KeySpec]) -> dict[str, KeySpec]:
        for name, spec in sample.items():
            if any(isinstance(dim, str) for dim in spec.dims):
                raise UserError(f"pack: Stack needs samples of one size, but '{name}' is {spec.dims}. Use ConcatPack for text.")
        return {name: KeySpec(spec.dtype, ("B", *spec.dims), None, spec.meaning) for name, spec in sample.items()}


class ConcatPack:
    """Documents one after the other in rows of ``length`` tokens; nothing is dropped.

    A document that crosses the end of a row is cut there, and its rest begins the next row, as a document of its own:
    positions restart and attention does not reach back. The last token of a cut part still has its true target.

    Args:
        length: tokens per row (S).
        max_documents: the most documents in one row, so that ``cu_seqlens`` has one size for the whole run; a row that has
            so many is closed and padded. None: one per 32 tokens, at least 8.
        stream: prefix of the keys.

    Writes (B rows): ``text_ids`` int64 [B,S]; ``text_targets`` int64 [B,S], the next token of the same document, -100 at its
    end and in padding; ``text_positions`` int64 [B,S] from 0 in each document; ``text_document_ids`` int32 [B,S] from 0 in
    each row, -1 in padding; ``text_cu_seqlens`` int32 [B * (max_documents + 1) + 1], the borders of documents (and of the
    padding at a row's end) over B*S, filled up with B*S.
    """

    one_row_per_sample = False
    unit = "tokens"

    def __init__(self, length: int, max_documents: int | None = None, stream: str = "text") -> None:
        if length < 1:
            raise UserError(f"length is {length}; it is the number of tokens in a row, at least 1.")
        if max_documents is not None and max_documents < 1:
            raise UserError(f"max_documents is {max_documents}; it is at least 1.")
        self.length = self.units_per_row = length
        self.max_documents = min(length, max(8, length // 32)) if max_documents is None else max_documents
        self.stream = stream

    def units(self, batch: Mapping[str, Tensor]) -> int:
        return int((batch[f"{self.stream}_document_ids"] != PADDING).sum())

    def start(self) -> State:
        return {"sample": 0, "offset": 0}

    def next(self, state: State, item: Callable[[int], Item | None]) -> tuple[list[Piece], State]:
        sample, offset = state["sample"], state["offset"]
        room = self.length
        pieces: list[Piece] = []
        while room and len(pieces) < self.max_documents:
            document = item(sample)
            if document is None:
                break
            stop = min(document.size, offset + room)
            pieces.append(Piece(document, offset, stop))
            room -= stop - offset
            sample, offset = (sample + 1, 0) if stop == document.size else (sample, stop)
        return pieces, {"sample": sample, "offset": offset}

    def collate(self, rows: Sequence[Sequence[Piece]]) -> dict[str, Tensor]:
        shape = (len(rows), self.length)
        ids = np.zeros(shape, dtype=np.int64)
        targets = np.full(shape, IGNORED, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        documents = np.full(shape, PADDING, dtype=np.int32)
        borders: list[int] = []
        for row, pieces in enumerate(rows):
            at = 0
            for number, piece in enumerate(pieces):
                tokens = piece.item.data["ids"]
                span = slice(at, at + piece.stop - piece.start)
                ids[row, span] = tokens[piece.start : piece.stop]
                following = tokens[piece.start + 1 : piece.stop + 1]  # one short at the document's end
                targets[row, at : at + len(following)] = following
                positions[row, span] = np.arange(piece.stop - piece.start)
                documents[row, span] = number
                borders.append(row * self.length + at)
                at = span.stop
            if at < self.length:
                borders.append(row * self.length + at)
        size = len(rows) * (self.max_documents + 1) + 1  # + 1 per row: its padding; + 1: the end
        cu_seqlens = np.full(size, len(rows) * self.length, dtype=np.int32)
        cu_seqlens[: len(borders)] = borders
        arrays = {"ids": ids, "targets": targets, "positions": positions, "document_ids": documents, "cu_seqlens": cu_seqlens}
        return {f"{self.stream}_{name}": torch.from_numpy(array) for name, array in arrays.items()}

    def keys(self, sample: Mapping[str, KeySpec]) -> dict[str, KeySpec]:
        if "ids" not in sample:
            raise UserError(f"pack: ConcatPack packs token ids, but process makes {sorted(sample)}. Use Tokenize, or Stack.")
        grid = ("B", self.length)
        specs = {
            "ids": KeySpec(torch.int64, grid, 1, "tokens"),
            "targets": KeySpec(torch.int64, grid, 1, "the next token of the same document, -100: none"),
            "positions": KeySpec(torch.int64, grid, 1, "position in the document"),
            "document_ids": KeySpec(torch.int32, grid, 1, "document of the row, -1: padding"),
            "cu_seqlens": BorderSpec(
                torch.int32, ("D",), None, "document borders over B*S, filled with B*S", per_row=self.max_documents + 1
            ),
        }
        return {f"{self.stream}_{name}": spec for name, spec in specs.items()}
