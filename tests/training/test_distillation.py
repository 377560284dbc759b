"""A frozen teacher inside of the student's model, on every mesh."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import l3m_like
from l3m_like.config import RunConfig
from l3m_like.core.errors import UserError
from l3m_like.kernels.linear_distillation import Divergence, linear_distillation_reference
from l3m_like.training.build import build_model
from l3m_like.training.checkpoint import load_full
from tests.distributed.pool import run as on_ranks
from tests.distributed.recorder import Record, experiment, recorded, world_size
from tests.distributed.test_parity import compare, one_gradient_halved
from tests.parity.rule import check_values, perturb


def teacher(cfg: Any, **head: Any) -> dict[str, Any]:
    """A model like the student's, as wide again, that reads what the student reads."""
    model = copy.deepcopy({key: cfg.model[key] for key in ("preprocessor", "trunk", "head")})
    for part in model.values():
        part["dim"] = 32
    model["preprocessor"]["writes"] = {"tokens": "teacher_tokens"}
    model["trunk"] |= {"num_layers": 3, "reads": {"tokens": "teacher_tokens"}, "writes": {"hidden": "teacher_hidden"}}
    model["head"] |= {"_target_": "l3m_like.blocks.TeacherHead", "reads": {"hidden": "teacher_hidden"}, "writes": None} | head
    model |= {"_target_": "l3m_like.core.MetaModel", "tie": {"head.proj.weight": "preprocessor.embed.weight"}}
    return {"_target_": "l3m_like.core.Frozen", "model": model, "random_weights": True, "training_only": True}


def distilling(divergence: str = "forward_kl", top_k: int | None = None, **settings: Any) -> RunConfig:
    cfg = experiment("llm", **settings)
    cfg.model["postprocessor"] = {"teacher": teacher(cfg, top_k=top_k)}
    cfg.model["head"] |= {"_target_": "l3m_like.blocks.DistillationHead", "writes": ["nll", "divergence"]}
    cfg.model["head"] |= {"divergence": divergence, "temperature": 1.0 if top_k else 2.0}
    cfg.loss["next_token"]["weight"] = 0.3
    cfg.loss["distillation"] = {"_target_": "l3m_like.losses.Distillation", "stream": "text", "weight": 0.7}
    return cfg


def run(divergence: str, top_k: int | None, fault: Any = None, **settings: Any) -> list[Record]:
    return recorded(distilling(divergence, top_k, **settings), world_size(settings), fault=fault)


@functools.cache
def reference(divergence: str, top_k: int | None) -> Record:
    return run(divergence, top_k)[0]


MESHES = [
    ("forward_kl", None, {"dp_shard": 2}),
    ("forward_kl", None, {"tp": 2}),
    ("forward_kl", None, {"micro": 2, "checkpoint": "full"}),
    pytest.param("jensen_shannon", 5, {"dp_shard": 2}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("divergence", "top_k", "settings"), MESHES, ids=str)
def test_equals_one_process(divergence: str, top_k: int | None, settings: dict[str, Any]) -> None:
    """Losses, norms and the student's gradients; the teacher has none, and is in no optimizer."""
    assert not any("teacher" in name for name in reference(divergence, top_k).start)
    compare(run(divergence, top_k, **settings), reference(divergence, top_k))


def test_a_planted_fault_is_found() -> None:
    with pytest.raises(AssertionError, match="against"):
        compare(run("forward_kl", None, one_gradient_halved, dp_shard=2), reference("forward_kl", None))


# ---- the shipped experiment ----------------------------------------------------------------------------------------------

CONFIGS = Path(__file__).parents[2] / "configs" / "experiment"
TEACHER = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_dim": 48}
STUDENT = ["dim=16", "layers=2", "heads=2", "kv_heads=1", "head_dim=8", "mlp_dim=24"]


def train_shipped(name: str, folder: str, *overrides: str) -> list[dict[str, float]]:
    """The rows that a run of a few steps logs, in float64."""
    short = ["sequence=32", "batch.global=4", "evals=null", "checkpoint.every=null", "log.console=false", "schedule.warmup=0"]
    where = [f"run.dir={folder}", "parallel.precision=fp64"]
    with mock.patch("l3m_like.training.report.write_report", lambda *args: None):  # a second of matplotlib
        l3m_like.train(RunConfig.from_file(CONFIGS / f"{name}.yaml", [*short, *where, *overrides]))
    rows = map(json.loads, (Path(folder) / name / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "loss" in row]


def test_the_shipped_experiment_learns_from_a_run(tmp_path: Path) -> None:
    """A teacher's run fills the frozen part, on one process and cut over two, and both are the same training."""
    train_shipped("llm", str(tmp_path), "steps=2", "lr=0.05", *(f"{knob}={value}" for knob, value in TEACHER.items()))
    teacher = ",".join(f"{knob}:{value}" for knob, value in TEACHER.items())
    start = f"init.parts={{postprocessor.teacher:{tmp_path / 'llm'}}}"
    words = [*STUDENT, f"teacher={{{teacher}}}", start, "steps=3", "lr=0.01"]
    one = train_shipped("distill", str(tmp_path / "one"), *words)
    assert one[0]["loss"] > one[1]["loss"] > one[2]["loss"]
    assert one[0]["loss"] == pytest.approx(0.5 * (one[0]["loss/next_token"] + one[0]["loss/distillation"]), rel=1e-6)
    on_ranks(2, train_shipped, "distill", str(tmp_path / "two"), *words, "parallel.dp_shard=2")
    two = [json.loads(line) for line in (tmp_path / "two" / "distill" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in two if "loss" in row] == pytest.approx([row["loss"] for row in one], rel=1e-8)
    taught = load_full(tmp_path / "two" / "distill" / "checkpoints")
    for name, value in load_full(tmp_path / "llm" / "checkpoints").items():
        if name.startswith("model/"):
            assert torch.equal(taught[f"model/postprocessor.teacher.model.{name.removeprefix('model/')}"], value), name


# ---- the blocks ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    made = build_model(distilling()).to_empty(device="cpu").double()
    made.retie()
    perturb(made)
    return made


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 257, (2, 12), generator=torch.Generator().manual_seed(3))
    targets = ids.roll(-1, 1)
    targets[:, :4] = -100
    return {"text_ids": ids, "text_targets": targets}


def test_the_divergence_is_that_of_both_models_logits(model: Any) -> None:
    data = batch()
    found = model(data)
    frozen = model.postprocessor["teacher"].model
    theirs = frozen(data)
    alone = linear_distillation_reference(
        model.head.norm(found["text_hidden"]), model.head.proj.weight,
        frozen.head.norm(theirs["teacher_hidden"]), frozen.head.proj.weight,
        data["text_targets"], Divergence(temperature=2.0),
    )  # fmt: skip
    check_values(found["text_divergence"].detach(), alone.detach())
    assert (found["text_divergence"][:, :4] == 0).all() and (found["text_divergence"][:, 4:] > 0).all()


def test_inference_runs_no_teacher(model: Any) -> None:
    graph = model.inference()
    assert [step.path for step in graph.steps] == ["preprocessor", "trunk", "head"]
    out = model(batch(), graph)
    assert out["text_logits"].shape == (2, 12, 258) and "text_divergence" not in out


def test_vocabularies_must_be_equal() -> None:
    from l3m_like.training.train import plan

    cfg = distilling()
    for part in ("preprocessor", "head"):
        cfg.model["postprocessor"]["teacher"]["model"][part]["vocab_size"] = 300
    with pytest.raises(UserError, match="teacher's vocabulary has 300 tokens, the student's 258"):
        plan(cfg, 1)
    cfg = distilling()
    cfg.model["postprocessor"] = None
    with pytest.raises(UserError, match="needs the keys 'text_teacher_features', 'text_teacher_vocabulary': a Frozen part"):
        plan(cfg, 1)
