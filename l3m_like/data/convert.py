"""Conversion: the samples of any indexed source, written as webdataset shards or as Megatron's token files.

The samples are cut into *parts*, by the input and the command alone. A process writes a part under a temporary name, renames
it, and notes it in ``.parts/``. So whatever ends the conversion, the same command makes the parts that are missing, and the
bytes of the result are those that one process makes without a break.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import inspect
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

import l3m_like.data
from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.keys import KeySpec
from l3m_like.data.dataset import BadSample, Item, Part, Processor, Visit
from l3m_like.data.paths import resolve
from l3m_like.data.processors.token_ids import TokenIds
from l3m_like.data.processors.tokenize import Tokenize
from l3m_like.data.sources.megatron import MegatronWriter

#: what an input may be, and the source that reads it
FORMS = {
    "json": "JsonLines",
    "csv": "Csv",
    "images": "ImageFolder",
    "hf": "HFDataset",
    "webdataset": "WebDataset",
    "megatron": "Megatron",
}
ENDINGS = (
    (r"\.jsonl?(\.gz)?", "json"),
    (r"\.[ct]sv(\.gz)?", "csv"),
    (r"\.(tar|tar\.gz|tgz)", "webdataset"),
    (r"\.(parquet|arrow)", "hf"),
    (r"\.(bin|idx)", "megatron"),
)
MANIFEST, LEDGER, PARTS = "manifest.json", "ledger.jsonl", ".parts"
SHARD_BYTES = 256 * 2**20
MEASURED = 256  # samples that are read to find the size of a shard
LARGEST_PART = 2**16  # documents in a part of a Megatron file
PARTS_AT_LEAST = 64  # of one that is small, so that all processes have something to do


# ---- what is read ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Input:
    """An indexed source and how it was named.

    Args:
        path: of the source.
        form: one of ``FORMS``; "": by the path's ending, or by what is in the folder.
        settings: further arguments of the source, e.g. ``{"where": {"split": "train"}}``.

    Raises:
        UserError: a form that is not known, or not to be seen; an argument that the source does not have.
    """

    path: str
    form: str
    settings: Mapping[str, Any]

    @functools.cached_property
    def source(self) -> Any:
        if self.form not in FORMS:
            raise UserError(f"--from {self.form}: there is no such form. {did_you_mean(self.form, FORMS)}")
        made = getattr(l3m_like.data, FORMS[self.form])
        arguments = [name for name in inspect.signature(made).parameters if name != "path"]
        for name in self.settings:
            if name not in arguments:
                raise UserError(f"{name}: {FORMS[self.form]} has no such argument. {did_you_mean(name, arguments)}")
        return made(self.path, **self.settings)

    @classmethod
    def of(cls, path: str, form: str | None = None, settings: Mapping[str, Any] | None = None) -> Input:
        return cls(path, form or form_of(path), dict(settings or {}))

    def facts(self) -> dict[str, Any]:
        """What identifies the input (JSON values); reads the source's index."""
        samples = len(self.source)
        facts = {"path": self.path, "from": self.form, "settings": dict(self.settings), "samples": samples}
        facts |= {"first": self.source.reference(0), "last": self.source.reference(samples - 1)}
        if re.search(rf"({'|'.join(ending for ending, _ in ENDINGS)})$", self.path):
            facts["bytes"] = sum(file.stat().st_size for file in resolve(self.path))
        return facts


def form_of(path: str) -> str:
    """The form of the input at ``path``.

    Raises:
        UserError: it cannot be told.
    """
    for ending, form in ENDINGS:
        if re.search(rf"{ending}$", path):
            return form
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        raise UserError(f"{path}: neither a folder nor a file of a known ending. Say what it is: --from {'|'.join(FORMS)}.")
    return "hf" if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")) else "images"


def parse_settings(written: Iterable[str]) -> dict[str, Any]:
    """``["where.split=train", "delimiter=;"]`` -> ``{"where": {"split": "train"}, "delimiter": ";"}``; values are YAML."""
    settings: dict[str, Any] = {}
    for text in written:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"{text} (command line): settings of the source are given as key=value, e.g. where.split=train.")
        *above, name = key.split(".")
        place = settings
        for each in above:
            place = place.setdefault(each, {})
            if not isinstance(place, dict):
                raise UserError(f"{text} (command line): '{each}' has a value already.")
        place[name] = yaml.safe_load(value)
        if isinstance(place[name], datetime.date):
            place[name] = value
    return settings


def parse_bytes(written: str) -> int:
    """``"256M"`` -> 268435456; K, M, G and T are powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", written.strip(), re.IGNORECASE)
    size = 0 if match is None else int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))
    if size < 1:
        raise UserError(f"--shard-size {written}: write a number of bytes, e.g. 256M.")
    return size


# ---- what is written -------------------------------------------------------------------------------------------------


class Target(Protocol):
    process: Processor

    def facts(self) -> dict[str, Any]:
        """What identifies the target (JSON values)."""

    def part_size(self, part: Part) -> int:
        """Samples in a part: a function of the input and of the target's arguments."""

    def names(self, number: int) -> list[str]:
        """The files of part ``number``, relative to the output."""

    def write(self, stem: Path, items: Iterable[tuple[int, Item]]) -> None:
        """Write (number, sample) pairs to ``stem`` with the endings of ``names``."""

    def finish(self, folder: Path, parts: int) -> list[str]:
        """All parts are there: the names of the files that are the result."""


class Members:
    """A sample -> the members of a webdataset sample, ``{extension: bytes}`` as uint8 arrays.

    Bytes stay as they are; texts under ``txt`` and ``cls``, and numbers under ``cls``, become UTF-8; all other fields go
    together into ``json``.

    Args:
        named: whether the names of bytes are extensions of files.

    Raises (by a call):
        UserError: bytes whose extension is not known; ``json`` both given and made.
    """

    def __init__(self, *, named: bool) -> None:
        self.named = named

    def keys(self) -> dict[str, KeySpec]:
        return {}

    def check(self) -> None:
        """Nothing to read ahead."""

    def __call__(self, sample: Mapping[str, Any], visit: Visit) -> dict[str, Any]:
        members, rest = {}, {}
        for name, value in sample.items():
            if isinstance(value, bytes):
                if not self.named:
                    raise UserError(f"field '{name}' holds bytes. Name their extension, and other fields: columns.png={name}.")
                members[name] = value
            elif name in ("txt", "cls") and isinstance(value, (str, int)):
                members[name] = str(value).encode()
            else:
                rest[name] = value
        if rest:
            if "json" in members:
                raise UserError(f"the sample has 'json', and {sorted(rest)} would have to go there too.")
            members["json"] = json.dumps(rest, ensure_ascii=False).encode()
        return members


class ToWebDataset:
    """``shard-000000.tar`` and following; sample i of the source has the key i in nine digits, in shard i // samples.

    Args:
        samples: in a shard.
        size: bytes of a shard; about, since the number of samples is found from the mean of up to 256 of them.

    Raises:
        UserError: not exactly one of them.
    """

    def __init__(self, source: Any, samples: int | None = None, size: int | None = None) -> None:
        if samples is not None and size is not None:
            raise UserError("--samples-per-shard and --shard-size are both given; a shard has one size.")
        if samples is not None and samples < 1:
            raise UserError(f"--samples-per-shard is {samples}; it is at least 1.")
        self.samples, self.size = samples, size or SHARD_BYTES
        columns = getattr(source, "columns", None)
        self.process: Any = Members(named=columns is None or columns.names is not None)

    def facts(self) -> dict[str, Any]:
        return {"to": "webdataset"}

    def part_size(self, part: Part) -> int:
        if self.samples is not None:
            return self.samples
        total, sizes = len(part.source), []
        for index in range(0, total, -(-total // MEASURED)):
            try:
                members = part.at(index).data
            except BadSample:  # met again, and reported, when its turn comes
                continue
            sizes.append(sum(512 + -(-len(content) // 512) * 512 for content in members.values()))
        return max(1, round(self.size * len(sizes) / max(1, sum(sizes))))

    def names(self, number: int) -> list[str]:
        return [f"shard-{number:06d}.tar"]

    def write(self, stem: Path, items: Iterable[tuple[int, Item]]) -> None:
        with stem.with_suffix(".tar").open("wb") as stream:
            with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for number, item in items:
                    for extension, content in item.data.items():
                        member = tarfile.TarInfo(f"{number:09d}.{extension}")  # time, owner and group are 0
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))  # type: ignore[arg-type]
            stream.flush()
            os.fsync(stream.fileno())

    def finish(self, folder: Path, parts: int) -> list[str]:
        return [name for number in range(parts) for name in self.names(number)]


class ToMegatron:
    """``tokens.bin`` and ``tokens.idx``, the documents in the order of the source.

    Args:
        tokenizer, vocab_size, field, end: as ``Tokenize``. Tokenizer ``"ids"``: the samples hold token ids as ``ids``, and get
            no end token.

    Raises:
        UserError: see ``Tokenize``; ``field`` or ``end`` of ids.
    """

    def __init__(self, tokenizer: str, vocab_size: int, field: str | None = None, end: str | None = None) -> None:
        if tokenizer == "ids" and (field is not None or end is not None):
            raise UserError("--field and --end have no meaning with --tokenizer ids. Remove them.")
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.process: Any = (
            TokenIds(vocab_size)
            if tokenizer == "ids"
            else Tokenize(tokenizer, vocab_size=vocab_size, field=field or "text", end=end)
        )

    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"to": "megatron", "tokenizer": self.tokenizer, "vocab_size": self.vocab_size}
        if self.tokenizer not in ("ids", "bytes"):
            (path,) = resolve(self.tokenizer)
            facts["tokenizer_digest"] = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
        return facts | ({} if self.tokenizer == "ids" else {"field": self.process.field, "end": self.process.end_id})

    def part_size(self, part: Part) -> int:
        return min(LARGEST_PART, -(-len(part.source) // PARTS_AT_LEAST))

    def names(self, number: int) -> list[str]:
        return [f"{PARTS}/{number:06d}{ending}" for ending in (".bin", ".idx")]

    def write(self, stem: Path, items: Iterable[tuple[int, Item]]) -> None:
        with MegatronWriter(str(stem), self.vocab_size) as out:
            for _, item in items:
                out.add(item.data["ids"])

    def finish(self, folder: Path, parts: int) -> list[str]:
        whole = folder / PARTS / "tokens"
        with MegatronWriter(str(whole), self.vocab_size) as out:
            for number in range(parts):
                out.append(folder / self.names(number)[0])
        names = ["tokens.bin", "tokens.idx"]
        for name in names:
            (folder / PARTS / name).replace(folder / name)
        return names


# ---- the work --------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What is known of a part that is done."""

    samples: int
    left_out: list[dict[str, str]]
    files: dict[str, int]  # name -> bytes


class Conversion:
    """One conversion into one folder, begun or to be gone on with.

    Args:
        given: what is read.
        target: what is written.
        folder: the output: new, empty, or of the same conversion.
        max_bad: samples that may be left out (they are noted in ``ledger.jsonl``); 0: the first ends the conversion. Another
            number is the same conversion.

    Raises:
        UserError: the folder holds something else.
    """

    def __init__(self, given: Input, target: Target, folder: str | Path, *, max_bad: int = 0) -> None:
        self.target, self.folder, self.max_bad = target, Path(os.path.expanduser(folder)), max_bad
        self.part = Part("", given.source, target.process)
        self.total = len(given.source)  # reads the index, which forked processes share
        target.process.check()
        self.part_size = target.part_size(self.part)
        self.facts = {"input": given.facts(), "output": target.facts() | {"part": self.part_size}}
        self.parts = -(-self.total // self.part_size)
        self.records: dict[int, Record] = {}
        #: files of a finished conversion that are not what they were: {name: (bytes, bytes when it was finished)}
        self.damaged: dict[str, tuple[int, int]] = {}
        self._adopt()

    @property
    def complete(self) -> bool:
        return self._finished is not None and not self.damaged

    def run(self, workers: int = 1, report: Callable[[Record], None] = lambda record: None) -> dict[str, Any]:
        """Make what is missing, with ``workers`` processes, and return the manifest. ``report`` hears of every part.

        Raises:
            UserError: too many samples cannot be read; a process died.
        """
        if self.complete:
            assert self._finished is not None
            return self._finished
        (self.folder / PARTS).mkdir(parents=True, exist_ok=True)
        for number, record in self.records.items():  # of a finished conversion
            self._keep(number, record)
        _write(self.folder / MANIFEST, json.dumps(self.facts, indent=1) + "\n")
        todo = [number for number in range(self.parts) if number not in self.records]
        for number, record in self._made(todo, workers):
            self.records[number] = record
            report(record)
            self._check_bad()
        self._check_bad()
        files = self.target.finish(self.folder, self.parts)
        left_out = [entry for number in range(self.parts) for entry in self.records[number].left_out]
        if left_out:
            _write(self.folder / LEDGER, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in left_out))
        manifest = self.facts | {
            "samples": sum(record.samples for record in self.records.values()),
            "left_out": len(left_out),
            "files": {name: (self.folder / name).stat().st_size for name in files},
            "parts": {
                number: asdict(record) for number, record in sorted(self.records.items()) if set(record.files) <= set(files)
            },
        }
        _write(self.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        shutil.rmtree(self.folder / PARTS)
        return manifest

    def make(self, number: int) -> Record:
        """Write part ``number`` and its record."""
        left_out: list[dict[str, str]] = []
        indices = range(number * self.part_size, min((number + 1) * self.part_size, self.total))

        def items() -> Iterator[tuple[int, Item]]:
            for index in indices:
                try:
                    item = self.part.at(index)
                except BadSample as error:
                    left_out.append({"sample": error.reference, "error": error.message})
                    if len(left_out) > self.max_bad:
                        raise self._too_many(left_out) from None  # a BadSample does not travel between processes
                    continue
                yield index, item

        stem = self.folder / PARTS / f"{number:06d}-{os.getpid()}"
        self.target.write(stem, items())
        record = Record(len(indices) - len(left_out), left_out, {})
        for name in self.target.names(number):
            made = stem.with_suffix(Path(name).suffix)
            record.files[name] = made.stat().st_size
            made.replace(self.folder / name)
        self._keep(number, record)
        return record

    def _keep(self, number: int, record: Record) -> None:
        _write(self.folder / PARTS / f"{number:06d}.json", json.dumps(asdict(record)))

    def _made(self, todo: list[int], workers: int) -> Iterator[tuple[int, Record]]:
        """(number, record) of the parts in ``todo``, in the order in which they are done."""
        if min(workers, len(todo)) <= 1:
            yield from ((number, self.make(number)) for number in todo)
            return
        # forked processes share the index, and a .gz that is held in memory
        others = set(multiprocessing.active_children())
        pool = ProcessPoolExecutor(
            min(workers, len(todo)), multiprocessing.get_context("fork"), initializer=_begin, initargs=(self,)
        )
        try:
            futures = {pool.submit(_make, number): number for number in todo}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process of the conversion was killed (is memory short?). The same command goes on; fewer --workers need less."
            ) from error
        except BaseException:
            for child in set(multiprocessing.active_children()) - others:
                child.kill()  # what is half done is nothing
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _adopt(self) -> None:
        """See what is there already.

        Raises:
            UserError: another conversion, or no conversion.
        """
        self._finished: dict[str, Any] | None = None
        path = self.folder / MANIFEST
        if not path.is_file():
            if self.folder.is_dir() and any(file.name != PARTS for file in self.folder.iterdir()):
                raise UserError(f"{self.folder} is not empty, and no conversion began there. Give a new folder.")
            return
        try:
            manifest = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path} is not a manifest: {error}. Give a new folder.") from error
        there = _leaves({key: manifest.get(key) for key in self.facts})
        wanted = _leaves(self.facts)
        for key in dict.fromkeys([*there, *wanted]):
            if there.get(key) != wanted.get(key):
                raise UserError(
                    f"{self.folder} holds another conversion: {key} is {there.get(key)!r} there, {wanted.get(key)!r} here. "
                    "Give a new folder, or the command that began this one."
                )
        if "files" in manifest:
            self._finished = manifest
            sizes = {name: _size(self.folder / name) for name in manifest["files"]}
            self.damaged = {name: (sizes[name], size) for name, size in manifest["files"].items() if sizes[name] != size}
            shutil.rmtree(self.folder / PARTS, ignore_errors=True)  # if it was ended just before that
            kept = manifest["parts"]
        else:
            kept = {file.stem: json.loads(file.read_bytes()) for file in (self.folder / PARTS).glob("*.json")}
        for number, fields in kept.items():
            record = Record(**fields)
            if all(_size(self.folder / name) == size for name, size in record.files.items()):
                self.records[int(number)] = record

    def _check_bad(self) -> None:
        left_out = [entry for _, record in sorted(self.records.items()) for entry in record.left_out]
        if len(left_out) > self.max_bad:
            raise self._too_many(left_out)

    def _too_many(self, left_out: list[dict[str, str]]) -> UserError:
        first = left_out[0]
        several = f" ({len(left_out)} samples so far cannot be used, and --max-bad is {self.max_bad}.)" if self.max_bad else ""
        return UserError(f"{first['sample']}: {first['error']}{several} The same command with a greater --max-bad goes on.")


_conversion: Conversion  # of this process, if it is one of several


def _begin(conversion: Conversion) -> None:
    """In a new process: what it works on; and it ends when its parent does, however that ends."""
    global _conversion
    _conversion = conversion
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends its children
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make(number: int) -> Record:
    return _conversion.make(number)


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.parent / (PARTS if path.parent.name != PARTS else "") / f"{path.name}.{os.getpid()}"
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _size(path: Path) -> int:
    """Bytes of a file; -1: there is none."""
    return path.stat().st_size if path.is_file() else -1


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """``{dotted path: value}``."""
    if not isinstance(value, Mapping) or not value:
        return {path: value}
    return {p: v for key, each in value.items() for p, v in _leaves(each, f"{path}.{key}" if path else str(key)).items()}


# ---- what is said meanwhile ------------------------------------------------------------------------------------------


class Progress:
    """One live line in a terminal; elsewhere a plain line, at most every ``seconds``."""

    def __init__(self, conversion: Conversion, *, seconds: float = 5.0) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        done = conversion.records.values()
        self.total, self.seconds = conversion.total, seconds
        self.done = self.before = sum(record.samples + len(record.left_out) for record in done)
        self.left_out = sum(len(record.left_out) for record in done)
        self.began = self._said = time.perf_counter()
        console = Console()
        self._live: Progress | None = None
        if console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            # refreshed by the calls alone: there is no thread when processes are forked
            self._live = Progress(*columns, console=console, auto_refresh=False)
            self._task = self._live.add_task("samples", total=self.total, completed=self.done)
            self._live.start()

    def __call__(self, record: Record) -> None:
        self.done += record.samples + len(record.left_out)
        self.left_out += len(record.left_out)
        now = time.perf_counter()
        rate = (self.done - self.before) / max(now - self.began, 1e-9)
        text = f"samples, {rate:,.0f}/s" + (f", {self.left_out} left out" if self.left_out else "")
        if self._live is not None:
            self._live.update(self._task, completed=self.done, description=text, refresh=True)
        elif now - self._said >= self.seconds:
            print(f"{self.done:,} of {self.total:,} {text}", flush=True)
            self._said = now

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
