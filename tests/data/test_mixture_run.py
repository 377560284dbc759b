"""Mixtures in training: each source's loss and tokens from the same forward pass, and data that ends before the steps do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from l3m_like.config import RunConfig
from l3m_like.data import Loader
from l3m_like.training.train import train
from tests.distributed import pool

ROOT = Path(__file__).parents[2]
DATA = "l3m_like.data."
SIZE = ["dim=16", "layers=1", "heads=2", "kv_heads=1", "head_dim=8", "mlp_dim=16", "sequence=32", "batch.global=4"]


def config(folder: Path, mix: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Long documents of one file and short ones of three uneven shards, the last of them empty."""
    (folder / "long.jsonl").write_text("".join(json.dumps({"text": f"document {n} " * 6}) + "\n" for n in range(30)))
    for name, count in (("a", 17), ("b", 5), ("c", 0)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {n}"}) + "\n" for n in range(count)))
    quiet = ["log.console=false", "log.every=2", "parallel.precision=fp64", f"run.dir={folder}", "checkpoint.every=null"]
    cfg = RunConfig.from_file(ROOT / "configs/experiment/llm.yaml", [*SIZE, *quiet, "data.lanes=4", "steps=40"]).to_dict()
    train_on = cfg["data"]["train"]
    train_on["source"] = {
        "long": {"_target_": DATA + "JsonLines", "path": str(folder / "long.jsonl")},
        "short": {"_target_": DATA + "JsonLinesStream", "path": str(folder / "{a,b,c}.jsonl")},
    }
    train_on["mix"] = {"_target_": DATA + "Mix", **mix}
    train_on["pack"] = {"_target_": DATA + "FitPack", "length": 32, "buffer": 4, "too_long": "split"}
    cfg["evals"]["heldout"] |= {"samples": 8, "every": None}
    return cfg | settings


def run(tree: dict[str, Any]) -> dict[str, float]:
    return train(RunConfig.from_dict(tree))


def rows_of(tree: dict[str, Any]) -> list[dict[str, Any]]:
    lines = (Path(tree["run"]["dir"]) / tree["run"]["name"] / "metrics.jsonl").read_text().splitlines()
    return [row for line in lines if "seconds" in (row := json.loads(line))]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_terms_of_the_sources_make_up_the_loss(ranks: int, tmp_path: Path) -> None:
    tree = config(tmp_path, {"weights": {"long": 3, "short": 1}}, steps=6)
    pool.run(ranks, run, tree)
    loader = Loader(RunConfig.from_dict(tree).instantiate("data.train"), seed=0, global_batch=4, micro_batch=4, lanes=4)
    both = 0
    for row in rows_of(tree):
        batch = loader.next_step().micro[0]  # type: ignore[union-attr]
        counted = batch["text_targets"] != -100
        targets = {name: int((counted & batch[f"text_from_{name}"]).sum()) for name in ("long", "short")}
        assert row["tokens/long"] == int(batch["text_from_long"].sum())
        both += all(targets.values())
        assert row["tokens/long"] + row["tokens/short"] == row["tokens"]
        assert all((f"loss/next_token/{name}" in row) == bool(count) for name, count in targets.items())
        parts = [(row[f"loss/next_token/{name}"], count) for name, count in targets.items() if count]
        assert row["loss"] == pytest.approx(sum(v * n for v, n in parts) / sum(n for _, n in parts), rel=1e-12)
        assert row["loss"] == row["loss/next_token"]
    assert both >= 2
    loader.close()


@pytest.mark.parametrize("ends", [pytest.param("first", marks=pytest.mark.slow), "last"])
def test_data_that_ends_ends_all_ranks_at_the_same_step_with_an_evaluation_and_a_checkpoint(ends: str, tmp_path: Path) -> None:
    mix = {"weights": {"long": 1, "short": 1}, "epochs": {"long": 1, "short": 1}, "ends": ends}
    ended = {}
    for ranks in (1, 2, 4):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        tree = config(folder, mix)
        results = pool.run(ranks, run, tree)
        (step,) = {result["step"] for result in results}
        assert 1 <= step < 40 and results[0]["heldout/loss"] > 0
        assert (folder / tree["run"]["name"] / "checkpoints" / f"step_{int(step):08d}" / "COMMITTED").exists()
        ended[ranks] = step, [row["loss"] for row in rows_of(tree)]
        assert pool.run(ranks, run, tree)[0]["step"] == step  # the same command finds nothing left to do
    assert ended[1][0] == ended[2][0] == ended[4][0]
    for ranks in (2, 4):
        assert ended[ranks][1] == pytest.approx(ended[1][1], rel=1e-9)
