"""Metrics that compare a set of pictures with another one: FID, sFID, inception score, precision and recall.

Statistics are sums in float64 over rows, or features kept by row number; both are merged over ranks. So a result depends neither
on batches nor on the number of processes. Of a set of any size the sums take D^2 numbers, and the features are ``MOST`` at most.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.random import uniform
from l3m_like.distributed.mesh import Mesh, gather_objects
from l3m_like.evaluations.extractors import Features

METRICS = ("fid", "sfid", "inception_score", "precision", "recall")
#: distances are held for so many rows and columns at a time
BLOCK = 2048
#: pictures of a set whose features precision and recall look at: as many as published results, 0.4 GB of Inception's
MOST = 50_000


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
        most: pictures whose features are kept for precision and recall. Of more, so many are drawn, by a function of their row
            numbers: a set may be in the order of its classes.
    """

    def __init__(self, metrics: Collection[str], total: int | None = None, splits: int = 10, most: int = MOST) -> None:
        for name in metrics:
            if name not in METRICS:
                raise UserError(f"metrics: there is no '{name}'. {did_you_mean(name, METRICS)}")
        self.pooled = Moments() if "fid" in metrics else None
        self.cells = Moments() if "sfid" in metrics else None
        self.score = InceptionScore(total, splits) if "inception_score" in metrics and total is not None else None
        self.keeps = bool({"precision", "recall"} & set(metrics))
        self.count = 0
        self.most = most
        self._kept: dict[int, Tensor] = {}
        self._draws: list[tuple[float, int]] = []  # (-draw, row) of what is kept: a heap, the next to go first
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
        if self.keeps and rows:
            draws = uniform(torch.tensor(rows), seed=0, purpose="precision_recall", dtype=torch.float64).tolist()
            for row, draw, one in zip(rows, draws, features.pooled.cpu(), strict=True):
                if len(self._kept) < self.most:
                    heapq.heappush(self._draws, (-draw, row))
                elif -draw > self._draws[0][0]:
                    del self._kept[heapq.heapreplace(self._draws, (-draw, row))[1]]
                else:
                    continue
                self._kept[row] = one.clone()  # no view: it would hold its whole batch

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
            every = gather_objects(self._draws if mesh.speaks_for_rows else [])
            chosen = {row for _, row in heapq.nlargest(self.most, (pair for part in every for pair in part))}
            kept: dict[int, Tensor] = {}
            for part in gather_objects(
                {row: self._kept[row] for row in chosen & set(self._kept)} if mesh.speaks_for_rows else {}
            ):
                kept |= part
            self._kept, self._draws = {}, []
            self.features = torch.stack([kept[row] for row in sorted(kept)]).to(mesh.device)


def radii(rows: Tensor, features: Tensor, neighbours: int) -> Tensor:
    """The distance of each of ``rows`` [n, D], which are some of ``features`` [N, D], to its k-th nearest other one."""
    found = []
    for part in rows.split(BLOCK):
        nearest = part.new_empty(len(part), 0, dtype=torch.float64)
        for others in features.split(BLOCK):
            nearest = torch.cat((nearest, distances(part, others)), 1)
            nearest = nearest.topk(min(neighbours + 1, nearest.shape[1]), largest=False).values
        found.append(nearest[:, -1])  # the nearest of all is the row itself
    return torch.cat(found)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """[N, M] in float64."""
    return torch.cdist(x.double(), y.double(), compute_mode="use_mm_for_euclid_dist")


def covered(points: Tensor, manifold: Tensor, radius: Tensor) -> int:
    """How many of ``points`` [N, D] lie in the ball of at least one row of ``manifold`` [M, D] with its ``radius`` [M]."""
    count = 0
    for part in points.split(BLOCK):
        inside = torch.zeros(len(part), dtype=torch.bool, device=part.device)
        for centres, reach in zip(manifold.split(BLOCK), radius.split(BLOCK), strict=True):
            inside |= (distances(part, centres) <= reach).any(-1)
        count += int(inside.sum())
    return count


def precision_recall(real: Tensor, made: Tensor, neighbours: int, mesh: Mesh) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv:1904.06991): the share of ``made`` pictures in the k-nearest-
    neighbour manifold of the ``real`` ones, and the other way round. Ranks share the rows."""
    found = []
    for name, points, manifold in (("precision", made, real), ("recall", real, made)):
        if len(manifold) <= neighbours:
            raise UserError(f"{name} with {neighbours} neighbours needs more pictures than {len(manifold)}.")
        size, rank = mesh.dp_size, mesh.dp_rank
        radius = torch.zeros(len(manifold), dtype=torch.float64, device=manifold.device)
        if rank < len(manifold):
            radius[rank::size] = radii(manifold[rank::size], manifold, neighbours)
        radius = mesh.sum(radius)  # each is of one rank, the others add zeros
        inside = torch.tensor(covered(points[rank::size], manifold, radius), dtype=torch.float64, device=points.device)
        found.append(float(mesh.sum(inside)) / len(points))
    return found[0], found[1]


def described(made: Statistics, real: Statistics) -> str:
    """How many pictures were compared, for people."""
    text = f"{made.count} generated, {real.count} real"
    if made.keeps and max(made.count, real.count) > made.most:
        text += f" (precision and recall: {len(made.features)} and {len(real.features)} of them)"
    return text


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
