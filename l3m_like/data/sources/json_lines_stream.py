"""JSON lines read from front to back."""

from __future__ import annotations

import functools
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

from l3m_like.core.errors import UserError
from l3m_like.data.paths import resolve, short_names


class JsonLinesStream:
    """Records of ``.jsonl``, ``.jsonl.gz`` or ``.jsonl.zst`` files, one per line; a shard is a file.

    Args:
        path: a file or a pattern (see ``l3m_like.data.paths.resolve``).

    Raises (by ``shards``):
        DataMissing: no such file.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def shards(self) -> list[str]:
        """The files' names, in the order of ``path``."""
        return short_names(self._files)

    def open(self, shard: int, skip: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """``(FILE#LINE, function that gives the record)`` from record number ``skip`` on; lines are counted from 1, and blank
        ones hold no record.

        Raises:
            UserError: the file is damaged. It names the file and the line. (By the function: a line is not a JSON object.)
        """
        path, name = self._files[shard], self.shards()[shard]
        record, number = 0, 0
        try:
            with _opened(path) as stream:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        if record >= skip:
                            yield f"{name}#{number}", functools.partial(_parsed, line, f"{path}, line {number}")
                        record += 1
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"{path}, after line {number}: {error}. Copy it again.") from error

    @cached_property
    def _files(self) -> list[Path]:
        return resolve(self.path)


def _opened(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        try:
            import pyarrow
        except ImportError as error:
            raise UserError(f"path: {path} needs the package `pyarrow` ({error}). Run: pip install pyarrow") from error
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _parsed(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error}).") from error
    if not isinstance(record, dict):
        raise UserError(f"{place}: the record is {type(record).__name__}, not an object with fields.")
    return record
