"""JSON lines: one record per line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.data.paths import resolve, short_names


class JsonLines:
    """Records of one or more ``.jsonl`` files, in file order.

    Args:
        path: a file, ``"shipped:NAME"``, or a pattern (see ``l3m_like.data.paths.resolve``).
        where: ``{field: value}``: only the records whose fields have these values.

    The files are indexed by the first ``len()``; ``read`` may then be called from any thread.

    Raises (by ``len``):
        DataMissing: no such file. UserError: ``where`` names an unknown field or selects nothing; a line is not JSON.
    """

    def __init__(self, path: str, where: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.where = dict(where or {})

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> dict[str, Any]:
        """The record of sample ``index``."""
        file, offset, size, _ = self._index[index]
        with self._files[file].open("rb") as stream:
            stream.seek(offset)
            return json.loads(stream.read(size))

    def reference(self, index: int) -> str:
        """``FILE#LINE``, lines counted from 1 as editors do."""
        file, _, _, line = self._index[index]
        return f"{self._names[file]}#{line}"

    @cached_property
    def _files(self) -> list[Path]:
        return resolve(self.path)

    @cached_property
    def _names(self) -> list[str]:
        return short_names(self._files)

    @cached_property
    def _index(self) -> np.ndarray:
        """int64 [samples, 4]: file, byte offset, byte size, line number."""
        rows: list[tuple[int, int, int, int]] = []
        fields: dict[str, set[Any]] = {}
        for file, path in enumerate(self._files):
            offset = 0
            with path.open("rb") as stream:
                for number, line in enumerate(stream, start=1):
                    if line.strip() and self._selected(line, f"{path}, line {number}", fields):
                        rows.append((file, offset, len(line), number))
                    offset += len(line)
        if not rows:
            seen = "; ".join(f"{field} is one of {sorted(map(str, values))[:8]}" for field, values in fields.items())
            raise UserError(f"where: {self.where} selects no record of {self.path}. {seen}" if seen else f"{self.path} is empty.")
        return np.array(rows, dtype=np.int64)

    def _selected(self, line: bytes, place: str, seen: dict[str, set[Any]]) -> bool:
        if not self.where:
            return True  # not parsed: a bad line is then found when it is read
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: not JSON ({error}).") from error
        for field, value in self.where.items():
            if field not in record:
                raise UserError(f"where: {place} has no field '{field}'. {did_you_mean(field, record)}")
            if len(seen.setdefault(field, set())) < 100:
                seen[field].add(record[field])
            if record[field] != value:
                return False
        return True
