"""Metrics that compare a set of pictures with another one: FID, sFID, inception score, precision and recall.

Statistics are sums in float64 over rows, or features kept by row number; both are merged over ranks. So a result depends neither
on batches nor on the number of processes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.distributed.mesh import Mesh, gather_objects
from l3m_like.evaluations.extractors import Features

METRICS = ("fid", "sfid", "inception_score", "precision", "recall")
#: rows of distances that are held at a time
BLOCK = 1024


class Moments:
    """Mean and covariance of rows [B, D], streamed in float64."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # [D + 1, D + 1]: of (row, 1) with itself

    def add(self, rows: Tensor) -> None:
        rows = torch.cat((rows.double(), rows.new_ones(len(rows), 1, dtype=torch.float64)), 1)
        self.sums = rows.mT @ rows + (0 if self.sums is None else self.sums)

    def merge(self, mesh: Mesh) -> None:
        """Sum over all ranks that hold different rows."""
        assert self.sums is not None
        self.sums = mesh.sum(self.sums)

    def result(self) -> tuple[Tensor, Tensor, int]:
        """(mean [D], unbiased covariance [D, D], number of rows)."""
        assert self.sums is not None
        count = round(float(self.sums[-1, -1]))
        if count < 2:
            raise UserError(f"a covariance needs at least 2 pictures; there are {count}.")
        mean = self.sums[-1, :-1] / count
        covariance = (self.sums[:-1, :-1] - count * torch.outer(mean, mean)) / (count - 1)
        return mean, covariance, count


def frechet_distance(one: Moments, other: Moments) -> float:
    """Squared Frechet distance of two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al., arXiv:1706.08500).

    The eigenvalues of C1 C2 are those of the symmetric C1^(1/2) C2 C1^(1/2), whose roots need no complex numbers where fewer
    pictures than features leave the covariances singular.
    """
    (mean_1, cov_1, _), (mean_2, cov_2, _) = one.result(), other.result()
    values, vectors = torch.linalg.eigh(cov_1)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp_min(0).sqrt().sum()
    return float((mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross)


class InceptionScore:
    """exp of the mean divergence between p(class | picture) and p(class) (Salimans et al., arXiv:1606.03498), averaged over
    ``splits`` consecutive parts of ``total`` pictures."""

    def __init__(self, total: int, splits: int) -> None:
        self.total, self.splits = total, min(splits, total)
        self.sums: Tensor | None = None  # [splits, K + 2]: sum of p, of sum p log p, of pictures

    def add(self, logits: Tensor, rows: Tensor) -> None:
        log_p = logits.double().log_softmax(-1)
        p = log_p.exp()
        entries = torch.cat((p, (p * log_p).sum(-1, keepdim=True), torch.ones_like(p[:, :1])), 1)
        sums = entries.new_zeros(self.splits, entries.shape[1]).index_add_(0, rows * self.splits // self.total, entries)
        self.sums = sums + (0 if self.sums is None else self.sums)

    def merge(self, mesh: Mesh) -> None:
        assert self.sums is not None
        self.sums = mesh.sum(self.sums)

    def result(self) -> float:
        assert self.sums is not None
        p = self.sums[:, :-2] / self.sums[:, -1:]
        divergence = self.sums[:, -2] / self.sums[:, -1] - torch.xlogy(p, p).sum(-1)
        return float(divergence.exp().mean())


class Statistics:
    """What the metrics need of a set of pictures.

    Args:
        metrics: which.
        total: number of pictures, where an inception score is wanted of them.
        splits: of the inception score.
    """

    def __init__(self, metrics: Collection[str], total: int | None = None, splits: int = 10) -> None:
        for name in metrics:
            if name not in METRICS:
                raise UserError(f"metrics: there is no '{name}'. {did_you_mean(name, METRICS)}")
        self.pooled = Moments() if "fid" in metrics else None
        self.cells = Moments() if "sfid" in metrics else None
        self.score = InceptionScore(total, splits) if "inception_score" in metrics and total is not None else None
        self.keeps = bool({"precision", "recall"} & set(metrics))
        self.count = 0
        self._kept: dict[int, Tensor] = {}
        self.features = torch.empty(0)  # [N, D], after ``merge``

    def add(self, features: Features, rows: Sequence[int]) -> None:
        """Add the pictures with the running numbers ``rows``."""
        self.count += len(rows)
        if self.pooled is not None:
            self.pooled.add(features.pooled)
        if self.cells is not None:
            self.cells.add(features.cells)
        if self.score is not None:
            self.score.add(features.logits, torch.tensor(rows, device=features.logits.device))
        if self.keeps:
            # no views: a row that is sent would take its whole batch along
            self._kept |= {row: one.clone() for row, one in zip(rows, features.pooled.cpu(), strict=True)}

    def merge(self, mesh: Mesh, like: Features) -> None:
        """Once, at the end, on every rank: of all ranks' pictures. ``like``: features of any picture, for ranks without one."""
        for part, rows in ((self.pooled, like.pooled), (self.cells, like.cells)):
            if part is not None:
                if part.sums is None:
                    part.add(rows[:0])
                part.merge(mesh)
        if self.score is not None:
            if self.score.sums is None:
                self.score.add(like.logits[:0], torch.zeros(0, dtype=torch.int64, device=like.logits.device))
            self.score.merge(mesh)
        self.count = round(float(mesh.sum(torch.tensor(float(self.count), dtype=torch.float64, device=mesh.device))))
        if self.keeps:
            kept: dict[int, Tensor] = {}
            for part in gather_objects(self._kept if mesh.speaks_for_rows else {}):
                kept |= part
            self._kept = {}
            self.features = torch.stack([kept[row] for row in sorted(kept)]).to(mesh.device)


def radii(features: Tensor, neighbours: int, rows: Iterable[Tensor]) -> Tensor:
    """The distance of each of ``rows`` (indices) to its k-th nearest other row of ``features`` [N, D]."""
    # the nearest of all is the row itself
    return torch.cat([distances(features[at], features).kthvalue(neighbours + 1).values for at in rows])


def distances(x: Tensor, y: Tensor) -> Tensor:
    """[N, M] in float64."""
    return torch.cdist(x.double(), y.double(), compute_mode="use_mm_for_euclid_dist")


def covered(points: Tensor, manifold: Tensor, radius: Tensor) -> int:
    """How many of ``points`` [N, D] lie in the ball of at least one row of ``manifold`` [M, D] with its ``radius`` [M]."""
    return sum(int((distances(part, manifold) <= radius).any(-1).sum()) for part in points.split(BLOCK))


def precision_recall(real: Tensor, made: Tensor, neighbours: int, mesh: Mesh) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv:1904.06991): the share of ``made`` pictures in the k-nearest-
    neighbour manifold of the ``real`` ones, and the other way round. Ranks share the rows."""
    found = []
    for name, points, manifold in (("precision", made, real), ("recall", real, made)):
        if len(manifold) <= neighbours:
            raise UserError(f"{name} with {neighbours} neighbours needs more pictures than {len(manifold)}.")
        size, rank = mesh.dp_size, mesh.dp_rank
        own = torch.arange(rank, len(manifold), size, device=manifold.device)
        radius = torch.zeros(len(manifold), dtype=torch.float64, device=manifold.device)
        if len(own):
            radius[own] = radii(manifold, neighbours, own.split(BLOCK))
        radius = mesh.sum(radius)  # each is of one rank, the others add zeros
        inside = torch.tensor(covered(points[rank::size], manifold, radius), dtype=torch.float64, device=points.device)
        found.append(float(mesh.sum(inside)) / len(points))
    return found[0], found[1]


def compare(real: Statistics, made: Statistics, metrics: Collection[str], neighbours: int, mesh: Mesh) -> dict[str, float]:
    """``{metric: value}`` of merged statistics, on every rank."""
    values: dict[str, float] = {}
    if "fid" in metrics:
        assert real.pooled is not None and made.pooled is not None
        values["fid"] = frechet_distance(real.pooled, made.pooled)
    if "sfid" in metrics:
        assert real.cells is not None and made.cells is not None
        values["sfid"] = frechet_distance(real.cells, made.cells)
    if "inception_score" in metrics:
        assert made.score is not None
        values["inception_score"] = made.score.result()
    if {"precision", "recall"} & set(metrics):
        both = dict(zip(("precision", "recall"), precision_recall(real.features, made.features, neighbours, mesh), strict=True))
        values |= {name: value for name, value in both.items() if name in metrics}
    return values
