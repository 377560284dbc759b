"""Real trainings, recorded: ``recorded(...)`` runs ``train()`` on every rank of a pool and hands back what it did.

What runs is the loop itself. The recorder only looks on (and, for the twin of each test, plants one fault): it perturbs the
weights before the first step, and keeps the gradients that the optimizer would see, before clipping.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tests.distributed import pool

ROOT = Path(__file__).parents[2]

#: two layers of either experiment, with QK-norm, biases, grouped heads (and, for llm, tied embeddings) on
TINY = {
    "llm": [
        *("dim=32", "layers=2", "heads=4", "kv_heads=2", "head_dim=8", "mlp_dim=48", "sequence=48"),
        *("model.trunk.layer.mixer.bias=true", "batch={global: 8, micro: null}", "data.train.pack.max_documents=2"),
    ],
    "sit": [
        *("dim=32", "layers=2", "heads=4", "patch=7", "batch={global: 8, micro: null}"),
        *("model.trunk.layer.mixer.qk_norm=true", "model.trunk.layer.mixer.num_kv_heads=2"),
    ],
    # as shipped: without QK-norm
    "sit_shipped": ["dim=32", "layers=2", "heads=4", "patch=7", "batch={global: 8, micro: null}"],
}
SHORT = [
    *("steps=3", "evals={}", "log.every=1", "log.console=false", "checkpoint.every=null", "optim.clip=1.0", "schedule.warmup=0"),
    *("data.prefetch=0", "parallel.precision=fp64"),
]


@dataclass
class Record:
    """One rank's view of a run; tensors are whole, whatever the mesh."""

    weights: dict[str, Tensor] = field(default_factory=dict)  # as initialised
    gradients: list[dict[str, Tensor]] = field(default_factory=list)  # per step, before clipping
    final: dict[str, Tensor] = field(default_factory=dict)  # weights after the last step
    draws: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # (key, row) -> what a block drew for that row
    rows: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl (rank 0)

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows if "loss" in row]


def whole(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@torch.no_grad()
def perturb(parameters: dict[str, nn.Parameter]) -> None:
    """Add N(0, 0.1) to every weight: no zero-initialised layer hides what is behind it. The same on every mesh."""
    from l3m_like.core.init import Normal
    from l3m_like.distributed.gradients import local
    from l3m_like.training.init import shard_index

    for name, p in parameters.items():
        local(p).add_(Normal(0.1).draw(1, f"perturb/{name}", shard_index(p), tuple(p.shape)).to(p.dtype))


@contextmanager
def recording(into: Record, drawn: Sequence[str] = ()) -> Iterator[None]:
    """Watch the one run that is made inside. ``drawn``: keys whose values are kept per row."""
    from l3m_like.training import updates

    prepare, norm, forward_backward = updates.Update.prepare, updates.gradient_norm, updates.Update.forward_backward
    parameters: dict[str, nn.Parameter] = {}

    def prepare_and_perturb(self: Any, mesh: Any, guard: Any) -> None:
        into.weights |= {name: whole(p) for name, p in self.parameters.items()}
        perturb(self.parameters)
        parameters.update(self.parameters)
        for part in self.parts.values():
            for _, block in part.blocks():
                block.register_forward_hook(watch)
        prepare(self, mesh, guard)

    def watch(block: Any, args: Any, out: dict[str, Tensor]) -> None:
        for key in set(drawn) & set(block.writes.values()):
            for row, value in zip(out["row"].tolist(), out[key], strict=True):
                into.draws[key, row] = value.clone()

    def recorded_norm(gradients: Any) -> Tensor:
        into.gradients.append({name: whole(p.grad) for name, p in parameters.items() if p.grad is not None})
        return norm(gradients)

    with mock.patch.multiple(updates.Update, prepare=prepare_and_perturb, forward_backward=forward_backward):
        with mock.patch.object(updates, "gradient_norm", recorded_norm):
            yield
    into.final = {name: whole(p) for name, p in parameters.items()}


def run_one(cfg: Any, fault: Callable[[], Any] | None, drawn: Sequence[str]) -> Record:
    """On one rank: ``train(cfg)``, recorded. ``fault()``: a context manager that breaks something meanwhile."""
    from l3m_like.training.train import train

    record = Record()
    with ExitStack() as stack:
        stack.enter_context(recording(record, drawn))
        if fault is not None:
            stack.enter_context(fault())
        train(cfg)
    metrics = cfg.run_dir / "metrics.jsonl"
    record.rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return record


def config(name: str, settings: Sequence[str] = ()) -> Any:
    """The shipped experiment, tiny, for three steps in float64, with ``settings`` over it."""
    from l3m_like.config import RunConfig

    file = ROOT / "configs" / "experiment" / f"{name.partition('_')[0]}.yaml"
    return RunConfig.from_file(file, [*TINY[name], *SHORT, *settings])


def recorded(
    world_size: int,
    name: str,
    settings: Sequence[str] = (),
    *,
    fault: Callable[[], Any] | None = None,
    drawn: Sequence[str] = (),
    timeout: float = 55.0,
) -> list[Record]:
    """``train()`` of ``config(name, settings)`` on ``world_size`` processes: one record per rank."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = config(name, settings)
        cfg.run.dir = folder
        return pool.run(world_size, run_one, cfg, fault, tuple(drawn), timeout=timeout)
