"""Evaluation during training, on the live (sharded) model: the run's terms over one pass of held-out data, or objects that
look at the model themselves (``l3m_like.evaluations``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l3m_like.core.errors import UserError
from l3m_like.core.keys import Limit
from l3m_like.core.meta_model import Frozen, Graph, MetaModel
from l3m_like.core.wiring import Program, check_wiring, parts_of
from l3m_like.data.loader import EvalLoader
from l3m_like.distributed.mesh import Mesh
from l3m_like.distributed.parallelize import reshard
from l3m_like.evaluations.evaluation import Evaluation, Findings
from l3m_like.losses.loss import Loss
from l3m_like.training.optim import EMA


class Evaluations:
    """The ``evals`` section of a run: each is built and wired at the start, and run when it is due; ``limits`` are those of
    ``Trace``."""

    def __init__(
        self, cfg: Any, model: nn.Module, losses: Mapping[str, Loss], mesh: Mesh, rows: int, limits: Mapping[str, Limit]
    ) -> None:
        self.mesh, self.model, self.rows, self.seed, self.run_dir = mesh, model, rows, cfg.seed, cfg.run_dir
        self.parts = parts_of(model)
        self.every = {name: evaluation.every for name, evaluation in cfg.evals.items()}
        self.samples = {name: evaluation.samples for name, evaluation in cfg.evals.items()}
        self.datasets: dict[str, Any] = {}
        #: of the evaluations on data alone: their terms and graphs
        self.plans: dict[str, tuple[Mapping[str, Loss], Mapping[str, Graph]]] = {}
        #: the others
        self.objects: dict[str, Evaluation] = {}
        for name, evaluation in cfg.evals.items():
            if evaluation.data is not None:
                self.datasets[name] = cfg.instantiate(f"evals.{name}.data")
                self.datasets[name].limits = limits
            if evaluation.run is not None:
                supplied = {"data": self.datasets[name]} if evaluation.data is not None else {}
                if "sampler" in evaluation.run and evaluation.run["sampler"] is None and cfg.sample is not None:
                    supplied["sampler"] = cfg.instantiate("sample")
                self.objects[name] = cfg.instantiate(f"evals.{name}.run", **supplied)
                continue
            own = cfg.instantiate(f"evals.{name}.loss") if evaluation.loss is not None else losses
            wiring = check_wiring([Program(f"evals.{name}", self.parts, own)], self.datasets[name].keys(), cfg.keep)
            self.plans[name] = own, wiring.graphs[f"evals.{name}"]

    def due(self, step: int) -> list[str]:
        return [name for name, every in self.every.items() if every is not None and step % every == 0]

    def check(self, name: str) -> None:
        """Raise a UserError if the object ``name`` does not fit the model, or lacks a file."""
        check = getattr(self.objects[name], "check", None)
        if check is not None:
            try:
                check(self.model)
            except UserError as error:
                error.args = (f"evals.{name}.run: {error}",)
                raise

    def run(self, step: int, ema: EMA | None, *, last: bool) -> Iterator[tuple[str, Findings]]:
        """``(name, findings)`` of the evaluations due at ``step`` (``last``: of all), with averaged weights if there are any."""
        names = list(self.every) if last else self.due(step)
        if names and ema is not None:
            ema.swap()
        try:
            for name in names:
                yield name, self._found(name, step)
        finally:
            if names and ema is not None:
                ema.swap()

    def _found(self, name: str, step: int) -> Findings:
        found = self._look(name, step)
        frozen = [(path, part) for path, part in self.model.named_modules() if isinstance(part, Frozen)]
        random = ", ".join(path for path, part in frozen if part.random_weights and part.loaded_from is None)
        return replace(found, notes={**found.notes, "random weights": random}) if random else found

    def _look(self, name: str, step: int) -> Findings:
        if name in self.objects:
            with evaluating(self.parts):
                folder = Path(self.run_dir) / "evaluations" / name
                return self.objects[name].evaluate(self.model, mesh=self.mesh, step=step, seed=self.seed, folder=folder)
        losses, graphs = self.plans[name]
        dataset, mesh = self.datasets[name], self.mesh
        ranks = {"dp_rank": mesh.dp_rank, "dp_size": mesh.dp_size}
        batches = EvalLoader(dataset, batch=self.rows, seed=self.seed, limit=self.samples[name], **ranks)
        return Findings(evaluate(self.parts, graphs, losses, batches, mesh))


@contextmanager
def evaluating(parts: Mapping[str, MetaModel]) -> Iterator[None]:
    """Evaluation mode and no gradients for a while; the parts are left as they were found."""
    modes = [(part, part.training) for part in parts.values()]
    for part, _ in modes:
        part.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.train(mode)
            reshard(part)  # no backward follows, which would do it


def evaluate(
    parts: Mapping[str, MetaModel], graphs: Mapping[str, Graph], losses: Mapping[str, Loss], batches: Any, mesh: Mesh
) -> dict[str, float]:
    """The mean of each term over all elements of ``batches`` (an EvalLoader), equal on all ranks. A metric, a term without a
    weight, has its own name and shows what it makes of its mean.

    Every rank runs the same number of forward passes; a rank that has run out of rows repeats a batch that does not count.
    """
    sums = {name: torch.zeros(2, dtype=torch.float64, device=mesh.device) for name in losses}
    with evaluating(parts):
        for batch, valid in batches:
            counts = {name: float(loss.count_of(batch)) for name, loss in losses.items() if not loss.count_late}
            data = to_device(batch, mesh.device)
            for name, part in parts.items():
                data = part(data, graphs[name])
            for name, loss in losses.items():
                value, count = loss.term(data, counts.get(name))
                if valid:
                    sums[name] += torch.stack((value.double(), torch.as_tensor(count, device=value.device).double()))
    totals = mesh.sum(torch.stack(list(sums.values()))).cpu()
    means = {name: (total / max(float(count), 1.0)) for name, (total, count) in zip(sums, totals.tolist(), strict=True)}
    weights = {name: loss.weight for name, loss in losses.items() if loss.weight is not None}
    values = {"loss": sum(weight * means[name] for name, weight in weights.items())} if weights else {}
    if len(weights) > 1:
        values |= {f"loss/{name}": means[name] for name in weights}
    return values | {name: loss.shown(means[name]) for name, loss in losses.items() if loss.weight is None}


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch's tensors on ``device``, copied asynchronously from pinned memory."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value for key, value in batch.items()
    }
