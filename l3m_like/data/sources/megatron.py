"""Megatron's token files: ``NAME.bin`` holds the tokens, ``NAME.idx`` where the documents are.

The format is that of Megatron-LM's ``megatron/core/datasets/indexed_dataset.py``, little-endian. ``.idx``: the magic, the
version (int64), the code of the tokens' dtype (uint8), the numbers of sequences and of document borders (int64), the sequences'
lengths (int32), their byte offsets in ``.bin`` (int64), and the borders (int64): document d has the sequences border[d] to
border[d+1] - 1.
"""

from __future__ import annotations

import itertools
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.data.paths import resolve, short_names

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, borders
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
UINT16_VOCAB = 65500  # Megatron's limit: smaller vocabularies are written as uint16
PARTS = ("train", "valid", "test")


class Megatron:
    """Documents of one or more ``.bin``/``.idx`` pairs, in file order, memory-mapped. Documents without tokens are left out.

    Args:
        path: ``NAME``, ``NAME.bin`` or a pattern (see ``l3m_like.data.paths.resolve``).
        split: ``{fractions: "98,1,1", part: train}``: of each file the documents of one part, cut as Megatron does; the parts
            are train, valid and test, in this order. None: all documents.

    The ``.idx`` files are read by the first ``len()``; ``read`` may then be called from any thread.

    Raises (by ``len``):
        DataMissing: no such file. UserError: not of this format; tokens that are no integers; a ``.bin`` that is too short; no
            document.
    """

    def __init__(self, path: str, split: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.split = None if split is None else dict(split)
        self._fractions = _fractions(self.split)

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """``ids`` int64 [T] of document ``index``."""
        file, document = self._index[index]
        return {"ids": self._pairs[file].document(int(document))}

    def reference(self, index: int) -> str:
        """``FILE#DOCUMENT``, documents of the file (all of them) counted from 0."""
        file, document = self._index[index]
        return f"{self._names[file]}#{document}"

    def lengths(self) -> np.ndarray:
        """int64 [documents]: tokens of each document, without reading them."""
        lengths = [pair.lengths for pair in self._pairs]
        starts = np.cumsum([0, *map(len, lengths)])[:-1]
        return np.concatenate(lengths)[starts[self._index[:, 0]] + self._index[:, 1]]

    @cached_property
    def _files(self) -> list[Path]:
        return resolve(self.path if self.path.endswith(".bin") else self.path.removesuffix(".idx") + ".bin")

    @cached_property
    def _names(self) -> list[str]:
        return short_names(self._files)

    @cached_property
    def _pairs(self) -> list[_Pair]:
        return [_open(file) for file in self._files]

    @cached_property
    def _index(self) -> np.ndarray:
        """int64 [samples, 2]: file, document."""
        rows = []
        for file, pair in enumerate(self._pairs):
            start, stop = (round(fraction * len(pair.lengths)) for fraction in self._fractions)
            documents = start + np.flatnonzero(pair.lengths[start:stop])
            rows.append(np.stack([np.full_like(documents, file), documents], axis=1))
        index = np.concatenate(rows)
        if not len(index):
            raise UserError(f"{self.path} has no document" + (f" in the split {self.split}." if self.split else "."))
        return index


@dataclass(frozen=True)
class _Pair:
    """One ``.bin`` and what its ``.idx`` says."""

    data: np.ndarray  # uint8 [bytes], memory-mapped
    dtype: np.dtype
    sizes: np.ndarray  # int32 [sequences], in tokens
    offsets: np.ndarray  # int64 [sequences], in bytes
    borders: np.ndarray  # int64 [documents + 1], in sequences
    lengths: np.ndarray  # int64 [documents], in tokens

    def document(self, number: int) -> np.ndarray:
        """int64 [T]."""
        sequences = range(self.borders[number], self.borders[number + 1])
        parts = [np.frombuffer(self.data, self.dtype, self.sizes[i], self.offsets[i]) for i in sequences]
        return parts[0].astype(np.int64) if len(parts) == 1 else np.concatenate(parts, dtype=np.int64)


def _open(path: Path) -> _Pair:
    (index,) = resolve(str(path.with_suffix(".idx")))
    with index.open("rb") as stream:
        head = stream.read(HEADER.size)
    if not head.startswith(MAGIC) or len(head) < HEADER.size:
        raise UserError(f"{index} is not a Megatron index: it does not begin with {MAGIC!r}.")
    _, version, code, sequences, borders = HEADER.unpack(head)
    if version != 1 or code not in DTYPES:
        raise UserError(f"{index} has version {version} and dtype code {code}; version 1 and codes {list(DTYPES)} can be read.")
    dtype = np.dtype(DTYPES[code])
    if dtype.kind == "f":
        raise UserError(f"{path} holds {dtype.name}, but token ids are integers.")
    content = np.memmap(index, np.uint8, mode="r")
    if len(content) < HEADER.size + 12 * sequences + 8 * borders:
        raise UserError(f"{index} is too short for its {sequences} sequences: it is cut off. Copy it again.")
    sizes = np.frombuffer(content, "<i4", sequences, HEADER.size)
    offsets = np.frombuffer(content, "<i8", sequences, HEADER.size + 4 * sequences)
    documents = np.frombuffer(content, "<i8", borders, HEADER.size + 12 * sequences)
    if not borders or documents.min() < 0 or documents.max() > sequences:
        raise UserError(f"{index} has document borders outside its {sequences} sequences: it is damaged. Copy it again.")
    end = int((offsets + sizes.astype(np.int64) * dtype.itemsize).max(initial=0))
    size = path.stat().st_size
    if size < end:
        raise UserError(f"{path} has {size} bytes, but its index needs {end}: it is cut off. Copy it again.")
    data = np.memmap(path, np.uint8, mode="r") if size else np.empty(0, np.uint8)
    tokens = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    return _Pair(data, dtype, sizes, offsets, documents, np.diff(tokens[documents]))


def _fractions(split: Mapping[str, str] | None) -> tuple[float, float]:
    """Where the part begins and ends, as fractions of all documents."""
    if split is None:
        return 0.0, 1.0
    if set(split) != {"fractions", "part"}:
        raise UserError(f"split has {sorted(split)}; it needs 'fractions', such as \"98,1,1\", and 'part', one of {list(PARTS)}.")
    if split["part"] not in PARTS:
        raise UserError(f"split.part: there is no '{split['part']}'. {did_you_mean(split['part'], PARTS)}")
    try:
        weights = [float(part) for part in str(split["fractions"]).split(",")]
    except ValueError:
        weights = []
    if not 1 <= len(weights) <= 3 or min(weights) < 0 or sum(weights) <= 0:
        raise UserError(f'split.fractions is {split["fractions"]!r}; it is up to three numbers, such as "98,1,1".')
    weights += [0.0] * (len(PARTS) - len(weights))
    edges = [
        0.0,
        *itertools.accumulate(weight / sum(weights) for weight in weights),
    ]  # summed in Megatron's order, to the last bit
    part = PARTS.index(split["part"])
    return edges[part], edges[part + 1]


class MegatronWriter:
    """Writes ``NAME.bin`` and ``NAME.idx``, one sequence per document.

    The files get their names when the ``with`` block ends; if it ends in an error, there are none (and older ones stay)::

        with MegatronWriter("data/books", vocab_size=50257) as out:
            out.add(ids)

    Args:
        path: NAME, with or without ``.bin``.
        vocab_size: below 65500 tokens are written as uint16, else as int32.
    """

    def __init__(self, path: str, vocab_size: int) -> None:
        name = os.path.expanduser(path).removesuffix(".bin")
        self.vocab_size = vocab_size
        self._bin, self._idx = Path(name + ".bin"), Path(name + ".idx")
        self._temporary = Path(f"{name}.bin.{os.getpid()}.part")
        self._code = 8 if vocab_size < UINT16_VOCAB else 4
        self._sizes: list[int] = []

    def __enter__(self) -> MegatronWriter:
        self._bin.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._temporary.open("wb")
        return self

    def add(self, ids: Sequence[int] | np.ndarray) -> None:
        """One document.

        Raises:
            UserError: ids that are no integers, or not of the vocabulary.
        """
        tokens = np.asarray(ids)
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise UserError(f"document {len(self._sizes)} is {tokens.dtype} {list(tokens.shape)}; it is a list of integers.")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise UserError(
                f"document {len(self._sizes)} has ids from {tokens.min()} to {tokens.max()}, but vocab_size is {self.vocab_size}."
            )
        self._stream.write(tokens.astype(DTYPES[self._code]).tobytes())
        self._sizes.append(tokens.size)

    def append(self, path: Path) -> None:
        """All documents of a ``.bin`` that another writer with this ``vocab_size`` has made.

        Raises:
            DataMissing: no such file. UserError: it is damaged, or of another dtype.
        """
        pair = _open(path)
        if pair.dtype != np.dtype(DTYPES[self._code]):
            raise UserError(f"{path} holds {pair.dtype.name}, but vocab_size {self.vocab_size} is written otherwise.")
        with path.open("rb") as stream:
            shutil.copyfileobj(stream, self._stream)
        self._sizes += pair.sizes.tolist()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        index = self._temporary.with_suffix(".idx.part")
        try:
            _close(self._stream)
            if error is None:
                with index.open("wb") as stream:
                    stream.write(self._header())
                    _close(stream)
                self._idx.unlink(missing_ok=True)  # never an old index beside new tokens
                self._temporary.replace(self._bin)
                index.replace(self._idx)
        finally:
            self._temporary.unlink(missing_ok=True)
            index.unlink(missing_ok=True)

    def _header(self) -> bytes:
        """The content of ``.idx``."""
        sizes = np.array(self._sizes, dtype="<i4")
        ends = np.cumsum(sizes, dtype="<i8") * np.dtype(DTYPES[self._code]).itemsize
        offsets = np.concatenate([[0], ends])[: len(sizes)].astype("<i8")
        borders = np.arange(len(sizes) + 1, dtype="<i8")
        head = HEADER.pack(MAGIC, 1, self._code, len(sizes), len(borders))
        return head + sizes.tobytes() + offsets.tobytes() + borders.tobytes()


def _close(stream: Any) -> None:
    """Close a file whose content must be on the disk before it is renamed."""
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
