"""Tables of comma- or tab-separated values."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from l3m_like.core.errors import UserError
from l3m_like.data.columns import Columns
from l3m_like.data.sources.spans import Span, Spans


class Csv:
    """Rows of one or more ``.csv`` or ``.tsv`` files, or their ``.gz``, in file order; all values are text.

    Args:
        path: a file or a pattern (see ``l3m_like.data.paths.resolve``).
        columns: ``{name: column}``: what a sample holds (see ``l3m_like.data.columns``), e.g. ``{media: filepath, txt: title}``.
            None: all columns under their own names.
        data_folder: where relative paths of ``columns.media`` begin. None: the working directory.
        header: names of the columns, if the files have no line with them.
        delimiter: between two values. None: a tab in a ``.tsv``, else a comma.

    The files are indexed by the first ``len()``; ``read`` may then be called from any thread.

    Raises (by ``len``):
        DataMissing: no such file or folder. UserError: no row; no such column; a quote that is never closed.
    """

    def __init__(
        self,
        path: str,
        columns: Mapping[str, str] | None = None,
        data_folder: str | None = None,
        *,
        header: Sequence[str] | None = None,
        delimiter: str | None = None,
    ) -> None:
        self.path = path
        self.columns = Columns(columns, data_folder)
        self.header = None if header is None else list(header)
        self.delimiter = delimiter or ("\t" if ".tsv" in path else ",")
        self._headers: list[list[str]] = []  # of each file
        self._spans = Spans(path, self._find)

    def __len__(self) -> int:
        if not len(self._spans):
            raise UserError(f"{self.path} holds no row.")
        return len(self._spans)

    def read(self, index: int) -> dict[str, Any]:
        """``{column: value}`` of row ``index``, or what ``columns`` makes of it."""
        names = self._headers[self._spans.file(index)]
        (values,) = csv.reader(io.StringIO(self._spans.read(index).decode(), newline=""), delimiter=self.delimiter)
        if len(values) != len(names):
            raise UserError(f"the row has {len(values)} values, but there are {len(names)} columns: {names}.")
        return self.columns(dict(zip(names, values)))

    def reference(self, index: int) -> str:
        """``FILE#LINE``, the row's first line, counted from 1 as editors do."""
        return self._spans.reference(index)

    def _find(self, stream: BinaryIO, place: str) -> Iterator[Span]:
        names = self.header
        offset, number = 0, 1
        try:
            for values, size, lines in self._rows(stream):
                if values and names is None:
                    names = [values[0].removeprefix("\ufeff"), *values[1:]]
                elif values:
                    yield offset, size, number
                offset, number = offset + size, number + lines
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{place}, line {number}: {error}.") from error
        self._headers.append(names or [])
        if names:
            self.columns.check(names)

    def _rows(self, stream: BinaryIO) -> Iterator[tuple[list[str], int, int]]:
        """(values, size in bytes, number of lines) of every row, blank ones too; a quoted value may hold line ends."""
        size = lines = 0

        def text() -> Iterator[str]:
            nonlocal size, lines
            for line in stream:
                size, lines = size + len(line), lines + 1
                yield line.decode()

        for values in csv.reader(text(), delimiter=self.delimiter, strict=True):
            yield values, size, lines
            size = lines = 0
