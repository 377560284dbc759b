"""Muon: momentum whose direction is orthogonalised (Keller Jordan, https://kellerjordan.github.io/posts/muon/; at scale: Liu et
al., "Muon is Scalable for LLM Training", arXiv:2502.16982)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from l3m_like.config.schema import Muon as MuonConfig
from l3m_like.distributed.gradients import local
from l3m_like.distributed.low_precision import copy_of
from l3m_like.distributed.mesh import Mesh
from l3m_like.distributed.owners import Bucket, Matrix, Pending, buckets, rank_places, share_out
from l3m_like.kernels.muon import apply_pass, apply_pass_reference, momentum_pass, momentum_pass_reference
from l3m_like.kernels.newton_schulz import method_for, newton_schulz, newton_schulz_flops, newton_schulz_scaled
from l3m_like.kernels.table import takes

#: elements that an owner has in work at a time, at most: enough blocks to fill an accelerator
_IN_WORK = 1 << 26
#: bytes that a process of its own has in work, at most: then 19 matrices of 6144 x 2048 share a launch in half precision, whose
#: 2584 blocks fill an accelerator 20 times, so that the last time, which is not full, counts for little
_IN_WORK_ALONE = 1 << 31
#: parts of an owner's work, at least: while it computes on one, the next one arrives and the last one returns
_PARTS = 4


def scale_of(rows: int, cols: int, scale: str) -> float:
    """The factor on an orthogonalised update: Keller Jordan's ``spectral``, or Moonlight's ``rms``, with which the entries are as
    large as those of AdamW's updates."""
    return math.sqrt(max(1.0, rows / cols)) if scale == "spectral" else 0.2 * math.sqrt(max(rows, cols))


class Muon:
    """``M = mu M + G; U = G + mu M; W = (1 - lr wd) W - lr scale NewtonSchulz(U)``, on whole matrices whatever the mesh.

    Each matrix is orthogonalised on one rank (``distributed/owners.py``). The momentum M is sharded like the parameter, in at
    least float32. A matrix without a gradient counts as one whose gradient is zero.

    Args:
        groups: as ``parameter_groups`` makes them; of matrices, and stacks of matrices.
        splits: ``{parameter name: parts}`` that are orthogonalised apart.
        settings: the section `optim.muon`.
        dtype: in which updates travel and are orthogonalised.
    """

    def __init__(
        self, groups: list[dict[str, Any]], splits: Mapping[str, int], settings: MuonConfig, mesh: Mesh, dtype: torch.dtype
    ) -> None:
        self.param_groups = groups
        self.settings = settings
        self.dtype = dtype
        matrices = [
            Matrix(name, parameter, splits.get(name, 1))
            for group in groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
        ]
        matrices = share_out(matrices, mesh.world_size, self._flops)
        self.owners = {matrix.name: matrix.owner for matrix in matrices}
        group_of = {name: number for number, group in enumerate(groups) for name in group["names"]}
        self._alone = mesh.world_size == 1
        if self._alone:
            batches = _batches(matrices, group_of, dtype.itemsize)
            self.buckets = [Bucket(batch, mesh, rank_places(mesh)) for batch in batches]
        else:
            even = sum(matrix.parameter.numel() for matrix in matrices) // mesh.world_size
            self.buckets = buckets(matrices, mesh, min(_IN_WORK, even // _PARTS))
        #: per bucket: what is done to its shards, one launch for each
        self._runs: list[list[Run]] = []
        #: per bucket, flat: the momentum of this rank's shards
        self._momentum: list[Tensor] = []
        self._named: dict[str, Tensor] = {}
        for bucket in self.buckets:
            wide = torch.promote_types(bucket.matrices[0].parameter.dtype, torch.float32)
            flat = torch.zeros(bucket.numel, dtype=wide, device=mesh.device)
            self._momentum.append(flat)
            for matrix, view in zip(bucket.matrices, bucket.views(flat), strict=True):
                self._named[f"{matrix.name}.momentum"] = _like(matrix.parameter, view)
            self._runs.append(_runs(bucket, flat, group_of, settings.scale))

    @torch.no_grad()
    def step(self, found_inf: Tensor, grad_scale: Tensor | None = None) -> None:
        """One step; ``found_inf`` and ``grad_scale`` as for ``AdamW.step``. No host sync."""
        if self._alone:
            for bucket, momentum, (run,) in zip(self.buckets, self._momentum, self._runs, strict=True):
                update, norm = self._move(run, momentum, found_inf, grad_scale, split=bucket.matrices[0].split)
                made, size = newton_schulz_scaled(update, steps=self.settings.steps, norm=norm)
                self._put(run, made.contiguous().view(-1, *run.shape), found_inf, size)
        else:
            self._step_together(found_inf, grad_scale)

    def _move(
        self,
        run: Run,
        momentum: Tensor,
        found_inf: Tensor,
        grad_scale: Tensor | None,
        *,
        split: int = 1,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Move the momentum of a run on. Returns what is to be orthogonalised, and its norms."""
        return (momentum_pass if takes(momentum) else momentum_pass_reference)(
            [None if p.grad is None else local(p.grad).flatten(0, -2) for p in run.parameters],
            run.of(momentum),
            mu=self.settings.momentum,
            nesterov=self.settings.nesterov,
            dtype=self.dtype,
            split=split,
            grad_scale=grad_scale,
            found_inf=found_inf,
            out=out,
        )

    def _put(self, run: Run, update: Tensor, found_inf: Tensor, size: float = 1.0) -> None:
        """Decay the weights of a run, and subtract its updates, which are ``size`` times too large."""
        group = self.param_groups[run.group]
        weights = [local(p) for p in run.parameters]
        fused = all(takes(weight) for weight in weights)
        copies = [None if copy is None else local(copy).flatten(0, -2) for copy in map(copy_of, run.parameters)]
        (apply_pass if fused else apply_pass_reference)(
            [weight.flatten(0, -2) for weight in weights],
            update,
            rate=group["lr"] * run.factor / size,
            decay=group["lr"] * group["weight_decay"],
            found_inf=found_inf,
            copies=copies,
        )

    def _step_together(self, found_inf: Tensor, grad_scale: Tensor | None) -> None:
        """While a bucket is orthogonalised, the next one's shards and the last one's results are on their way."""
        arriving = self._send(0, found_inf, grad_scale)
        leaving: Pending | None = None
        for number, bucket in enumerate(self.buckets):
            following = self._send(number + 1, found_inf, grad_scale) if number + 1 < len(self.buckets) else None
            results = [self._orthogonal(stack, split) for stack, split in _with_splits(bucket, bucket.assemble(arriving))]
            returning = bucket.scatter(results, self._momentum[number].new_empty(0, dtype=self.dtype))
            if leaving is not None:
                self._apply(number - 1, leaving, found_inf)
            leaving = returning
            if following is not None:
                arriving = following
        if leaving is not None:
            self._apply(len(self.buckets) - 1, leaving, found_inf)

    def _send(self, number: int, found_inf: Tensor, grad_scale: Tensor | None) -> Pending:
        """Move a bucket's momentum on, and send what is to be orthogonalised to the owners."""
        bucket, momentum = self.buckets[number], self._momentum[number]
        update = torch.empty_like(momentum, dtype=self.dtype)
        for run in self._runs[number]:
            self._move(run, momentum, found_inf, grad_scale, out=run.of(update))
        return bucket.gather(update)

    def _orthogonal(self, stack: Tensor, split: int) -> Tensor:
        """stack [N, rows, cols] -> the same, each of ``split`` parts of the rows orthogonalised apart."""
        parts = stack.unflatten(1, (split, -1)).flatten(0, 1)
        return newton_schulz(parts, steps=self.settings.steps).view(stack.shape)

    def _apply(self, number: int, arriving: Pending, found_inf: Tensor) -> None:
        """Step a bucket's weights by the updates that come back."""
        returned = arriving.wait()
        for run in self._runs[number]:
            self._put(run, run.of(returned), found_inf)

    def _flops(self, matrix: Matrix) -> int:
        split, rows, cols = matrix.kind
        method = method_for(rows // split, cols, self.dtype)
        return split * newton_schulz_flops(rows // split, cols, steps=self.settings.steps, method=method)

    def set_lr_scale(self, scale: float) -> None:
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * scale

    def zero_grad(self, set_to_none: bool = True) -> None:
        for matrix in (matrix for bucket in self.buckets for matrix in bucket.matrices):
            if set_to_none:
                matrix.parameter.grad = None
            elif matrix.parameter.grad is not None:
                matrix.parameter.grad.zero_()

    def named_state(self) -> dict[str, Tensor]:
        """As ``AdamW.named_state``: ``<parameter>.momentum``."""
        return dict(self._named)


@dataclass(frozen=True)
class Run:
    """Neighbours in a bucket that are stepped alike, and whose shards here have one shape."""

    group: int
    #: of the update
    factor: float
    parameters: list[nn.Parameter]
    #: of a shard: (rows, columns), the rows of a stack one below the other
    shape: tuple[int, int]
    #: where the first one lies in the bucket's flat tensors
    start: int

    def of(self, flat: Tensor) -> Tensor:
        """Their shards in ``flat``, [N, rows, columns]; a view."""
        size = len(self.parameters) * math.prod(self.shape)
        return flat[self.start : self.start + size].view(-1, *self.shape)


def _runs(bucket: Bucket, flat: Tensor, group_of: Mapping[str, int], scale: str) -> list[Run]:
    runs: list[Run] = []
    start = 0
    for matrix, view in zip(bucket.matrices, bucket.views(flat), strict=True):
        split, rows, cols = matrix.kind
        group, factor = group_of[matrix.name], scale_of(rows // split, cols, scale)
        shape = math.prod(view.shape[:-1]), view.shape[-1]
        if view.numel():
            if not runs or (runs[-1].group, runs[-1].factor, runs[-1].shape) != (group, factor, shape):
                runs.append(Run(group, factor, [], shape, start))
            runs[-1].parameters.append(matrix.parameter)
        start += view.numel()
    return runs


def _batches(matrices: list[Matrix], group_of: Mapping[str, int], itemsize: int) -> list[list[Matrix]]:
    """Those of one kind, group and dtype, in as few batches as ``_IN_WORK_ALONE`` allows, which are equally large."""
    alike: dict[Any, list[Matrix]] = {}
    for matrix in matrices:
        alike.setdefault((matrix.kind, group_of[matrix.name], matrix.parameter.dtype), []).append(matrix)
    made = []
    for ((split, rows, cols), *_), some in alike.items():
        # three of the matrix's size, and four square ones of its parts' shorter side
        work = itemsize * (3 * rows * cols + 4 * split * min(rows // split, cols) ** 2)
        count = -(-len(some) * work // _IN_WORK_ALONE)
        made += [some[len(some) * i // count : len(some) * (i + 1) // count] for i in range(count)]
    return [batch for batch in made if batch]


def _with_splits(bucket: Bucket, stacks: list[Tensor]) -> list[tuple[Tensor, int]]:
    kinds = list(dict.fromkeys(matrix.kind for matrix in bucket.owned))
    return [(stack, kind[0]) for stack, kind in zip(stacks, kinds, strict=True)]


def _like(parameter: nn.Parameter, shard: Tensor) -> Tensor:
    """``shard`` as a tensor distributed like ``parameter``; it shares the memory."""
    if not isinstance(parameter, DTensor):
        return shard
    return DTensor.from_local(
        shard,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
