"""How well the model's samples match real pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l3m_like.core.errors import UserError
from l3m_like.data.dataset import Dataset
from l3m_like.distributed.mesh import Mesh
from l3m_like.evaluations.evaluation import Findings
from l3m_like.evaluations.extractors import Extractor, Features
from l3m_like.evaluations.image_sets import MOST, Statistics, compare, described
from l3m_like.evaluations.judge import Judge, JudgedAccuracy
from l3m_like.evaluations.pictures import Batches, of_dataset
from l3m_like.evaluations.sample_grid import changed, check_sampler


class SampleQuality:
    """FID, sFID, inception score, precision and recall of the run's samples against the pictures of ``data``; with a judge,
    also the share of samples in which it sees the class that was asked for (``class_accuracy``).

    Published FIDs are of 50,000 samples against the training set, with the ``Inception`` extractor; the FID of fewer samples is
    larger. The statistics of the real pictures are computed once.

    Args:
        data: the real pictures, ``image`` in [-1, 1].
        extractor: of features.
        sampler: of images in [-1, 1] (None: that of the run).
        settings: of the sampler, where they differ: ``{num_samples: 10000, guidance: 1.0}``.
        metrics: any of ``image_sets.METRICS``.
        real: how many of the real pictures (None: all, which may be many: their moments are summed as they come).
        most: pictures of each set whose features are held for precision and recall, see ``Statistics``.
        neighbours: of precision and recall.
        splits: of the inception score.
        batch: real pictures at a time.
        judge: of the samples' classes.

    Raises:
        UserError: a metric or setting that there is not; a sampler of something else.
    """

    def __init__(
        self,
        data: Dataset,
        extractor: Extractor,
        sampler: Any = None,
        settings: Mapping[str, Any] | None = None,
        metrics: Sequence[str] = ("fid", "sfid", "inception_score", "precision", "recall"),
        real: int | None = None,
        most: int = MOST,
        neighbours: int = 3,
        splits: int = 10,
        batch: int = 64,
        judge: Judge | None = None,
    ) -> None:
        self.sampler = changed(sampler, settings or {})
        if not hasattr(self.sampler, "chunks"):
            raise UserError(f"SampleQuality: {type(self.sampler).__name__} is no sampler of images (FlowODE, FlowSDE).")
        if judge is not None and not hasattr(self.sampler, "label"):
            raise UserError(
                f"SampleQuality: {type(self.sampler).__name__} does not say which classes its samples are of: no judge."
            )
        if judge is not None and getattr(self.sampler, "embeddings", None):
            raise UserError(
                f"SampleQuality: samples are of texts (embeddings = {self.sampler.embeddings}), which are no classes: no judge."
            )
        self.data, self.extractor, self.metrics, self.judge = data, extractor, tuple(metrics), judge
        if most <= neighbours:
            raise UserError(f"SampleQuality: most is {most}; it must be above neighbours ({neighbours}).")
        self.limit, self.neighbours, self.splits, self.batch, self.most = real, neighbours, splits, batch, most
        self._real: Statistics | None = None
        Statistics(self.metrics)

    def check(self, model: nn.Module) -> None:
        check_sampler(self.sampler, model)
        self.extractor.check()
        if self.judge is not None:
            self.judge.check()

    def evaluate(self, model: nn.Module, *, mesh: Mesh, step: int, seed: int, folder: Path) -> Findings:
        if self._real is None:
            pictures = of_dataset(self.data, self.batch, mesh, self.limit)
            self._real = collect_statistics(pictures.batches, self.extractor, Statistics(self.metrics, most=self.most), mesh)
        made = Statistics(self.metrics, self.sampler.num_samples, self.splits, self.most)
        batches = self.sampler.chunks(model, mesh)
        accuracy = None if self.judge is None else JudgedAccuracy(self.judge, self.sampler.label)
        made = collect_statistics(batches if accuracy is None else accuracy.watch(batches), self.extractor, made, mesh)
        values = compare(self._real, made, self.metrics, self.neighbours, mesh)
        notes = {"extractor": self.extractor.name, "pictures": described(made, self._real)}
        if accuracy is not None:
            values["class_accuracy"] = accuracy.result(mesh)
            notes["judge"] = accuracy.judge.name
        return Findings(values, notes=notes)


def collect_statistics(batches: Batches, extractor: Extractor, into: Statistics, mesh: Mesh) -> Statistics:
    """Features of this rank's pictures into ``into``, merged over all ranks."""
    like: Features | None = None
    with torch.no_grad():
        for rows, images, counts in batches:
            features = extractor(images)
            like = features
            if counts:
                into.add(features, rows)
    if like is None:
        raise UserError("there are no pictures to compare.")
    into.merge(mesh, like)
    return into
