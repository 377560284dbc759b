"""Parquet files read from front to back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from l3m_like.core.errors import UserError
from l3m_like.data.columns import Columns, undecoded
from l3m_like.data.paths import resolve, short_names

ROWS = 256  # decoded at once


class ParquetStream:
    """Rows of ``.parquet`` files; a shard is a file. Images and audio are their bytes.

    Args:
        path: a file or a pattern (see ``l3m_like.data.paths.resolve``).
        columns: ``{name: column}``: what a sample holds (see ``l3m_like.data.columns``), e.g. ``{text: text}``. Other columns
            are not read. None: all columns under their own names.

    Raises (by ``shards``):
        DataMissing: no such file.
    """

    def __init__(self, path: str, columns: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.columns = Columns(columns)

    def shards(self) -> list[str]:
        """The files' names, in the order of ``path``."""
        return short_names(self._files)

    def open(self, shard: int, skip: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """``(FILE#ROW, sample)`` from row ``skip`` (counted from 0) on. Row groups before it are not read.

        Raises:
            UserError: no such column; the file cannot be read, naming it and the row.
        """
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise UserError(f"path: '{self.path}' needs the package `pyarrow` ({error}). Run: pip install pyarrow") from error
        path, name = self._files[shard], self.shards()[shard]
        wanted = None if self.columns.names is None else sorted(set(self.columns.names.values()))
        row = skip
        try:
            with parquet.ParquetFile(path) as file:
                self.columns.check(file.schema_arrow.names)
                groups, start = list(range(file.num_row_groups)), 0
                while groups and start + file.metadata.row_group(groups[0]).num_rows <= skip:
                    start += file.metadata.row_group(groups.pop(0)).num_rows
                if not groups:
                    return
                for batch in file.iter_batches(ROWS, row_groups=groups, columns=wanted):
                    for record in batch.slice(min(max(skip - start, 0), len(batch))).to_pylist():
                        yield f"{name}#{row}", functools.partial(self._sample, record)
                        row += 1
                    start += len(batch)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{name}, row {row}: {path} is not readable parquet: {error}. Copy it again.") from error

    def _sample(self, record: Mapping[str, Any]) -> dict[str, Any]:
        return self.columns({column: undecoded(value) for column, value in record.items()})

    @cached_property
    def _files(self) -> list[Path]:
        return resolve(self.path)
