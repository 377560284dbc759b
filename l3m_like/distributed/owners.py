"""Whole matrices, each on one rank: shards travel to the owner of their matrix, and what it makes of it travels back.

An optimizer that needs a whole matrix (Muon) shares the matrices out over all ranks of the mesh, replicas and tp ranks included.
A shard comes to the owner from the nearest rank that holds it, and the result goes to every rank that holds it. So a rank
receives the matrices that it owns, and of the others its own shards.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from l3m_like.distributed.mesh import AXES, Mesh

Region = tuple[slice, ...]


def shard_bounds(tensor: Tensor, coordinate: Sequence[int]) -> list[tuple[int, int]]:
    """Per dimension, the first index and the one after the last of the part of ``tensor`` that the rank at ``coordinate`` of its
    device mesh holds; all of it for a tensor that is not distributed."""
    bounds = [(0, size) for size in tensor.shape]
    if isinstance(tensor, DTensor):
        placed = [(axis, p) for axis, p in enumerate(tensor.placements) if not p.is_replicate()]
        # a strided shard (FSDP over TP) cuts what the axes after it have already cut
        placed.sort(key=lambda item: isinstance(item[1], _StridedShard))
        for axis, placement in placed:
            assert isinstance(placement, (Shard, _StridedShard))
            low, high = bounds[placement.dim]
            step = -(-(high - low) // tensor.device_mesh.size(axis))  # as torch.chunk
            start = min(low + step * coordinate[axis], high)
            bounds[placement.dim] = start, min(start + step, high)
    return bounds


@dataclass(frozen=True)
class Matrix:
    """A parameter [rows, cols], or a stack [E, rows, cols] of such, on its way to ``owner``."""

    name: str
    parameter: nn.Parameter
    #: whoever computes on it treats it as so many matrices, one below the other
    split: int
    owner: int = 0

    @property
    def kind(self) -> tuple[int, int, int]:
        """(split, rows, cols), the rows of a stack one below the other: matrices of one kind are computed together."""
        *rows, cols = self.parameter.shape
        return self.split, math.prod(rows), cols


def share_out(matrices: Sequence[Matrix], ranks: int, cost: Callable[[Matrix], int]) -> list[Matrix]:
    """The same matrices with owners: the dearest first, each to the rank that has least to do so far; by owner and kind."""
    load = [0] * ranks
    owned: list[list[Matrix]] = [[] for _ in range(ranks)]
    for matrix in sorted(matrices, key=lambda m: (-cost(m), m.kind)):
        owner = load.index(min(load))
        load[owner] += cost(matrix)
        owned[owner].append(Matrix(matrix.name, matrix.parameter, matrix.split, owner))
    return [matrix for some in owned for matrix in sorted(some, key=lambda m: m.kind)]


def buckets(matrices: Sequence[Matrix], mesh: Mesh, elements: int) -> list[Bucket]:
    """``matrices`` (by owner) in groups that travel together: of each owner at most ``elements`` elements, or one matrix."""
    groups: dict[int, list[Matrix]] = {}
    number = held = 0
    for before, matrix in itertools.pairwise([None, *matrices]):
        assert matrix is not None
        size = matrix.parameter.numel()
        if before is None or before.owner != matrix.owner:
            number = held = 0
        elif held + size > elements:
            number, held = number + 1, 0
        held += size
        groups.setdefault(number, []).append(matrix)
    places = rank_places(mesh)
    return [Bucket(groups[number], mesh, places) for number in sorted(groups)]


def rank_places(mesh: Mesh) -> list[dict[str, int]]:
    """The place of every rank on every axis of the mesh."""
    ranks = mesh.device_mesh.mesh
    return [dict(zip(AXES, (ranks == rank).nonzero()[0].tolist(), strict=True)) for rank in range(mesh.world_size)]


class Bucket:
    """Matrices that travel together, in the order of their owners.

    A *flat* tensor holds this rank's shards of them, one after the other; ``views`` cuts it up.
    """

    def __init__(self, matrices: Sequence[Matrix], mesh: Mesh, places: Sequence[Mapping[str, int]]) -> None:
        self.matrices = list(matrices)
        self.owned = [matrix for matrix in matrices if matrix.owner == mesh.rank]
        ranks = range(mesh.world_size)
        bounds = {matrix.name: [_region(matrix.parameter, place) for place in places] for matrix in matrices}
        near = {matrix.name: _senders(matrix, places) for matrix in matrices}
        self._shapes = [_shape(bounds[matrix.name][mesh.rank]) for matrix in matrices]
        self._sizes = [math.prod(shape) for shape in self._shapes]
        #: per matrix: does this rank send its shard?
        self._sends = [mesh.rank in near[matrix.name] for matrix in matrices]
        #: what comes to the owned matrices and goes back: (which of them, where), by the other rank
        self._from = [[(k, bounds[m.name][r]) for k, m in enumerate(self.owned) if r in near[m.name]] for r in ranks]
        self._to = [[(k, bounds[m.name][r]) for k, m in enumerate(self.owned)] for r in ranks]
        sent = [(m.owner, size) for m, size, sends in zip(matrices, self._sizes, self._sends, strict=True) if sends]
        held = [(m.owner, size) for m, size in zip(matrices, self._sizes, strict=True)]
        self._sent_to = [sum(size for owner, size in sent if owner == r) for r in ranks]
        self._returned_from = [sum(size for owner, size in held if owner == r) for r in ranks]
        self._received_from = [sum(math.prod(_shape(where)) for _, where in some) for some in self._from]
        self._sent_back_to = [sum(math.prod(_shape(where)) for _, where in some) for some in self._to]

    @property
    def numel(self) -> int:
        """Elements of this rank's shards."""
        return sum(self._sizes)

    def views(self, flat: Tensor) -> list[Tensor]:
        """This rank's shard of each matrix in ``flat`` [numel]; views."""
        return [part.view(shape) for part, shape in zip(flat.split(self._sizes), self._shapes, strict=True)]

    def gather(self, flat: Tensor) -> Pending:
        """Send this rank's shards to their owners; ``assemble`` takes what comes."""
        if not all(self._sends):
            parts = flat.split(self._sizes)
            flat = torch.cat([part for part, sends in zip(parts, self._sends, strict=True) if sends] or [flat[:0]])
        return Pending(flat, self._received_from, self._sent_to)

    def assemble(self, arrived: Pending) -> list[Tensor]:
        """The owned matrices, one [N, rows, cols] per kind, in the order of ``owned``."""
        received = arrived.wait()
        stacks = [
            received.new_empty(len(list(some)), *kind[1:]) for kind, some in itertools.groupby(self.owned, lambda m: m.kind)
        ]
        whole = self._in_shape(stacks)
        pieces = [piece for some in self._from for piece in some]
        parts = received.split([math.prod(_shape(where)) for _, where in pieces])
        filled = [(whole[k][where], part) for (k, where), part in zip(pieces, parts, strict=True) if part.numel()]
        if filled:
            torch._foreach_copy_([to for to, _ in filled], [part.view(to.shape) for to, part in filled])
        return stacks

    def _in_shape(self, stacks: Sequence[Tensor]) -> list[Tensor]:
        """The owned matrices, one by one, in the shapes of their parameters; views."""
        matrices = [matrix for stack in stacks for matrix in stack]
        return [matrix.view(owned.parameter.shape) for matrix, owned in zip(matrices, self.owned, strict=True)]

    def scatter(self, stacks: Sequence[Tensor], like: Tensor) -> Pending:
        """Send the owned matrices (as ``assemble`` returns them) to all ranks that hold a shard; a flat tensor arrives.

        ``like``: of their dtype and device, for a rank that owns none.
        """
        whole = self._in_shape(stacks)
        parts = [whole[k][where].reshape(-1) for some in self._to for k, where in some]
        return Pending(torch.cat(parts) if parts else like.new_empty(0), self._returned_from, self._sent_back_to)


class Pending:
    """An exchange between all ranks that is under way; nothing moves where there is one rank."""

    def __init__(self, sent: Tensor, receive: Sequence[int], send: Sequence[int]) -> None:
        self._sent: Tensor | None = sent  # lives until it has arrived
        self._work: dist.Work | None = None
        if len(send) == 1:
            self._received = sent
            return
        self._received = sent.new_empty(sum(receive))
        self._work = dist.all_to_all_single(self._received, sent, list(receive), list(send), async_op=True)

    def wait(self) -> Tensor:
        """What arrived. On an accelerator its stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
        self._sent = self._work = None
        return self._received


def _region(parameter: Tensor, place: Mapping[str, int]) -> Region:
    names = parameter.device_mesh.mesh_dim_names if isinstance(parameter, DTensor) else ()
    return tuple(slice(low, high) for low, high in shard_bounds(parameter, [place[name] for name in names or ()]))


def _shape(region: Region) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in region)


def _senders(matrix: Matrix, places: Sequence[Mapping[str, int]]) -> set[int]:
    """The ranks whose shards make up the matrix once: those at the owner's place on every axis that does not cut it."""
    parameter = matrix.parameter
    cut: set[str] = set()
    if isinstance(parameter, DTensor):
        names = parameter.device_mesh.mesh_dim_names or ()
        cut = {name for name, placement in zip(names, parameter.placements, strict=True) if not placement.is_replicate()}
    home = places[matrix.owner]
    return {rank for rank, place in enumerate(places) if all(place[axis] == home[axis] for axis in place if axis not in cut)}
