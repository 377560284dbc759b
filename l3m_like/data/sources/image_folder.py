"""Folders of images, one per class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.data.paths import resolve_folder

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp")
SPLITS = {"train", "training", "val", "valid", "validation", "test", "heldout"}


class ImageFolder:
    """The images of ``ROOT[/SPLIT]/CLASS/**``, in sorted order (the layout of ImageNet).

    Args:
        path: ROOT.
        where: ``{split: NAME}``: the folder of ROOT that holds the classes; without it ROOT does.

    Classes are numbered in the sorted order of their folders. Hidden files and folders are no part of the data. The folders
    are listed by the first ``len()``; ``read`` may then be called from any thread.

    Raises (by ``len``):
        DataMissing: no such folder. UserError: no such split; no class folders; a class without images.
    """

    def __init__(self, path: str, where: Mapping[str, Any] | None = None) -> None:
        for field in where or {}:
            if field != "split":
                raise UserError(f"where: an image folder is selected by 'split' (a folder of its root), not by '{field}'.")
        self.path = path
        self.where = dict(where or {})

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> dict[str, bytes]:
        """``{extension: content, cls: the class number in digits, class_name: the class's folder}`` of sample ``index``."""
        label, name = self._index[index]
        path = self._folder / self.classes[label] / name
        return {
            path.suffix[1:].lower(): path.read_bytes(),
            "cls": str(label).encode(),
            "class_name": self.classes[label].encode(),
        }

    def reference(self, index: int) -> str:
        """``ROOT[/SPLIT]/CLASS/FILE``, with ROOT's own name alone."""
        label, name = self._index[index]
        parts = [self._root.absolute().name, self.where.get("split"), self.classes[label], name]
        return "/".join(str(part) for part in parts if part)

    @cached_property
    def classes(self) -> list[str]:
        """The names of the classes, by number."""
        names = _folders(self._folder)
        if not names:
            found = sorted(os.listdir(self._folder))
            raise UserError(f"path: {self._folder} has no class folders. It holds {found[:8] if found else 'nothing'}.")
        if "split" not in self.where and SPLITS.issuperset(names):
            raise UserError(f"path: the folders of {self._folder} are splits: {names}. Set where: {{split: {names[0]}}}.")
        return names

    @cached_property
    def _root(self) -> Path:
        return resolve_folder(self.path)

    @cached_property
    def _folder(self) -> Path:
        """The folder of the classes."""
        split = str(self.where.get("split", ""))
        if not (self._root / split).is_dir():
            raise UserError(f"where: {self._root} has no split '{split}'. {did_you_mean(split, _folders(self._root))}")
        return self._root / split

    @cached_property
    def _index(self) -> list[tuple[int, str]]:
        """(class number, path in the class's folder) per image."""
        index: list[tuple[int, str]] = []
        for label, name in enumerate(self.classes):
            images = sorted(_images(self._folder / name))
            if not images:
                raise UserError(
                    f"path: the class folder {self._folder / name} holds no image ({', '.join(EXTENSIONS)}). Remove the folder, "
                    "or put its images there: classes are numbered by their folders."
                )
            index += [(label, image) for image in images]
        return index


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))


def _images(folder: Path, inside: str = "") -> Iterator[str]:
    """Paths of images, relative to ``folder``, with ``/`` between their parts."""
    for entry in os.scandir(folder / inside):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _images(folder, f"{inside}{entry.name}/")
        elif entry.name.lower().endswith(EXTENSIONS):
            yield inside + entry.name
