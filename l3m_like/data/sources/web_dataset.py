"""Webdataset tars: the members ``KEY.EXTENSION`` with one KEY are one sample."""

from __future__ import annotations

import io
import json
import tarfile
import uuid
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Self

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.data.paths import resolve, short_names
from l3m_like.data.sources.spans import decompress

Members = dict[str, tuple[int, int]]  # extension -> byte offset, size

#: the index of a tar above one of these is kept beside it
KEPT_BYTES = 64 * 2**20
KEPT_MEMBERS = 2000


class WebDataset:
    """Samples of one or more tars, in file order.

    Args:
        path: a ``.tar`` or ``.tar.gz``, ``"shipped:NAME"``, or a pattern such as ``train-{000..127}.tar``. A tar is read in
            place; a ``.tar.gz`` has no place to seek to and is held in memory, decompressed.
        where: ``{split: NAME}``: only the samples whose key begins with the folder ``NAME/``.

    The tars are indexed by the first ``len()``; ``read`` may then be called from any thread. The index of a large ``.tar`` is
    kept beside it as ``NAME.tar.index.json``, if the folder can be written to, and used while size and time of the tar agree.

    Raises (by ``len``):
        DataMissing: no such file. UserError: ``where`` selects nothing; a file is not a tar, or cut off.
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
                if len(sample[extension]) < size:
                    raise UserError(f"{archive} has become shorter since it was indexed. Copy it again.")
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
        return [decompress(path) if path.suffix in (".gz", ".tgz") else path for path in self._files]

    @cached_property
    def _index(self) -> list[tuple[int, str, Members]]:
        """(file, key, where its members are) per sample."""
        samples = [
            (file, key, members)
            for file, archive in enumerate(self._archives)
            for key, members in self._samples(self._files[file], archive).items()
        ]
        if not samples:
            raise UserError(f"{self.path} holds no sample.")
        split = self.where.get("split")
        chosen = [sample for sample in samples if split is None or _split(sample[1]) == split]
        if not chosen:
            splits = {_split(key) for _, key, _ in samples}
            raise UserError(f"where: no sample of {self.path} has the split '{split}'. {did_you_mean(str(split), splits)}")
        return chosen

    def _samples(self, path: Path, archive: Path | bytes) -> dict[str, Members]:
        """The samples of one tar by key."""
        if isinstance(archive, bytes):
            return _scan(io.BytesIO(archive), path)
        stamp = _stamp(archive)
        samples = _kept(archive, stamp)
        if samples is None:
            with archive.open("rb") as stream:
                samples = _scan(stream, path)
            if stamp["size"] > KEPT_BYTES or sum(map(len, samples.values())) > KEPT_MEMBERS:
                _keep(archive, stamp, samples)
        return samples


class Header(tarfile.TarInfo):
    """A member's header. A tar that ends without its end mark raises ``tarfile.ReadError``; ``TarInfo`` takes it for complete."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the end mark
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"it is cut off or damaged at byte {tar.offset} ({error})") from error


def key_and_extension(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """Of a member; they are parted by the first dot of the file's name. None: it is no file of a sample, such as ``.hidden``."""
    folder, slash, file = member.name.removeprefix("./").rpartition("/")
    stem, dot, extension = file.partition(".")
    return (folder + slash + stem, extension.lower()) if member.isfile() and stem and dot else None


def _scan(stream: BinaryIO, path: Path) -> dict[str, Members]:
    samples: dict[str, Members] = {}
    try:
        with tarfile.open(fileobj=stream, mode="r:", tarinfo=Header) as tar:
            for member in tar:
                if names := key_and_extension(member):
                    key, extension = names
                    samples.setdefault(key, {})[extension] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise UserError(f"{path} is not a readable tar: {error}.") from error
    return samples


def _stamp(tar: Path) -> dict[str, int]:
    status = tar.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _kept(tar: Path, stamp: dict[str, int]) -> dict[str, Members] | None:
    """The index beside a tar; None: there is none for this content of it."""
    try:
        kept = json.loads(_place(tar).read_bytes())
        return kept["samples"] if kept["tar"] == stamp else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(tar: Path, stamp: dict[str, int], samples: dict[str, Members]) -> None:
    part = tar.with_name(f".{tar.name}.index.{uuid.uuid4().hex}.part")  # several hosts may write at once
    try:
        part.write_text(json.dumps({"tar": stamp, "samples": samples}))
        part.replace(_place(tar))
    except OSError:  # a folder that cannot be written to
        part.unlink(missing_ok=True)


def _place(tar: Path) -> Path:
    return tar.with_name(f"{tar.name}.index.json")


def _split(key: str) -> str:
    """The first folder of a key, or ''."""
    return key.partition("/")[0] if "/" in key else ""
