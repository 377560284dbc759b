"""A picture of what the model generates at this step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.distributed.mesh import Mesh
from l3m_like.evaluations.evaluation import Findings
from l3m_like.generate.sampler import Inference, Sampler


class SampleGrid:
    """Samples of the run's own sampler as one picture: the same noise at every step, so that pictures can be compared.

    Args:
        sampler: of images, usually ``${sample}``.
        settings: of the sampler, where they differ: ``{num_samples: 20}``.

    Raises:
        UserError: a setting that the sampler has not; samples that are no pictures.
    """

    def __init__(self, sampler: Sampler, settings: Mapping[str, Any] | None = None) -> None:
        self.sampler = changed(sampler, settings or {})

    def check(self, model: nn.Module) -> None:
        check_sampler(self.sampler, model)

    def evaluate(self, model: nn.Module, *, mesh: Mesh, step: int, seed: int, folder: Path) -> Findings:
        samples = self.sampler.run(model, mesh=mesh)
        if not hasattr(samples, "grid"):
            raise UserError(f"SampleGrid: {type(self.sampler).__name__} makes {type(samples).__name__}, which are no pictures.")
        return Findings(images={"grid": torch.from_numpy(samples.grid())})


def changed(sampler: Any, settings: Mapping[str, Any]) -> Any:
    """The sampler with some of its settings replaced."""
    if not dataclasses.is_dataclass(sampler) or isinstance(sampler, type):
        if settings:
            raise UserError(f"settings: {type(sampler).__name__} is no dataclass; give the whole sampler instead.")
        return sampler
    known = [field.name for field in dataclasses.fields(sampler) if field.init]
    for name in settings:
        if name not in known:
            raise UserError(f"settings: {type(sampler).__name__} has no setting '{name}'. {did_you_mean(name, known)}")
    return dataclasses.replace(sampler, **settings)


def check_sampler(sampler: Any, model: nn.Module) -> None:
    """The keys of the model against those that the sampler supplies and takes, where it can say."""
    if hasattr(sampler, "check"):
        sampler.check(Inference(model))
