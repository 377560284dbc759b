"""Paths of data files: shipped ones, patterns, and the error for what is not there."""

from __future__ import annotations

import glob
import itertools
import os
import re
from pathlib import Path

from l3m_like.core.errors import UserError, did_you_mean

SHIPPED = Path(__file__).parent / "shipped"


class DataMissing(UserError):
    """The data is not on this machine; ``path`` is what was looked for."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path


def resolve(path: str) -> list[Path]:
    """The files that ``path`` names, in order.

    ``"shipped:NAME"`` is a file that comes with the library. Braces (``{a,b}``, ``{000..127}``) give their files in that
    order; ``*``, ``?`` and ``[..]`` give the matches in sorted order. A relative path is relative to the working directory.

    Raises:
        DataMissing: nothing is there.
    """
    if path.startswith("shipped:"):
        name = path.removeprefix("shipped:")
        if not (SHIPPED / name).is_file():
            names = [file.name for file in SHIPPED.iterdir() if file.suffix in (".jsonl", ".gz", ".tar")]
            raise DataMissing(path, f"path: '{path}' is not a shipped file. {did_you_mean(name, names)}")
        return [SHIPPED / name]
    files: list[Path] = []
    for pattern in expand_braces(os.path.expanduser(path)):
        literal = not re.search(r"[*?\[]", pattern) or os.path.isfile(pattern)
        found = [name for name in ([pattern] if literal else sorted(glob.glob(pattern, recursive=True))) if os.path.isfile(name)]
        files += map(Path, found)
        if not found:
            missing = os.path.abspath(pattern)
            raise DataMissing(
                path, f"path: no file at {missing} (from path: '{path}'). Put the data there, or give its place on this machine."
            )
    return files


def resolve_folder(path: str) -> Path:
    """The folder that ``path`` names. A relative path is relative to the working directory.

    Raises:
        DataMissing: it is not there.
    """
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        raise DataMissing(path, f"no folder at {folder.absolute()}. Put the data there, or give its place on this machine.")
    return folder


def expand_braces(pattern: str) -> list[str]:
    """``a{0..2}{x,y}`` -> a0x a0y a1x a1y a2x a2y; leading zeros keep the width. Braces do not nest."""
    parts: list[list[str]] = []
    for piece in re.split(r"(\{[^{}]*\})", pattern):
        span = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", piece)
        if span:
            width = len(span[1]) if span[1].startswith("0") else 0
            parts.append([f"{number:0{width}d}" for number in range(int(span[1]), int(span[2]) + 1)])
        elif piece.startswith("{") and "," in piece:
            parts.append(piece[1:-1].split(","))
        else:
            parts.append([piece])
    return ["".join(choice) for choice in itertools.product(*parts)]


def short_names(files: list[Path]) -> list[str]:
    """Names for sample references: the same on every machine, and different from one another."""
    names = [file.name for file in files]
    if len(set(names)) == len(names):
        return names
    root = os.path.commonpath([file.parent for file in files])
    return [os.path.relpath(file, root) for file in files]
