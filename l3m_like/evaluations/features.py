"""Features of a whole set of images: what probes, neighbours and zero-shot classification start from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.core.block import Data
from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.meta_model import Graph, Step
from l3m_like.core.wiring import parts_of
from l3m_like.data.loader import EvalLoader
from l3m_like.distributed.mesh import Mesh, gather_objects


@dataclass(frozen=True)
class LabelledSet:
    """Features [n, ...] of every sample, at least float32, in the order of the data, and their classes [n] int64; the same on
    every rank."""

    features: Tensor
    labels: Tensor

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1


class Extractor:
    """The blocks of a model's inference graph that one key needs.

    Args:
        model: a MetaModel or Series, sharded or not.
        key: that is wanted.
        available: keys that the data has.

    Raises:
        UserError: nothing writes ``key``, or its blocks read what the data has not.
    """

    def __init__(self, model: nn.Module, key: str, available: Iterable[str]) -> None:
        self.key, self.parts = key, parts_of(model)
        available = set(available)
        steps = [(name, step) for name, part in self.parts.items() for step in part.inference().steps]
        written = {k for _, step in steps for k in step.block.writes_in(True).values()}
        if key not in written:
            raise UserError(f"no block writes '{key}' at inference. {did_you_mean(key, written)}")
        needed, kept = {key}, []
        for name, step in reversed(steps):
            if needed & set(step.block.writes_in(True).values()):
                kept.append((name, step))
                needed |= {step.block.reads[port] for port in step.block.required}
                needed |= {k for k in step.block.reads.values() if k in written}
        for _, step in kept:
            for port in step.block.required:
                read = step.block.reads[port]
                if read not in written | available and not step.block.ports[port]:
                    raise UserError(f"{step.path} reads '{read}', which the data of this evaluation has not.")
        self.graphs = {name: self._graph(step for at, step in reversed(kept) if at == name) for name in self.parts}

    @staticmethod
    def _graph(steps: Iterable[Step]) -> Graph:
        return Graph(tuple(Step(step.path, step.block) for step in steps), inference=True)

    def __call__(self, data: Data) -> Tensor:
        for name, graph in self.graphs.items():
            if graph.steps:
                data = self.parts[name](data, graph)  # the root's forward: the one way into a sharded model
        return data[self.key]


def pooled(features: Tensor, pool: str) -> Tensor:
    """``features`` [B, S, D] -> [B, D] by a kind of ``layers.Pool``; vectors [B, D] and the pool "none" stay as they are."""
    from l3m_like.layers.pooling import Pool

    return features if pool == "none" or features.ndim == 2 else Pool(pool)(features)


def labelled(model: nn.Module, data: Any, mesh: Mesh, *, key: str, label: str, pool: str, batch: int, seed: int) -> LabelledSet:
    """The features of all of ``data``, each rank computing a part of the batches.

    Batches are of ``batch`` rows whatever the run has, so that the features do not depend on the number of processes.

    Raises:
        UserError: the data has no classes, or see ``Extractor``.
    """
    keys = data.keys()
    if label not in keys:
        raise UserError(f"the data has no key '{label}', the class of an image. {did_you_mean(label, keys)}")
    extract = Extractor(model, key, keys)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for rows, valid in EvalLoader(data, batch=batch, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size, seed=seed):
        on_device = {name: value.to(mesh.device) if isinstance(value, Tensor) else value for name, value in rows.items()}
        features = pooled(extract(on_device), pool)
        if valid and mesh.speaks_for_rows:
            found.append((rows["row"], features.to(torch.promote_types(features.dtype, torch.float32)).cpu(), rows[label]))
    every = [part for rank in gather_objects(found) for part in rank]
    row, values, labels = (torch.cat([part[i] for part in every]) for i in range(3))
    order = row.argsort()
    return LabelledSet(values[order].to(mesh.device), labels[order].to(mesh.device))


def accuracy(scores: Tensor, labels: Tensor, names: Mapping[str, int]) -> dict[str, float]:
    """``{name: share of rows whose class is among the k highest of scores [n, C]}``, of ``names`` ``{name: k}`` with k <= C."""
    ranked = scores.topk(min(max(names.values()), scores.shape[1]), dim=1).indices == labels[:, None]
    return {name: float(ranked[:, :k].any(1).double().mean()) for name, k in names.items() if k <= scores.shape[1]}
