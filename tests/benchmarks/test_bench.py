"""The benchmark runs, its numbers agree with each other, and both of its loops do the same work. No test is about a time."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from l3m_like.benchmarks import bench as module
from l3m_like.benchmarks.bench import LOG_EVERY, OTHER, PARTS, PlainLoop, bench, table
from l3m_like.benchmarks.synthetic import synthetic_data
from l3m_like.config import RunConfig
from l3m_like.core.errors import Stopped, UserError
from l3m_like.data.loader import Loader
from l3m_like.training.control import Upcoming
from l3m_like.training.optim import EMA
from l3m_like.training.updates import Update

ROOT = Path(__file__).parents[2]
TINY = {
    "llm": ["dim=32", "layers=2", "head_dim=8", "mlp_dim=48", "sequence=64", "batch.global=4", "batch.micro=2"],
    "sit": ["dim=32", "layers=2", "heads=2", "batch.global=8", "batch.micro=4"],
}
STEPS, WARMUP = 2 * LOG_EVERY + 1, 1


@pytest.fixture(autouse=True)
def process_group():
    had_group = dist.is_initialized()
    yield
    if not had_group and dist.is_initialized():
        dist.destroy_process_group()


def config(kind: str, *overrides: str) -> RunConfig:
    return RunConfig.from_file(ROOT / "configs" / "experiment" / f"{kind}.yaml", [*TINY[kind], *overrides])


@pytest.mark.parametrize("kind", TINY)
def test_both_loops_do_the_same_work(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # the plain loop's lines: as many as ours would be
    lines: list[dict[str, Any]] = []
    loop = PlainLoop.__call__

    def recorded(self: PlainLoop, batch: Any) -> None:
        loop(self, batch)
        lines[:] = [json.loads(line) for line in Path(self.file.name).read_text().splitlines()]

    monkeypatch.setattr(PlainLoop, "__call__", recorded)
    result = bench(config(kind, "optim.weight_decay=0.1"), STEPS, warmup=WARMUP, overhead=True)
    assert len(result["losses"]) == len(result["plain_losses"]) == STEPS
    assert result["losses"] == pytest.approx(result["plain_losses"], rel=1e-5)
    assert result["losses"][-1] < result["losses"][0]
    assert [line["step"] for line in lines] == [LOG_EVERY, 2 * LOG_EVERY]
    assert lines[1]["loss"] == pytest.approx(result["losses"][2 * LOG_EVERY - 1 - WARMUP], rel=1e-5)
    assert result["ratio"] == pytest.approx(result["seconds"] / result["plain_seconds"])
    assert result["ratio_of_means"] > 0 and result["ratio_of_cpu_time"] > 0


def test_another_loop_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, count = module.FORWARDS["Transformer"]
    monkeypatch.setitem(module.FORWARDS, "Transformer", (forward, lambda batch: count(batch) + 8))
    with pytest.raises(UserError, match="trains another thing"):
        bench(config("llm"), 3, warmup=1, overhead=True)


def test_numbers_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    watches: list[module.Watch] = []
    attached = module.Watch.attached
    monkeypatch.setattr(module.Watch, "attached", lambda watch: watches.append(watch) or attached(watch))
    originals = [getattr(owner, method) for owner, method, _ in PARTS] + [Upcoming.agreed]
    result = bench(config("sit"), 5, warmup=2)
    assert [getattr(owner, method) for owner, method, _ in PARTS] + [Upcoming.agreed] == originals, "left as it was"
    assert len(result["all_seconds"]) == len(result["losses"]) == result["steps"] == 5
    assert set(result["parts"]) == {"data", "forward", "backward", "optimizer", OTHER}
    assert all(seconds > 0 for seconds in result["parts"].values())
    parts = watches[0].parts()
    assert [sum(step.values()) for step in parts[2:]] == pytest.approx(result["all_seconds"])
    # two micro-batches: the backward pass is entered twice within a step, and a step's end is the next one's beginning
    names = [[name for _, name in marks] for marks in watches[0]._marks]
    assert all(step.count("backward") == step.count("forward") // 2 == 2 for step in names)
    assert result["unit"] == "images" and result["units"] == 8
    assert result["flops"] > 6 * 49 * 8 * 2 * 12 * 32**2  # 49 patches of 8 images through two layers, forward and backward
    assert result["mfu"] is None and result["memory"] > 2**26
    text = table(result)
    assert "images per second" in text and "backward" in text and "ratio" not in text
    json.dumps(result)


def test_what_is_timed_is_what_the_loop_calls() -> None:
    assert {(owner, method) for owner, method, _ in PARTS} == {
        (Loader, "next_step"), (Update, "forward_backward"), (Tensor, "backward"), (Update, "step"), (EMA, "update"),
    }  # fmt: skip
    assert all(callable(getattr(owner, method)) for owner, method, _ in PARTS)


def test_a_run_that_cannot_be_compared_is_refused() -> None:
    for override, named in (
        ("parallel.checkpoint=full", "parallel.checkpoint"),
        ("+optim.no_decay=['*embed*']", "optim.groups"),
        ("optim.name=muon", "AdamW without"),
        ("optim.layer_decay=0.5", "AdamW without"),
    ):
        with pytest.raises(UserError, match=named):
            bench(config("llm", override), 1, warmup=1, overhead=True)
    with pytest.raises(UserError, match="at least 1"):
        bench(config("llm"), 0)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "run" / "bench.py"))["main"]
    out = tmp_path / "llm.json"
    command = ["--config", str(ROOT / "configs/experiment/llm.yaml"), "--steps", "2", *TINY["llm"], "--warmup", "1"]
    assert main([*command, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert "tokens per second" in capsys.readouterr().out and result["facts"]["versions"]["torch"] == torch.__version__
    assert set(result["facts"]) == {"date", "device", "mesh", "versions", "commit"} and result["units"] == 4 * 64
    for more, named in (
        (["dims=3"], "dims"),
        (["--json", str(tmp_path / "none" / "x.json")], "there is no folder"),
        (["--compare", "--micro", "1,b"], "--micro 1,b: it takes numbers of rows"),
        (["kernels.linear_cross_entropy=triton"], "it needs an NVIDIA GPU"),
    ):
        assert main([*command, *more]) == 1
        wrong = capsys.readouterr().err
        assert wrong.splitlines()[-1].startswith("error:") and named in wrong


def test_a_signal_leaves_nothing_to_go_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(cfg: RunConfig) -> None:
        raise Stopped("saved")

    monkeypatch.setattr(module, "train", stopped)
    with pytest.raises(UserError, match="leaves nothing behind"):
        bench(config("llm"), 1, warmup=1)


def test_synthetic_tokens_of_a_run_that_counts_documents() -> None:
    """The losses of experts' loads are per document."""
    cfg = RunConfig.from_file(ROOT / "configs/experiment/moe.yaml", [*TINY["llm"], "batch.global=2", "batch.micro=2"])
    synthetic_data(cfg, "tokens")
    assert math.isfinite(bench(cfg, 1, warmup=1)["losses"][0])
