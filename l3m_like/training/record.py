"""What a step leaves behind, kept on the device until a line is logged; then one copy to the host for all steps since."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.data.loader import Step
from l3m_like.distributed.mesh import Mesh, gather_objects
from l3m_like.training.flops import Work
from l3m_like.training.updates import Update


@dataclass
class StepRecord:
    """One step: device tensors (per term: sum and count; per update: gradient norm, skipped) and host numbers."""

    step: int
    sums: dict[str, Tensor]
    norms: dict[str, tuple[Tensor, Tensor]]
    batch: Step
    lr: dict[str, float]
    data_wait: float
    units: dict[str | None, int]  # on this rank; None: of all sources
    flops: Work | None  # on this rank


def flush(
    records: Sequence[StepRecord], updates: Sequence[Update], mesh: Mesh, began: float, *, unit: str, refs: bool, ledger: bool
) -> list[dict[str, Any]]:
    """The logged rows of ``records`` (see ``Reporter.steps``): one sum over the ranks and one copy from the device for all.

    ``seconds`` is the wall clock since ``began`` per step, the wait for data included; counts and FLOPs are those of the mesh.
    """
    weights = {name: loss.weight for update in updates for name, loss in update.losses.items()}
    values = mesh.sum(torch.cat([torch.stack([v[0] for v in r.sums.values()]) for r in records])).cpu().tolist()
    counts = torch.cat([torch.stack([v[1] for v in r.sums.values()]) for r in records]).cpu().tolist()
    norms = torch.stack([n.detach().double() for r in records for pair in r.norms.values() for n in pair]).cpu().tolist()
    seconds = (time.perf_counter() - began) / len(records)  # after the copy, so that the device has done the work
    numbers = [[*((r.flops.model, r.flops.hardware) if r.flops else (0.0, 0.0)), *r.units.values()] for r in records]
    host = mesh.sum(torch.tensor(numbers, dtype=torch.float64)).tolist()
    memory = torch.cuda.max_memory_allocated() if mesh.device.type == "cuda" else None
    names = gather_objects([record.batch.refs for record in records]) if refs else []
    left_out = gather_objects([record.batch.left_out for record in records]) if ledger else []
    several = len(updates) > 1
    rows = []
    for index, record in enumerate(records):
        row: dict[str, Any] = {"step": record.step + 1}
        sums = {name: (values.pop(0), counts.pop(0)) for name in record.sums}
        # a metric of which the step holds nothing (a source that did not come) has no value
        means = {name: value / max(count, 1.0) for name, (value, count) in sums.items() if count or weights[name] is not None}
        row["loss"] = sum(weights[name] * mean for name, mean in means.items() if weights[name] is not None)
        if len(sums) > 1:
            row |= {f"loss/{name}": mean for name, mean in means.items()}
        for update in record.norms:
            suffix = f"/{update}" if several else ""
            row[f"grad_norm{suffix}"], skipped = norms.pop(0), norms.pop(0)
            row["skipped"] = row.get("skipped", 0) or int(skipped)
        row |= {f"lr/{update}" if several else "lr": lr for update, lr in record.lr.items()}
        row |= {"seconds": seconds, "data_wait": record.data_wait, "counts": {unit: int(host[index][2])}}
        row |= {f"{unit}/{name}": int(n) for name, n in zip(record.units, host[index][2:], strict=True) if name is not None}
        if record.flops is not None:
            row["flops"], row["hardware_flops"] = host[index][:2]
        if memory is not None:
            row["memory"] = memory
        if refs:
            row["refs"] = [ref for rank, lists in enumerate(names) if rank_speaks(mesh, rank) for ref in lists[index]]
        if ledger:
            row["left_out"] = [e for rank, lists in enumerate(left_out) if rank_speaks(mesh, rank) for e in lists[index]]
        rows.append(row)
    return rows


def rank_speaks(mesh: Mesh, rank: int) -> bool:
    """Whether ``rank`` is the one that speaks for its rows (tp and cp are the innermost axes, pp the outermost)."""
    return rank % (mesh.size("cp") * mesh.size("tp")) == 0 and rank < mesh.world_size // mesh.size("pp")


def watch_bad_steps(rows: Sequence[dict[str, Any]], run: int, limit: int) -> int:
    """Count skipped steps in a row, over log lines (``run``: the count so far).

    Raises:
        UserError: more than ``limit`` of them; equal on all ranks, since the norm that decided is.
    """
    for row in rows:
        run = run + 1 if row["skipped"] else 0
        if run >= limit:
            norm = next(value for key, value in row.items() if key.startswith("grad_norm"))
            what = "not finite" if not math.isfinite(norm) else "spiking"
            raise UserError(
                f"step {row['step']}: the gradient norm was {what} ({norm:g}) in {run} steps in a row, and their updates were "
                "skipped. Lower optim.lr, lengthen schedule.warmup or set optim.clip; guard.max_bad_steps is the limit."
            )
    return run


def watch_bad_samples(rows: Sequence[dict[str, Any]], found: int, limit: int) -> int:
    """Count bad samples over the run (``found``: so far); those that a packer dropped for their length are none.

    Raises:
        UserError: more than ``limit`` of them, on all ranks.
    """
    bad = [entry for row in rows for entry in row.get("left_out", ()) if not entry["dropped"]]
    if found + len(bad) > limit:
        last = bad[-1]
        raise UserError(
            f"{found + len(bad)} samples could not be used, and data.max_bad_samples is {limit}. The last: {last['sample']}: "
            f"{last['error']} All are in ledger.jsonl."
        )
    return found + len(bad)
