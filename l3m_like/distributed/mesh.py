"""The process group, made once, and the mesh of a run: a frozen object that is passed as an argument.

World size 1 is an ordinary mesh. Axes, outermost first::

    pp            pipeline stages
    dp_replicate  copies of the model (HSDP); gradients are all-reduced
    dp_shard      parameters, gradients and optimizer state are sharded (FSDP2)
    cp            the sequence is cut; parameters are sharded over dp_shard x cp together
    tp            matrices are cut; every tp rank sees the same rows

Rows of a batch are dealt over dp_replicate x dp_shard.
"""

from __future__ import annotations

import atexit
import datetime
import functools
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from l3m_like.core.errors import UserError
from l3m_like.distributed.rows import gather_rows, pass_rows_on

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


def init_process_group(timeout_s: float = 600.0) -> tuple[int, int]:
    """Join the process group of the launcher's environment (RANK, WORLD_SIZE, MASTER_*), or make one of a single process.

    Made once per process: later calls return the same ``(rank, world_size)``. CPU tensors go over gloo, CUDA over NCCL.
    """
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = datetime.timedelta(seconds=timeout_s)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    atexit.register(_leave)
    return dist.get_rank(), dist.get_world_size()


def _leave() -> None:
    # after an uncaught exception the other ranks may be elsewhere, and this one would wait for them
    if dist.is_initialized() and not hasattr(sys, "last_value"):
        dist.destroy_process_group()


def broadcast_object(value: Any, source: int = 0) -> Any:
    """``value`` of the ``source`` rank, on every rank (over the CPU group)."""
    box = [value]
    dist.broadcast_object_list(box, src=source, device=torch.device("cpu"))
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every rank, in rank order, on every rank (over the CPU group)."""
    if dist.get_world_size() == 1:
        return [value]
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def axis_sizes(parallel: Mapping[str, int], world_size: int) -> dict[str, int]:
    """The size of every axis; one of them may be -1 and takes what is left.

    Raises:
        UserError: the product is not the number of processes, or more than one axis is -1.
    """
    sizes = {axis: int(parallel.get(axis, -1 if axis == "dp_shard" else 1)) for axis in AXES}
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"parallel.{axis} is {size}; it is a positive number, or -1 for what is left.")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise UserError(f"parallel: {' and '.join(open_axes)} are both -1; only one axis can take what is left.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    written = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size not in (1, -1)) or "1"
    if open_axes:
        if world_size % fixed:
            raise UserError(
                f"parallel: {written} = {fixed} does not divide the {world_size} processes that were started. "
                f"Start a multiple of {fixed} (torchrun --nproc-per-node), or lower one of these axes."
            )
        sizes[open_axes[0]] = world_size // fixed
    elif fixed != world_size:
        raise UserError(
            f"parallel: {written} = {fixed} processes, but {world_size} were started. Start {fixed}, or set one axis "
            "(usually parallel.dp_shard) to -1 to take what is left."
        )
    return sizes


@dataclass(frozen=True)
class Mesh:
    """The devices of a run, and this process's place among them. Build it with ``build_mesh``."""

    device_mesh: DeviceMesh
    device: torch.device
    rank: int
    world_size: int
    sizes: Mapping[str, int]
    #: what ``fully_shard`` gets: (dp_replicate, dp_shard x cp), or one axis
    fsdp: DeviceMesh

    def __getitem__(self, axis: str) -> DeviceMesh:
        return self.device_mesh[axis]

    def size(self, axis: str) -> int:
        return self.sizes[axis]

    def coordinate(self, axis: str) -> int:
        return self.device_mesh.get_local_rank(axis)

    @property
    def dp_size(self) -> int:
        """How many ranks hold different rows."""
        return self.sizes["dp_replicate"] * self.sizes["dp_shard"]

    @property
    def dp_rank(self) -> int:
        """Which of the ``dp_size`` parts of a batch this process holds."""
        return self.coordinate("dp_replicate") * self.sizes["dp_shard"] + self.coordinate("dp_shard")

    @property
    def row_ranks(self) -> tuple[int, ...]:
        """The ranks that hold the different rows, in the order of ``dp_rank``, at this rank's place on the other axes."""
        place = tuple(slice(None) if axis in ("dp_replicate", "dp_shard") else self.coordinate(axis) for axis in AXES)
        return tuple(self.device_mesh.mesh[place].flatten().tolist())

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def speaks_for_rows(self) -> bool:
        """True on one rank of those that hold the same rows (so that a sum over all ranks counts every row once)."""
        return all(self.coordinate(axis) == 0 for axis in ("pp", "cp", "tp"))

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all rows of the batch: over every rank, each row counted once. Tensor on CPU or on the device."""
        if self.world_size > 1:
            values = values if self.speaks_for_rows else torch.zeros_like(values)
            dist.all_reduce(values)
        return values

    def gather_rows(self, rows: Tensor) -> Tensor:
        """``rows`` [B, ...] of all data-parallel ranks in the order of ``dp_rank``, with gradients; all have the same B."""
        return gather_rows(rows, [self[axis].get_group() for axis in ("dp_shard", "dp_replicate") if self.size(axis) > 1])

    def pass_rows_on(self, rows: Tensor) -> Tensor:
        """The ``rows`` of the data-parallel rank before this one (the last's come to the first), with gradients."""
        return pass_rows_on(rows, self.row_ranks, self.dp_rank)

    def agree(self, value: Tensor) -> Tensor:
        """The mean of a device scalar over the ranks that hold copies of the same parameters.

        They computed the same number, unless the arithmetic of one of them was off (a flipped bit, atomics in another
        order); then they must still decide alike. A NaN on one is a NaN on all. No host sync.
        """
        for axis in ("dp_replicate", "tp"):
            if self.size(axis) > 1:
                value = value / self.size(axis)  # exact for powers of two: equal numbers stay as they are
                dist.all_reduce(value, group=self[axis].get_group())
        return value

    def sum_all(self, values: Tensor) -> None:
        """Sum over every rank, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)

    def __str__(self) -> str:
        axes = " x ".join(f"{axis} {size}" for axis, size in self.sizes.items() if size > 1)
        return (
            f"{self.world_size} process{'es' if self.world_size > 1 else ''} on {self.device.type} ({axes or 'no parallelism'})"
        )


def build_mesh(parallel: Mapping[str, int], device: torch.device | None = None) -> Mesh:
    """The mesh of this process group for a ``parallel`` section (missing axes are 1; dp_shard takes what is left)."""
    rank, world_size = init_process_group()
    sizes = axis_sizes(parallel, world_size)
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    device_mesh, fsdp = _device_mesh(dist.group.WORLD, device.type, tuple(sizes[axis] for axis in AXES))
    return Mesh(device_mesh, device, rank, world_size, sizes, fsdp)


@functools.cache
def _device_mesh(world: Any, device_type: str, sizes: tuple[int, ...]) -> tuple[DeviceMesh, DeviceMesh]:
    """The mesh of these axes and what ``fully_shard`` gets. Made once per process group: the groups of its axes hold sockets
    and threads for as long as the process lives, and a sweep runs many jobs in one process."""
    device_mesh = init_device_mesh(device_type, sizes, mesh_dim_names=AXES)
    size = dict(zip(AXES, sizes, strict=True))
    shard_axis = "dp_shard"
    if size["cp"] > 1:
        device_mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
        shard_axis = "dp_shard_cp"
    return device_mesh, device_mesh["dp_replicate", shard_axis] if size["dp_replicate"] > 1 else device_mesh[shard_axis]
