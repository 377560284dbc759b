"""From a record to a sample: which columns it holds and under which names, and the media files that they name."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.data.paths import resolve_folder


class Columns:
    """What a sample holds of a record.

    Args:
        names: ``{name in the sample: column}``. The sample holds exactly these; None: all columns under their own names.
            Under ``media`` a column holds the path of a file, and the sample holds the file's bytes under its extension
            (``jpg``). Numbers under ``cls`` become their decimal digits, as in a webdataset.
        folder: where relative paths begin. None: the working directory.
    """

    def __init__(self, names: Mapping[str, str] | None, folder: str | None = None) -> None:
        if folder is not None and "media" not in (names or {}):
            raise UserError(f"data_folder: '{folder}' has no meaning without columns.media, the column of the paths.")
        self.names = None if names is None else dict(names)
        self.folder = folder

    def check(self, columns: Iterable[str] | None = None) -> None:
        """The folder is there, and so are the columns (if they are known).

        Raises:
            DataMissing, UserError.
        """
        if self.folder is not None:
            resolve_folder(self.folder)
        for name, column in (self.names or {}).items():
            if columns is not None and column not in columns:
                raise _no_column(name, column, columns)

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The sample of a record.

        Raises:
            UserError: it has no fields; a column or a media file is not there.
        """
        if not isinstance(record, Mapping):
            raise UserError(f"the record is {type(record).__name__}, not an object with fields.")
        if self.names is None:
            return dict(record)
        sample = {}
        for name, column in self.names.items():
            if column not in record:
                raise _no_column(name, column, record)
            value = record[column]
            if name == "media":
                if not isinstance(value, str) or not value:
                    raise UserError(f"columns: '{column}' is {value!r}, not the path of a media file.")
                sample[Path(value).suffix.removeprefix(".").lower()] = load_media(value, self.folder)
            elif name == "cls" and isinstance(value, int):
                sample[name] = str(int(value)).encode()
            else:
                sample[name] = value
        return sample


def _no_column(name: str, column: str, columns: Iterable[str]) -> UserError:
    return UserError(f"columns: there is no column '{column}' (for '{name}'). {did_you_mean(column, columns)}")


def load_media(name: str, folder: str | None = None) -> bytes:
    """The bytes of a media file: a path, relative to ``folder``, or a ``data:`` URL in base64.

    Raises:
        UserError: it is not there, empty, or on another machine.
    """
    if name.startswith("data:"):
        head, _, content = name.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError("it is not in base64")
            return base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError) as error:
            raise UserError(f"the media '{head},...' cannot be decoded: {error}.") from error
    if name.startswith(("http://", "https://")):
        raise UserError(f"the media {name} is not on this machine. Download it and give its path, relative to data_folder.")
    path = Path(os.path.expanduser(folder or ""), name.removeprefix("file://"))
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"there is no media file {path.absolute()}. Put it there, or correct data_folder.") from error


def undecoded(value: Any) -> Any:
    """What an arrow table holds for an image, audio or video, ``{bytes, path}``: its bytes; also in lists. Others stay."""
    if isinstance(value, list):
        return [undecoded(each) for each in value]
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        return value["bytes"] if value["bytes"] is not None or value["path"] is None else load_media(value["path"])
    return value
