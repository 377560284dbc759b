"""JSON records: one per line, or one array of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.data.columns import Columns
from l3m_like.data.sources.spans import Span, Spans

BLANKS = re.compile(r"[ \t\r\n]*")


class JsonLines:
    """Records of one or more ``.jsonl`` or ``.json`` files, or their ``.gz``, in file order.

    Args:
        path: a file, ``"shipped:NAME"``, or a pattern (see ``l3m_like.data.paths.resolve``). A file that begins with ``[`` is
            one array of records, any other has one record per line. A ``.gz`` is held in memory, decompressed.
        where: ``{field: value}``: only the records whose fields have these values.
        columns: ``{name: field}``: what a sample holds (see ``l3m_like.data.columns``), e.g. ``{media: image, txt: caption}``.
            None: the record as it is.
        data_folder: where relative paths of ``columns.media`` begin. None: the working directory.

    The files are indexed by the first ``len()``; ``read`` may then be called from any thread.

    Raises (by ``len``):
        DataMissing: no such file or folder. UserError: ``where`` names an unknown field or selects nothing; a line is not JSON.
    """

    def __init__(
        self,
        path: str,
        where: Mapping[str, Any] | None = None,
        *,
        columns: Mapping[str, str] | None = None,
        data_folder: str | None = None,
    ) -> None:
        self.path = path
        self.where = dict(where or {})
        self.columns = Columns(columns, data_folder)
        self._seen: dict[str, set[str]] = {}  # values of the fields of `where`, for the error
        self._spans = Spans(path, self._find)

    def __len__(self) -> int:
        if not len(self._spans):
            seen = "; ".join(f"{field} is one of {sorted(values)[:8]}" for field, values in self._seen.items())
            raise UserError(f"where: {self.where} selects no record of {self.path}. {seen}" if seen else f"{self.path} is empty.")
        return len(self._spans)

    def read(self, index: int) -> dict[str, Any]:
        """The record of sample ``index``, or what ``columns`` makes of it."""
        return self.columns(json.loads(self._spans.read(index)))

    def reference(self, index: int) -> str:
        """``FILE#LINE``, lines counted from 1 as editors do, or ``FILE#NUMBER`` in an array, counted from 1 too."""
        return self._spans.reference(index)

    def _find(self, stream: BinaryIO, place: str) -> Iterator[Span]:
        self.columns.check()
        array = stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        stream.seek(0)
        for offset, number, text in _elements(stream, place) if array else _lines(stream):
            # without `where` a record is not parsed here: a bad line is then found when it is read
            if not self.where or self._selected(text, f"{place}, {'record' if array else 'line'} {number}"):
                yield offset, len(text), number

    def _selected(self, text: bytes, place: str) -> bool:
        try:
            record = json.loads(text)
        except ValueError as error:
            raise UserError(f"{place}: not JSON ({error}).") from error
        for field, value in self.where.items():
            if not isinstance(record, dict) or field not in record:
                raise UserError(f"where: {place} has no field '{field}'. {did_you_mean(field, record)}")
            if len(self._seen.setdefault(field, set())) < 100:
                self._seen[field].add(str(record[field]))
            if record[field] != value:
                return False
        return True


def _lines(stream: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """(byte offset, number from 1, text) of every line that is not blank."""
    offset = 0
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield offset, number, line
        offset += len(line)


def _elements(stream: BinaryIO, place: str) -> Iterator[tuple[int, int, bytes]]:
    """(byte offset, number from 1, text) of every element of a JSON array."""
    try:
        text = stream.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not JSON ({error}).") from error
    decode = json.JSONDecoder().raw_decode
    at, offset, number = text.index("[") + 1, len(text[: text.index("[") + 1].encode()), 1
    while True:
        start = _after_blanks(text, at)
        if text[start : start + 1] == "]":
            return
        try:
            if number > 1:
                if text[start : start + 1] != ",":
                    raise ValueError("',' or ']' is missing")
                start = _after_blanks(text, start + 1)
            end = decode(text, start)[1]
        except ValueError as error:
            raise UserError(f"{place}, record {number}: not JSON ({error}).") from error
        content = text[start:end].encode()
        offset += start - at  # blanks and a comma, of one byte each
        yield offset, number, content
        at, offset, number = end, offset + len(content), number + 1


def _after_blanks(text: str, at: int) -> int:
    match = BLANKS.match(text, at)
    assert match is not None  # it may be empty
    return match.end()
