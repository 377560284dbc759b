"""Spans: samples that are ranges of bytes in text files, found once and read one at a time."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from l3m_like.core.errors import UserError
from l3m_like.data.paths import resolve, short_names

Span = tuple[int, int, int]  # byte offset, size in bytes, number for the reference


class Spans:
    """The spans that ``find`` finds in each file of ``path``, in file order. A ``.gz`` is held in memory, decompressed.

    Args:
        path: see ``l3m_like.data.paths.resolve``.
        find: ``(open file, its name for messages)`` -> spans.

    The files are searched by the first ``len()``; ``read`` may then be called from any thread.

    Raises (by ``len``):
        DataMissing: no such file. UserError: a ``.gz`` is damaged; whatever ``find`` raises.
    """

    def __init__(self, path: str, find: Callable[[BinaryIO, str], Iterable[Span]]) -> None:
        self.path = path
        self._find = find

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> bytes:
        """The bytes of span ``index``."""
        file, offset, size, _ = self._index[index]
        with self.open(file) as stream:
            stream.seek(offset)
            return stream.read(size)

    def reference(self, index: int) -> str:
        """``FILE#NUMBER``."""
        file, _, _, number = self._index[index]
        return f"{self._names[file]}#{number}"

    def file(self, index: int) -> int:
        """Which file span ``index`` is in."""
        return int(self._index[index, 0])

    def open(self, file: int) -> BinaryIO:
        """File number ``file``, decompressed."""
        content = self._contents[file]
        return io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")

    @cached_property
    def _files(self) -> list[Path]:
        return resolve(self.path)

    @cached_property
    def _names(self) -> list[str]:
        return short_names(self._files)

    @cached_property
    def _contents(self) -> list[Path | bytes]:
        """Where the bytes are: a path to seek in, or the decompressed content."""
        return [decompress(path) if path.suffix == ".gz" else path for path in self._files]

    @cached_property
    def _index(self) -> np.ndarray:
        """int64 [samples, 4]: file, byte offset, byte size, number."""
        rows: list[tuple[int, int, int, int]] = []
        for file, path in enumerate(self._files):
            with self.open(file) as stream:
                rows += [(file, *span) for span in self._find(stream, str(path))]
        return np.array(rows, dtype=np.int64).reshape(-1, 4)


def decompress(path: Path) -> bytes:
    """The content of a gzip file.

    Raises:
        UserError: it is damaged.
    """
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a readable gzip file: {error}. Copy it again.") from error
