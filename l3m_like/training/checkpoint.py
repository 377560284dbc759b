"""Checkpoints: sharded, asynchronous, and committed by a marker that is written last.

::

    checkpoints/
      latest                  step of the newest commit; moves after the marker is durable
      step_00001500/
        __0_0.distcp ...      tensors as torch DCP writes them, one file per writing rank
        .metadata             DCP's own (pickled) index, for torch's tools; never read here
        index.json            the same as JSON: which piece of which tensor lies where, and its checksum
        state.json            all state that is no tensor
        COMMITTED             sizes of the files, checksums of the two JSON files

A directory without a whole ``COMMITTED``, or with a file that is not as it says, is no checkpoint. Saving, in order: copy
the tensors to the host (all that the caller waits for), then in a thread: data files, ``index.json``, ``state.json``,
``COMMITTED``, ``latest``, pruning; each is durable (fsync) before the next begins. So a kill at any moment leaves the newest
commit as it was. Nothing is unpickled when loading but tensors, by ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
import warnings
import zlib
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from l3m_like.core.errors import UserError, did_you_mean

log = logging.getLogger(__name__)
T = TypeVar("T")

MARKER = "COMMITTED"
INDEX = "index.json"
STATE = "state.json"
LATEST = "latest"
POINTS = ("staging", "mid_write", "before_marker", "between_marker_and_latest", "during_pruning")

#: Tests set this to be called with the name of each point of ``POINTS`` that a save passes, on every rank.
on_point: Callable[[str], None] | None = None

# one process without a process group is an ordinary case here, not worth DCP's warning at each save and load
warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable|uninitialized)")


def reached(point: str) -> None:
    """A save passes ``point``; does nothing outside tests."""
    if on_point is not None:
        on_point(point)


class DamagedCheckpoint(UserError):
    """A checkpoint that is not there, not committed, or not as its marker says."""


class Checkpointer:
    """Saves and loads the checkpoints of one run; every rank calls every method, in the same order.

    Args:
        directory: the run's ``checkpoints`` folder, shared by all ranks.
        keep_last: how many of the newest checkpoints to keep.
        keep_every: also keep those whose step is a multiple of this.
        asynchronous: write in a thread; ``save`` returns after the copy to host memory.
        process_group: a group with a CPU backend that nothing else uses while a save is under way; default: a new gloo
            group of all ranks, or none if ``torch.distributed`` is not initialised (one process).
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
        asynchronous: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if keep_last < 1:
            raise UserError(f"checkpoint.keep_last: {keep_last} would delete the checkpoint just saved; use 1 or more.")
        if keep_every is not None and keep_every < 1:
            raise UserError(f"checkpoint.keep_every: {keep_every} is not a number of steps; use 1 or more, or leave it out.")
        self.directory = Path(directory)
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.asynchronous = asynchronous
        self._owned = process_group is None and dist.is_available() and dist.is_initialized()
        # the saving thread and the training loop run collectives at the same time: they must not share a group
        self.group = dist.new_group(backend="gloo") if self._owned else process_group
        self.is_main = self.group is None or dist.get_rank(self.group) == 0
        self._held: int | None = None  # the step whose checkpoint on disk is this process's own (saved or loaded)
        self._swept = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._pinned: dict[str, Tensor] = {}

    # ---- saving ------------------------------------------------------------------------------------------------------

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Copy ``tensors`` and ``state`` and write them as the checkpoint of ``step`` (steps taken so far).

        Waits for the save before, if that still runs. A step that this process has just saved or loaded is not written
        again (its state is the same, and its checkpoint may be the only one). One left by an abandoned history is replaced;
        checkpoints of later steps are renamed to ``*.abandoned`` once this one is committed.

        Args:
            tensors: plain tensors (equal on all ranks) or DTensors; names equal on all ranks.
            state: str, int, float, bool, None, lists and string-keyed dicts of these; read on rank 0 only.

        Raises:
            UserError: the save before failed, or ``state`` would not come back from JSON as it is.
        """
        self.wait()
        if step == self._held:
            return
        text = _to_json(state) if self.is_main else ""
        staged = self._stage(tensors)
        if not self.asynchronous:
            self._write(step, staged, text)
            self.wait()
            return
        # a daemon: a run that ends by an error must not wait for ranks that are gone; a good end calls close()
        self._thread = threading.Thread(target=self._write, args=(step, staged, text), name=f"save-{step}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when no save is under way.

        Raises:
            UserError: on all ranks, if it failed on any.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise UserError(f"A checkpoint could not be saved in {self.directory}: {_reason(error)}") from error

    def clean(self) -> None:
        """Remove what a killed process left behind: partial saves, pruning half done. The first save does it too.

        For the run that trains, before it goes on; not for a reader, beside which a live run may be saving.
        """
        self.wait()
        self._on_main(self._sweep)

    def close(self, *, quiet: bool = False) -> None:
        """Finish the save under way and give up the process group.

        ``quiet``: only log that the save failed, where another error is on its way.
        """
        try:
            self.wait()
        except UserError as error:
            if not quiet:
                raise
            log.warning("%s", error)
        finally:
            if self._owned:
                dist.destroy_process_group(self.group)
                self.group, self._owned = None, False

    def _stage(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory: pinned and kept for the next save where they come from an accelerator."""
        staged = {}
        devices = set()
        for number, (name, tensor) in enumerate(tensors.items()):
            if number == len(tensors) // 2:
                reached("staging")
            local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
            if local.device.type == "cpu":
                copy = local.clone(memory_format=torch.contiguous_format)
            else:
                kept = self._pinned.get(name)
                if kept is None or kept.shape != local.shape or kept.dtype != local.dtype:
                    kept = self._pinned[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=True)
                copy = kept.copy_(local, non_blocking=True)
                devices.add(local.device)
            # not DTensor.from_local: it would move the copy to the mesh's device
            staged[name] = DTensor(copy, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else copy
        for device in devices:
            torch.accelerator.synchronize(device)
        return staged

    def _write(self, step: int, staged: dict[str, Tensor], text: str) -> None:
        """All that happens after the copy, on every rank; an error is kept for ``wait``."""
        path = self.directory / _name(step)
        try:
            self._on_main(lambda: self._make_room(path))
            writer = _Writer(path, per_thread_copy_ahead=0)  # nothing to copy ahead: the tensors are in host memory
            dcp.save(staged, storage_writer=writer, planner=_Planner(), process_group=self.group, no_dist=self.group is None)
            if not self.is_main:
                for point in POINTS[2:]:
                    reached(point)
            self._on_main(lambda: self._commit(step, path, text))
            self._held = step
        except (Exception, CheckpointException) as error:  # noqa: BLE001  a thread; CheckpointException is a BaseException
            self._error = error

    def _sweep(self) -> None:
        for step in _steps(self.directory):
            if not (self.directory / _name(step) / MARKER).exists():
                log.warning("removing %s, which a save that was cut short left behind", self.directory / _name(step))
                _remove(self.directory / _name(step))
        if (newest := _newest(self.directory)) is not None:
            self._prune(newest)
        self._swept = True

    def _make_room(self, path: Path) -> None:
        """Clear the place of the checkpoint to be written."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self._swept:
            self._sweep()
        if path.exists():
            _remove(path)
        path.mkdir()
        _fsync_directory(self.directory)

    def _commit(self, step: int, path: Path, text: str) -> None:
        _put(path / STATE, text)
        reached("before_marker")
        # sizes as the writers know them, not as this rank's file system shows them
        sizes = {STATE: len(text.encode()), INDEX: (path / INDEX).stat().st_size}
        for entry in json.loads((path / INDEX).read_text()).values():
            for chunk in entry["chunks"]:
                sizes[chunk["file"]] = max(sizes.get(chunk["file"], 0), chunk["at"] + chunk["length"])
        marker = {"step": step, "files": sizes, "sha256": {name: _sha256(path / name) for name in (INDEX, STATE)}}
        _put(path / MARKER, json.dumps(marker, indent=1))
        reached("between_marker_and_latest")
        _put(self.directory / LATEST, f"{step}\n")
        try:
            self._set_aside(step)
            self._prune(step)
        except OSError as error:  # the checkpoint is safe; a file that will not go is no reason to stop a run
            log.warning("pruning in %s: %s", self.directory, error)

    def _set_aside(self, step: int) -> None:
        """What lies beyond the step just committed is of another history: not to be resumed from, nor to be lost."""
        for later in (s for s in _steps(self.directory) if s > step):
            path = self.directory / _name(later)
            aside = path.with_suffix(".abandoned")
            log.warning("%s belongs to a history that this run has left; renamed to %s", path, aside.name)
            if aside.exists():
                _remove(aside)
            path.rename(aside)

    def _prune(self, step: int) -> None:
        committed = [s for s in _steps(self.directory) if s <= step and (self.directory / _name(s) / MARKER).exists()]
        for old in committed[: -self.keep_last]:
            if self.keep_every is None or old % self.keep_every:
                path = self.directory / _name(old)
                (path / MARKER).unlink()  # first: what is being removed is no checkpoint any more
                reached("during_pruning")
                _remove(path)

    # ---- loading -----------------------------------------------------------------------------------------------------

    def latest(self) -> int | None:
        """The step to resume from, or None if there is no checkpoint. Damaged and partial ones are skipped with a message.

        Raises:
            UserError: there were checkpoints, but not one is whole.
        """
        self.wait()
        return self._on_main(lambda: next(iter(whole_steps(self.directory)), None))

    def load(self, step: int, tensors: Mapping[str, Tensor], *, partial: bool = False) -> dict[str, Any]:
        """Fill ``tensors`` in place from the checkpoint of ``step``, saved on any mesh; returns its ``state``.

        Args:
            tensors: plain tensors or DTensors of the saved names, shapes and dtypes.
            partial: the checkpoint may hold more than ``tensors`` (e.g. a sampler that wants the weights alone).

        Raises:
            DamagedCheckpoint: it is missing, partial or damaged.
            UserError: names, shapes or dtypes differ.
        """
        self.wait()
        path = self.directory / _name(step)
        self._on_main(lambda: _require_whole(self.directory, step))
        index = _read_index(path)
        _match(path, index, tensors, partial=partial)
        _fill(path, tensors, self.group, index)
        self._held = None if partial else step
        return json.loads((path / STATE).read_text())

    def resume(self, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]] | None:
        """``(step, state)`` of the newest checkpoint that can be read to its end, loaded into ``tensors``; None: there is none.

        Unlike ``latest`` and ``load``, also falls back when damage shows only in reading (a flipped bit).
        """
        self.wait()
        unreadable: set[int] = set()
        while (step := self._on_main(lambda: next(iter(whole_steps(self.directory, unreadable)), None))) is not None:
            try:
                return step, self.load(step, tensors)
            except DamagedCheckpoint as error:
                unreadable.add(step)
                if self.is_main:
                    log.warning("%s", error)
        return None

    def _on_main(self, work: Callable[[], T]) -> T:
        """``work()`` on rank 0; what it returns or raises, on every rank."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except (OSError, UserError) as error:
                outcome[1] = error
        if self.group is not None:
            dist.broadcast_object_list(outcome, group=self.group, group_src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def refuse_other_model(directory: Path, step: int, model: nn.Module) -> None:
    """Compare the checkpoint of ``step`` with ``model`` (on any device, meta too); a run can go on there only if all of it is the
    same.

    Raises:
        DamagedCheckpoint: there is no such checkpoint, or it is damaged.
        UserError: names, shapes or dtypes differ.
    """
    _require_whole(directory, step)
    index = _read_index(directory / _name(step))
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    of_model = {name: entry for name, entry in index.items() if name.startswith("model/")}
    _match(directory / _name(step), of_model, {f"model/{name}": tensor for name, tensor in tensors.items()}, partial=False)


def load_full(directory: str | Path, step: int | None = None, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Whole tensors on the CPU, in this process alone, whatever mesh saved them (notebooks, sampling, export).

    Args:
        directory: a run's ``checkpoints`` folder.
        step: default: the newest.
        names: default: all.

    Raises:
        DamagedCheckpoint: there is none, or it is damaged.
        UserError: a name that it does not hold.
    """
    directory = Path(directory)
    if step is None:
        step = next(iter(whole_steps(directory)), None)
        if step is None:
            raise DamagedCheckpoint(f"{directory} holds no checkpoint.")
    whole = WholeTensors(directory, step)
    return whole.read(whole.index if names is None else names)


@dataclass(frozen=True)
class StoredTensor:
    """What a checkpoint says of a tensor that it holds."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def stored_tensors(directory: Path, step: int) -> dict[str, StoredTensor]:
    """The tensors that the checkpoint of ``step`` holds; only its small files are read.

    Raises:
        DamagedCheckpoint: there is no such checkpoint, or it is damaged.
    """
    _require_whole(directory, step)
    index = _read_index(directory / _name(step))
    return {name: StoredTensor(_dtype(entry), tuple(entry["shape"])) for name, entry in index.items()}


class WholeTensors:
    """The tensors of one checkpoint, whole, on the CPU, read when they are asked for.

    Attributes:
        index: ``{name: its dtype and shape, and where it lies}``.

    Raises:
        DamagedCheckpoint: there is no such checkpoint, or it is damaged.
    """

    def __init__(self, directory: Path, step: int) -> None:
        _require_whole(directory, step)
        self.path = directory / _name(step)
        self.index = _read_index(self.path)

    def dtype(self, name: str) -> torch.dtype:
        return _dtype(self.index[name])

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors with these names.

        Raises:
            UserError: a name that the checkpoint does not hold.
        """
        wanted = list(names)
        for name in wanted:
            if name not in self.index:
                raise UserError(f"{self.path} holds no tensor '{name}'. {did_you_mean(name, self.index)}")
        tensors = {name: torch.empty(self.index[name]["shape"], dtype=self.dtype(name)) for name in wanted}
        _fill(self.path, tensors, None, self.index)
        return tensors


# ---- which checkpoints are there -----------------------------------------------------------------------------------------


def _name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step that the name of a checkpoint's folder says; None: it is no such name."""
    found = re.fullmatch(r"step_(\d+)", folder.name)
    return None if found is None else int(found[1])


def _steps(directory: Path) -> list[int]:
    """Steps that have a directory, whole or not, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(found[1]) for entry in directory.iterdir() if (found := re.fullmatch(r"step_(\d{8,})", entry.name)))


def _newest(directory: Path) -> int | None:
    """What the ``latest`` file says."""
    text = (directory / LATEST).read_text().strip() if (directory / LATEST).exists() else ""
    return int(text) if text.isdecimal() else None


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint at ``path``, or None. Reads sizes and the small files, not the data."""
    if not path.is_dir():
        return "it does not exist"
    if not (path / MARKER).exists():
        return f"it has no {MARKER} marker: its save was cut short"
    try:
        marker = json.loads((path / MARKER).read_text())
        files, checksums = dict(marker["files"]), dict(marker["sha256"])
    except (ValueError, KeyError, TypeError):
        return f"its {MARKER} marker is damaged"
    for name, size in files.items():
        if not (path / name).is_file():
            return f"its file {name} is missing"
        if (path / name).stat().st_size != size:
            return f"its file {name} has {(path / name).stat().st_size} bytes instead of {size}"
    for name, checksum in checksums.items():
        if _sha256(path / name) != checksum:
            return f"its file {name} was changed"
    return None


def whole_steps(directory: Path, unreadable: Container[int] = ()) -> Iterable[int]:
    """Steps of the whole checkpoints, best first, without the ``unreadable``; says which are skipped and why."""
    steps = _steps(directory)
    newest = _newest(directory)
    last = newest if newest is not None else max(steps, default=0)
    # beyond `latest` lie checkpoints of an abandoned history, or one whose save was cut just before `latest` moved
    order = sorted((s for s in steps if s <= last), reverse=True) + [s for s in steps if s > last]
    found = False
    committed = newest is not None
    for step in order:
        path = directory / _name(step)
        committed = committed or (path / MARKER).exists()
        if step in unreadable:
            continue
        if (what := damage(path)) is None:
            found = True
            yield step
        else:
            log.warning("skipping the checkpoint %s: %s", path, what)
    if committed and not found:
        # to begin at step 0 in silence would throw the run's history away
        raise DamagedCheckpoint(
            f"{directory}: checkpoints were saved here, but not one is whole (see the messages above). Restore one, or give a "
            "new run directory to start again."
        )


def _require_whole(directory: Path, step: int) -> None:
    if (what := damage(directory / _name(step))) is not None:
        whole = [s for s in _steps(directory) if damage(directory / _name(s)) is None]
        have = f"Whole ones: steps {', '.join(map(str, whole))}." if whole else f"{directory} holds no whole one."
        raise DamagedCheckpoint(f"Checkpoint {directory / _name(step)} cannot be used: {what}. {have}")


# ---- torch DCP: what is stored, and where ----------------------------------------------------------------------------------


class _Planner(DefaultSavePlanner):
    """DCP's, with the point in the middle of the data file."""

    _written = 0

    def resolve_data(self, write_item: Any) -> Any:
        if self._written == len(self.plan.items) // 2:
            reached("mid_write")
        self._written += 1
        return super().resolve_data(write_item)


@dataclass
class _Stored(_StorageInfo):
    """Where a piece lies, and the checksum of its bytes."""

    crc32: int = 0


class _Writer(FileSystemWriter):
    """DCP's, with the index also written as JSON, and in it a checksum per piece (``torch.load`` checks none)."""

    def write_data(self, plan: Any, planner: Any) -> Future[list[WriteResult]]:
        results: list[WriteResult] = super().write_data(plan, planner).wait()
        summed = []
        for result in results:
            info = result.storage_data
            crc = _crc32(Path(self.path) / info.relative_path, info.offset, info.length)  # still in the page cache
            summed.append(replace(result, storage_data=_Stored(info.relative_path, info.offset, info.length, crc32=crc)))
        out: Future[list[WriteResult]] = Future()
        out.set_result(summed)
        return out

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        stored = {result.index: result.storage_data for part in results for result in part}
        index = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)  # nothing but tensors is saved through DCP
            chunks = []
            for chunk in entry.chunks:
                info = stored[MetadataIndex(name, chunk.offsets)]
                where = {"file": info.relative_path, "at": info.offset, "length": info.length, "crc32": info.crc32}
                chunks.append({"offsets": list(chunk.offsets), "sizes": list(chunk.sizes)} | where)
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            index[name] = {"dtype": dtype, "shape": list(entry.size), "chunks": chunks}
        _put(Path(self.path) / INDEX, json.dumps(index))
        plain = [[replace(r, storage_data=_StorageInfo(*astuple(r.storage_data)[:3])) for r in part] for part in results]
        super().finish(metadata, plain)  # no class of ours in what torch's tools will unpickle


class _Reader(FileSystemReader):
    """DCP's, with the index (or those entries of it that are wanted) from JSON, and the checksum of each piece checked before it
    is used."""

    def __init__(self, path: Path, index: Mapping[str, Any]) -> None:
        super().__init__(path)
        self.index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {}
        storage = {}
        for name, entry in self.index.items():
            chunks = [ChunkStorageMetadata(torch.Size(c["offsets"]), torch.Size(c["sizes"])) for c in entry["chunks"]]
            tensors[name] = TensorStorageMetadata(TensorProperties(dtype=_dtype(entry)), torch.Size(entry["shape"]), chunks)
            for c in entry["chunks"]:
                storage[MetadataIndex(name, c["offsets"])] = _Stored(c["file"], c["at"], c["length"], crc32=c["crc32"])
        return Metadata(tensors, storage_data=storage, storage_meta=StorageMeta(load_id=self.load_id))

    def read_data(self, plan: Any, planner: Any) -> Future[None]:
        for index in {item.storage_index: None for item in plan.items}:
            info = self.storage_data[index]
            if _crc32(Path(self.path) / info.relative_path, info.offset, info.length) != info.crc32:
                raise DamagedCheckpoint(f"the bytes of '{index.fqn}' in {info.relative_path} were changed")
        return super().read_data(plan, planner)


def _read_index(path: Path) -> dict[str, Any]:
    return json.loads((path / INDEX).read_text())


def _dtype(entry: Mapping[str, Any]) -> torch.dtype:
    return getattr(torch, entry["dtype"])


def _match(path: Path, index: Mapping[str, Any], tensors: Mapping[str, Tensor], *, partial: bool) -> None:
    """Names both ways, shapes and dtypes; all differences in one error, the first few in words."""
    wrong = [f"it holds no '{name}'. {did_you_mean(name, set(index) - set(tensors))}" for name in tensors if name not in index]
    if not partial:
        wrong += [
            f"it holds '{name}', which this run has not. {did_you_mean(name, set(tensors) - set(index))}"
            for name in index
            if name not in tensors
        ]
    for name in (name for name in tensors if name in index):
        saved, here = index[name], tensors[name]
        if tuple(saved["shape"]) != tuple(here.shape):
            wrong.append(f"'{name}' is {saved['shape']} there and {list(here.shape)} here.")
        elif _dtype(saved) != here.dtype:
            wrong.append(f"'{name}' is {_dtype(saved)} there and {here.dtype} here.")
    if wrong:
        more = f"\n  ... and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        lines = "".join(f"\n  {line}" for line in wrong[:5])
        raise UserError(
            f"Checkpoint {path} does not fit this run:{lines}{more}\nResume with the run's own config.yaml, or start a new run."
        )


def _fill(path: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None, index: Mapping[str, Any]) -> None:
    wanted = {name: index[name] for name in tensors}
    try:
        dcp.load(dict(tensors), storage_reader=_Reader(path, wanted), process_group=group, no_dist=group is None)
    except CheckpointException as error:  # on every rank, if reading failed on any
        if any(isinstance(cause, torch.OutOfMemoryError) for cause, _ in error.failures.values()):
            raise
        raise DamagedCheckpoint(f"Checkpoint {path} cannot be read: {_reason(error)}.") from error


# ---- small files ---------------------------------------------------------------------------------------------------------


def _put(path: Path, text: str) -> None:
    """Write a file atomically and durably: it is there with all of ``text``, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _fsync_directory(path.parent)


def _fsync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path)


def _crc32(path: Path, at: int, length: int) -> int:
    """Checksum of a part of a file, read in blocks."""
    crc = 0
    with path.open("rb") as file:
        file.seek(at)
        while length > 0 and (block := file.read(min(length, 1 << 24))):
            crc = zlib.crc32(block, crc)
            length -= len(block)
    return crc


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _to_json(state: Mapping[str, Any]) -> str:
    """``state`` as JSON, if it will come back as the same; floats are written so that they do."""
    _check_json(state, "state")
    return json.dumps(state)


def _check_json(value: Any, where: str) -> None:
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise UserError(f"{where}: the key {key!r} would come back from JSON as a string; use string keys.")
            _check_json(item, f"{where}.{key}")
    elif type(value) is list:
        for number, item in enumerate(value):
            _check_json(item, f"{where}.{number}")
    elif value is not None and type(value) not in (str, int, float, bool):
        kind = type(value).__name__
        raise UserError(f"{where}: a {kind} does not come back from JSON; pass str, int, float, bool, None, list or dict.")


def _reason(error: BaseException) -> str:
    """The first line of the cause; DCP wraps one error per rank."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(sorted(error.failures.items())))
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    return f"{type(error).__name__}: {error}"
