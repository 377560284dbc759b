"""Evaluations that look at the model themselves: called by training, equal on every mesh, and training does not notice them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import l3m_like
from l3m_like import load
from l3m_like.config import RunConfig
from l3m_like.core.errors import UserError
from l3m_like.evaluations import Findings, SampleGrid
from l3m_like.generate import FlowODE
from tests.distributed.pool import run as on_ranks
from tests.generate.tiny import CONFIGS, OVERRIDES

SIT = CONFIGS / "sit.yaml"
SHORT = [
    *OVERRIDES["sit"],
    "steps=4",
    "batch={global: 4}",
    "parallel.precision=fp64",
    "checkpoint.every=null",
    "log={console: false, every: 1}",
    "~evals.heldout",
    "sample.steps=2",
]
GRID = ["evals.samples.every=2", "evals.samples.run.settings.num_samples=5"]


class Recorder:
    """An evaluation that keeps what it is given, and draws from torch's generator, which it should not."""

    calls: list[dict[str, Any]] = []

    def __init__(self, data: Any = None) -> None:
        self.data = data

    def evaluate(self, model: torch.nn.Module, **given: Any) -> Findings:
        torch.randn(3)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        Recorder.calls.append(given | {"training": model.training, "grad": torch.is_grad_enabled(), "weights": weights})
        return Findings({"rows": float(len(self.data)) if self.data is not None else 0.0}, notes={"extractor": "none"})


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A run with pictures of samples, and one without evaluations."""
    folder = tmp_path_factory.mktemp("runs")
    for name, more in (("with", GRID), ("without", ["~evals"])):
        l3m_like.train(RunConfig.from_file(SIT, [*SHORT, *more, f"run.dir={folder}", f"run.name={name}"]))
    return folder


def test_training_does_not_notice_it(runs) -> None:
    losses = [[row["loss"] for row in lines(runs / name) if "loss" in row] for name in ("with", "without")]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    weights = [dict(load(runs / name).model.named_parameters()) for name in ("with", "without")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_picture_is_what_the_run_samples(runs) -> None:
    """Of the averaged weights; in the run's directory, its metrics and its report."""
    from PIL import Image

    found = [row for row in lines(runs / "with") if row.get("evaluation") == "samples"]
    assert [row["step"] for row in found] == [2, 4]
    picture = np.asarray(Image.open(runs / "with" / found[-1]["images"]["samples/grid"]))
    expected = load(runs / "with", ema=True).generate(num_samples=5).grid()
    assert np.array_equal(picture, np.broadcast_to(expected, picture.shape)) and picture.std() > 0
    assert "samples_grid_00000004" in (runs / "with" / "report.html").read_text()


def grid_on(folder: Path, axes: list[str]) -> tuple[torch.Tensor, list[float]]:
    """Train on a mesh of two; the pictures' numbers before they become bytes, and the losses."""
    from l3m_like.evaluations import sample_grid as module

    seen = []

    class Seen(SampleGrid):
        def evaluate(self, model: Any, **given: Any) -> Findings:
            seen.append(self.sampler.run(model, mesh=given["mesh"]).images)
            return super().evaluate(model, **given)

    kept, module.SampleGrid = module.SampleGrid, Seen
    l3m_like.evaluations.SampleGrid = Seen
    try:
        l3m_like.train(RunConfig.from_file(SIT, [*SHORT, *GRID, *axes, f"run.dir={folder}", "run.name=mesh"]))
    finally:
        module.SampleGrid = kept
        del l3m_like.evaluations.SampleGrid
    return torch.stack(seen), [row["loss"] for row in lines(folder / "mesh") if "loss" in row]


def test_same_on_a_mesh(tmp_path) -> None:
    expected, losses = grid_on(tmp_path / "one", [])
    for found, on_mesh in on_ranks(2, grid_on, tmp_path / "two", ["parallel.dp_shard=2"]):
        assert found.dtype == torch.float64 and float((found - expected).abs().max()) < 1e-10
        assert np.allclose(on_mesh, losses, rtol=1e-10)
    assert float((expected[0] - expected[1]).abs().max()) > 1e-6  # the weights have changed in between


def test_what_an_object_is_given(tmp_path) -> None:
    """Evaluation mode, no gradients, averaged weights, its dataset; its notes reach the lines and the report."""
    target = f"{__name__}.Recorder"
    data = ["+evals.seen.data=${data.train}", "+evals.seen.every=3", f"+evals.seen.run={{_target_: {target}}}"]
    cfg = RunConfig.from_file(SIT, [*SHORT, "evals.samples=null", *data, f"run.dir={tmp_path}", "run.name=seen"])
    Recorder.calls.clear()
    final = l3m_like.train(cfg)
    assert final["seen/rows"] == 9000.0 and [call["step"] for call in Recorder.calls] == [3, 4]
    assert not any(call["training"] or call["grad"] for call in Recorder.calls)
    assert Recorder.calls[0]["seed"] == 0 and Recorder.calls[0]["folder"] == tmp_path / "seen" / "evaluations" / "seen"
    averaged = dict(load(tmp_path / "seen", ema=True).model.named_parameters())
    for name, value in Recorder.calls[-1]["weights"].items():
        assert torch.equal(value, averaged[name]), name
    (row, _) = [row for row in lines(tmp_path / "seen") if row.get("evaluation") == "seen"]
    assert row["seen/extractor"] == "none" and "seen/extractor" in (tmp_path / "seen" / "report.html").read_text()
    without = l3m_like.train(RunConfig.from_file(SIT, [*SHORT, "~evals", f"run.dir={tmp_path}", "run.name=without"]))
    assert without["loss"] == final["loss"], "a draw of an evaluation changed the training"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("evals.samples.run=null", "data must be given"),
        ("+evals.samples.samples=8", "samples belongs to evaluations without `run`"),
        ("evals.samples.run.settings={num_sample: 3}", "Did you mean 'num_samples'"),
        ("sample=null", "evals.samples.run"),
        ("sample.stream=video", "video_noised"),
    ],
)
def test_errors(override, words, tmp_path) -> None:
    with pytest.raises(UserError, match="evals.samples") as raised:
        l3m_like.train(RunConfig.from_file(SIT, [*SHORT, override, f"run.dir={tmp_path}"]))
    assert words in str(raised.value)


def test_settings_of_a_sampler() -> None:
    sampler = SampleGrid(FlowODE((1, 8, 8), 10, steps=3), {"num_samples": 7, "guidance": 2.0}).sampler
    assert (sampler.num_samples, sampler.guidance, sampler.steps) == (7, 2.0, 3)
    with pytest.raises(UserError, match="no dataclass"):
        SampleGrid(Recorder(), {"steps": 2})
