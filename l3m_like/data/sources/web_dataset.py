"""Webdataset tars: the members ``KEY.EXTENSION`` with one KEY are one sample."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.data.paths import resolve, short_names


class WebDataset:
    """Samples of one or more tars, in file order.

    Args:
        path: a ``.tar`` or ``.tar.gz``, ``"shipped:NAME"``, or a pattern such as ``train-{000..127}.tar``. A tar is read in
            place; a ``.tar.gz`` has no place to seek to and is held in memory, decompressed.
        where: ``{split: NAME}``: only the samples whose key begins with the folder ``NAME/``.

    The tars are indexed by the first ``len()``; ``read`` may then be called from any thread.

    Raises (by ``len``):
        DataMissing: no such file. UserError: ``where`` selects nothing; a file is not a tar.
    """

    def __init__(self, path: str, where: Mapping[str, Any] | None = None) -> None:
        for field in where or {}:
            if field != "split":
                raise UserError(f"where: a webdataset is selected by 'split' (first folder of the key), not by '{field}'.")
        self.path = path
        self.where = dict(where or {})

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> dict[str, bytes]:
        """``{extension: content}`` of sample ``index``."""
        file, _, members = self._index[index]
        archive = self._archives[file]
        if isinstance(archive, bytes):
            return {extension: archive[offset : offset + size] for extension, (offset, size) in members.items()}
        sample = {}
        with archive.open("rb") as stream:
            for extension, (offset, size) in members.items():
                stream.seek(offset)
                sample[extension] = stream.read(size)
        return sample

    def reference(self, index: int) -> str:
        """``FILE#KEY``."""
        file, key, _ = self._index[index]
        return f"{self._names[file]}#{key}"

    @cached_property
    def _files(self) -> list[Path]:
        return resolve(self.path)

    @cached_property
    def _names(self) -> list[str]:
        return short_names(self._files)

    @cached_property
    def _archives(self) -> list[Path | bytes]:
        """Where the bytes are: a path to seek in, or the decompressed content."""
        return [gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".tgz") else path for path in self._files]

    @cached_property
    def _index(self) -> list[tuple[int, str, dict[str, tuple[int, int]]]]:
        """(file, key, {extension: (offset, size)}) per sample."""
        samples: dict[tuple[int, str], dict[str, tuple[int, int]]] = {}
        for file, archive in enumerate(self._archives):
            stream = io.BytesIO(archive) if isinstance(archive, bytes) else archive.open("rb")
            try:
                with stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                    for member in tar:
                        if member.isfile():
                            folder, _, name = member.name.rpartition("/")
                            stem, _, extension = name.partition(".")  # the first dot, as webdataset does
                            key = f"{folder}/{stem}" if folder else stem
                            samples.setdefault((file, key), {})[extension.lower()] = (member.offset_data, member.size)
            except tarfile.TarError as error:
                raise UserError(f"{self._files[file]} is not a readable tar: {error}.") from error
        if not samples:
            raise UserError(f"{self.path} holds no sample.")
        split = self.where.get("split")
        chosen = [(file, key, members) for (file, key), members in samples.items() if split is None or _split(key) == split]
        if not chosen:
            splits = {_split(key) for _, key in samples}
            raise UserError(f"where: no sample of {self.path} has the split '{split}'. {did_you_mean(str(split), splits)}")
        return chosen


def _split(key: str) -> str:
    """The first folder of a key, or ''."""
    return key.partition("/")[0] if "/" in key else ""
