"""--debug: what the hooks write, and that they change nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from l3m_like.config import RunConfig
from l3m_like.data.loader import EvalLoader
from l3m_like.training.debug import Debug, statistics
from l3m_like.training.init import initialize, materialize
from l3m_like.training.train import Plan, plan
from tests.generate.tiny import CONFIGS, OVERRIDES


def made(name: str) -> tuple[Plan, dict[str, Any]]:
    """A tiny run on the CPU and its first batch."""
    run = plan(RunConfig.from_file(CONFIGS / f"{name}.yaml", [*OVERRIDES[name], "batch.global=2", "batch.micro=2"]), 1)
    for part in run.parts.values():
        materialize(part, torch.device("cpu"))
        initialize(part, 0)
        part.train()
    return run, next(iter(EvalLoader(run.dataset, batch=2)))[0]


def step(run: Plan, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    run.updates[0].forward_backward(batch, dict.fromkeys(run.losses, 1.0), None)  # type: ignore[arg-type]
    return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def anomaly_off() -> Iterator[None]:
    yield
    torch.autograd.set_detect_anomaly(False)


@pytest.mark.parametrize("name", ["llm", "sit"])
def test_records_every_port_and_changes_nothing(name: str, tmp_path: Path) -> None:
    run, batch = made(name)
    plain = step(run, batch)
    run.model.zero_grad()
    debug = Debug(run.parts, tmp_path, forwards=1)
    watched = step(run, batch)
    assert all(torch.equal(plain[key], watched[key]) for key in plain)
    rows = lines(tmp_path / "debug" / "blocks.jsonl")
    seen = {(row["block"], row["what"], row["key"]) for row in rows}
    for trace in run.trace.rows:
        if not trace.path.startswith("loss."):
            assert {(trace.path, "input", key) for key in trace.reads} <= seen
            assert {(trace.path, "output", key) for key in trace.writes} <= seen
    last = run.trace.rows[-2]
    assert (last.path, "gradient", next(iter(last.writes))) in seen
    for row in rows:
        assert row["forward"] == 0 and row["nan"] == 0 and row["min"] <= row["mean"] <= row["max"]
    saved = load_file(tmp_path / "debug" / "first_batch.safetensors")
    assert set(saved) == set(run.wiring.provided) and all(torch.equal(saved[key], batch[key]) for key in saved)
    debug.close()


def test_stops_after_the_first_forwards_and_leaves_evaluation_out(tmp_path: Path) -> None:
    run, batch = made("llm")
    debug = Debug(run.parts, tmp_path, forwards=2)
    run.model.eval()
    with torch.no_grad():
        run.parts[""](batch)
    run.model.train()
    assert lines(debug.path) == []
    for _ in range(3):
        step(run, batch)
    assert {row["forward"] for row in lines(debug.path)} == {0, 1}
    size = debug.path.stat().st_size
    debug.close()
    assert not torch.is_anomaly_enabled() and not debug._hooks
    step(run, batch)
    assert debug.path.stat().st_size == size


def test_a_nan_is_counted_where_it_begins_and_named_in_the_backward(tmp_path: Path) -> None:
    run, batch = made("llm")
    debug = Debug(run.parts, tmp_path, rank=1)
    with torch.no_grad():
        run.model.get_parameter("trunk.layers.0.mlp.up.weight")[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="returned nan values"):
        step(run, batch)
    rows = {(row["block"], row["what"], row["port"]): row for row in lines(tmp_path / "debug" / "blocks.1.jsonl")}
    assert rows["trunk", "input", "tokens"]["nan"] == 0 and rows["trunk", "output", "hidden"]["nan"] > 0
    debug.close()


def test_statistics() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, float("nan"), float("inf")])
    found = statistics(x)
    assert (found["mean"], found["min"], found["max"], found["nan"], found["inf"]) == (2.0, 1.0, 3.0, 1, 1)
    assert found["std"] == pytest.approx((2 / 3) ** 0.5) and found["shape"] == [5] and found["dtype"] == "float32"
    assert statistics(torch.full((2,), float("nan")))["mean"] is None
    assert statistics(torch.zeros(0, 3))["mean"] is None
    assert statistics(torch.tensor([True, False]))["mean"] == 0.5
