"""Muon: momentum whose direction is orthogonalised (Keller Jordan, https://kellerjordan.github.io/posts/muon/; at scale: Liu et
al., "Muon is Scalable for LLM Training", arXiv:2502.16982)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from l3m_like.config.schema import Muon as MuonConfig
from l3m_like.distributed.gradients import local
from l3m_like.distributed.low_precision import copy_of
from l3m_like.distributed.mesh import Mesh
from l3m_like.distributed.owners import Bucket, Matrix, Pending, buckets, rank_places, share_out
from l3m_like.kernels.muon import apply_pass, apply_pass_reference, momentum_pass, momentum_pass_reference, takes
from l3m_like.kernels.newton_schulz import method_for, newton_schulz, newton_schulz_flops, newton_schulz_scaled

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
        #: per bucket: ``{(group, factor of the update): places in the bucket}``
        self._alike: list[dict[tuple[int, float], list[int]]] = []
        #: per bucket, flat: the momentum of this rank's shards
        self._momentum: list[Tensor] = []
        self._named: dict[str, Tensor] = {}
        for bucket in self.buckets:
            wide = torch.promote_types(bucket.matrices[0].parameter.dtype, torch.float32)
            flat = torch.zeros(bucket.numel, dtype=wide, device=mesh.device)
            self._momentum.append(flat)
            alike: dict[tuple[int, float], list[int]] = {}
            for place, (matrix, view) in enumerate(zip(bucket.matrices, bucket.views(flat), strict=True)):
                split, rows, cols = matrix.kind
                factor = scale_of(rows // split, cols, settings.scale)
                alike.setdefault((group_of[matrix.name], factor), []).append(place)
                self._named[f"{matrix.name}.momentum"] = _like(matrix.parameter, view)
            self._alike.append(alike)

    @torch.no_grad()
    def step(self, found_inf: Tensor, grad_scale: Tensor | None = None) -> None:
        """One step; ``found_inf`` and ``grad_scale`` as for ``AdamW.step``. No host sync."""
        if self._alone:
            for bucket, momentum, alike in zip(self.buckets, self._momentum, self._alike, strict=True):
                self._step_alone(bucket, momentum, alike, found_inf, grad_scale)
        else:
            self._step_together(found_inf, grad_scale)

    def _step_alone(
        self,
        bucket: Bucket,
        momentum: Tensor,
        alike: dict[tuple[int, float], list[int]],
        found_inf: Tensor,
        grad_scale: Tensor | None,
    ) -> None:
        """The matrices of a bucket, which are of one kind and group, without an exchange."""
        fused = takes(momentum)
        ((number, factor),) = alike
        group = self.param_groups[number]
        split, rows, cols = bucket.matrices[0].kind
        parameters = [matrix.parameter for matrix in bucket.matrices]
        update, norm = (momentum_pass if fused else momentum_pass_reference)(
            [None if p.grad is None else local(p.grad).flatten(0, -2) for p in parameters],
            momentum.view(-1, rows, cols),
            mu=self.settings.momentum,
            nesterov=self.settings.nesterov,
            dtype=self.dtype,
            split=split,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
        made, size = newton_schulz_scaled(update, steps=self.settings.steps, norm=norm)
        (apply_pass if fused else apply_pass_reference)(
            [local(p).flatten(0, -2) for p in parameters],
            made.contiguous().view(-1, rows, cols),
            rate=group["lr"] * factor / size,
            decay=group["lr"] * group["weight_decay"],
            found_inf=found_inf,
            copies=[None if copy is None else copy.flatten(0, -2) for copy in map(copy_of, parameters)],
        )

    def _step_together(self, found_inf: Tensor, grad_scale: Tensor | None) -> None:
        """While a bucket is orthogonalised, the next one's shards and the last one's results are on their way."""
        bad = found_inf.bool()
        arriving = self._send(0, bad, grad_scale)
        leaving: Pending | None = None
        for number, bucket in enumerate(self.buckets):
            following = self._send(number + 1, bad, grad_scale) if number + 1 < len(self.buckets) else None
            results = [self._orthogonal(stack, split) for stack, split in _with_splits(bucket, bucket.assemble(arriving))]
            returning = bucket.scatter(results, self._momentum[number].new_empty(0, dtype=self.dtype))
            if leaving is not None:
                self._apply(number - 1, leaving, bad)
            leaving = returning
            if following is not None:
                arriving = following
        if leaving is not None:
            self._apply(len(self.buckets) - 1, leaving, bad)

    def _send(self, number: int, bad: Tensor, grad_scale: Tensor | None) -> Pending:
        """Move a bucket's momentum on, and send what is to be orthogonalised to the owners."""
        bucket, momentum, mu = self.buckets[number], self._momentum[number], self.settings.momentum
        flat = torch.empty_like(momentum)
        views, grads = [], []
        for matrix, view in zip(bucket.matrices, bucket.views(flat), strict=True):
            if matrix.parameter.grad is None:
                view.zero_()
            elif view.numel():
                views.append(view)
                grads.append(local(matrix.parameter.grad))
        if views:
            torch._foreach_copy_(views, grads)
        if grad_scale is not None:
            flat.div_(grad_scale)
        # a bad step adds zeros to a momentum that is multiplied by 1; its update is thrown away in ``_apply``
        flat = torch.where(bad, 0.0, flat)
        momentum.mul_(torch.full((), mu, dtype=flat.dtype, device=flat.device).masked_fill(bad, 1.0)).add_(flat)
        update = flat.add_(momentum, alpha=mu) if self.settings.nesterov else momentum
        return bucket.gather(update.to(self.dtype))

    def _orthogonal(self, stack: Tensor, split: int) -> Tensor:
        """stack [N, rows, cols] -> the same, each of ``split`` parts of the rows orthogonalised apart."""
        parts = stack.unflatten(1, (split, -1)).flatten(0, 1)
        return newton_schulz(parts, steps=self.settings.steps).view(stack.shape)

    def _apply(self, number: int, arriving: Pending, bad: Tensor) -> None:
        """Decay a bucket's weights and add the updates that come back."""
        bucket, returned = self.buckets[number], arriving.wait()
        flat = torch.empty_like(self._momentum[number])
        keep = (~bad).to(flat.dtype)
        torch.mul(returned, keep, out=flat)
        updates = bucket.views(flat)
        for (group_number, factor), places in self._alike[number].items():
            group = self.param_groups[group_number]
            some = [place for place in places if updates[place].numel()]
            if not some:
                continue
            weights = [local(bucket.matrices[place].parameter) for place in some]
            if group["weight_decay"]:
                torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"] * keep)
            torch._foreach_add_(weights, [updates[place] for place in some], alpha=-group["lr"] * factor)

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
