"""On an NVIDIA GPU: the same numbers as on the CPU, training in bf16 and compiled, exact resume, no waiting for the device."""

from __future__ import annotations

import copy
import gc
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l3m_like import load, train
from l3m_like.benchmarks.bench import bench
from l3m_like.config import RunConfig
from l3m_like.core.random import draw_by, key_of, normal, philox, uniform
from l3m_like.data import Loader
from l3m_like.training.control import Upcoming
from l3m_like.training.init import initialize
from l3m_like.training.optim import EMA, AdamW, Guard, parameter_groups
from tests.parity.rule import check_gradients, perturb

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
    pytest.mark.timeout(300),  # the first kernel of a kind may be compiled
]

CONFIGS = Path(__file__).parents[2] / "configs" / "experiment"
TINY = {
    "llm": ["dim=64", "layers=2", "head_dim=16", "mlp_dim=128", "sequence=128", "batch.global=16", "batch.micro=8"],
    "sit": ["dim=64", "layers=2", "batch.global=32", "batch.micro=16"],
}
KINDS = list(TINY)


def config(kind: str, folder: Path, *overrides: str) -> RunConfig:
    quiet = ["~evals", "log.console=false", "checkpoint.every=null", f"run.dir={folder}"]
    return RunConfig.from_file(CONFIGS / f"{kind}.yaml", [*TINY[kind], *quiet, *overrides])


def rows_of(cfg: RunConfig) -> list[dict[str, Any]]:
    train(cfg)
    return [json.loads(line) for line in (cfg.run_dir / "metrics.jsonl").read_text().splitlines()]


# ---- numbers -------------------------------------------------------------------------------------------------------------


def loss_and_gradients(cfg: RunConfig, model: Any, loss: Any, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    batch = Loader(cfg.instantiate("data.train"), seed=0, global_batch=4, micro_batch=4, prefetch=0).next_step().micro[0]
    data = model({key: value.to(device) for key, value in batch.items()})
    value, count = loss.term(data, float(loss.count_of(batch)))
    (value / count).backward()
    return (value / count).detach().cpu(), {name: p.grad.cpu() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_the_cpu_in_float64(kind: str, device: torch.device, tmp_path: Path) -> None:
    cfg = config(kind, tmp_path)
    (loss,) = cfg.instantiate("loss").values()
    exact = load(cfg, device="cpu", dtype="float64").model
    perturb(exact)
    ours = copy.deepcopy(exact).to(device, torch.float32)
    ours.retie()
    wanted_loss, wanted = loss_and_gradients(cfg, exact, loss, torch.device("cpu"))
    found_loss, found = loss_and_gradients(cfg, ours, loss, device)
    assert float((found_loss - wanted_loss).abs()) <= 1e-5 * float(wanted_loss)
    vanishing = {"k_proj.bias": "softmax ignores what all keys have in common"}
    check_gradients(found, wanted, vanishing=vanishing)
    name = next(name for name in found if name.endswith("mlp.up.weight"))
    with pytest.raises(AssertionError):
        check_gradients(found | {name: found[name] * 1.001}, wanted, vanishing=vanishing)


def test_draws_are_those_of_the_cpu(device: torch.device) -> None:
    row = torch.tensor([0, 1, 7, 2**31, 2**40])
    number = torch.arange(4096)
    counter = [number, number + 5, number * 7919 * 7919 % 2**32, 2**32 - 1 - number]
    words = philox(key_of(3, "words"), tuple(counter))
    for here, there in zip(words, philox(key_of(3, "words"), tuple(c.to(device) for c in counter)), strict=True):
        assert torch.equal(here, there.cpu())
    for dtype in (torch.float32, torch.float64):
        here = uniform(row, (3, 50), seed=1, purpose="test", dtype=dtype)
        assert torch.equal(here, uniform(row.to(device), (3, 50), seed=1, purpose="test", dtype=dtype).cpu())
    kernel = [draw(row.to(device), (3, 50), seed=1, purpose="test", dtype=torch.float64) for draw in (uniform, normal)]
    draw_by("torch")
    plain = [draw(row.to(device), (3, 50), seed=1, purpose="test", dtype=torch.float64) for draw in (uniform, normal)]
    draw_by("auto")
    assert torch.equal(kernel[0], plain[0]) and float((kernel[1] - plain[1]).abs().max()) <= 1e-14
    # logarithm and cosine are the device's own
    here = normal(row, (3, 50), seed=1, purpose="test", dtype=torch.float64)
    there = normal(row.to(device), (3, 50), seed=1, purpose="test", dtype=torch.float64)
    assert float((here - there.cpu()).abs().max()) <= 1e-14
    here, there = (normal(r, (3, 50), seed=1, purpose="test") for r in (row, row.to(device)))
    assert float((here - there.cpu()).abs().max()) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights_are_those_of_the_cpu(kind: str, device: torch.device, tmp_path: Path) -> None:
    cfg = config(kind, tmp_path)
    here = load(cfg, device="cpu").model
    there = copy.deepcopy(here).to(device)
    there.retie()
    with torch.no_grad():
        for p in there.parameters():
            p.fill_(math.nan)
    initialize(there, cfg.seed)
    wanted = dict(here.named_parameters())
    worst = max(float((p.cpu() - wanted[name]).abs().max()) for name, p in there.named_parameters())
    assert worst <= 1e-6


# ---- training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", ["none", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_learns(kind: str, checkpoint: str, tmp_path: Path) -> None:
    rows = rows_of(config(kind, tmp_path, "steps=30", "parallel.precision=bf16", f"parallel.checkpoint={checkpoint}"))
    losses = [row["loss"] for row in rows]
    assert len(losses) == 30 and all(map(math.isfinite, losses)) and not any(row["skipped"] for row in rows)
    assert statistics.mean(losses[-5:]) < 0.9 * statistics.mean(losses[:5])


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_equals_eager(kind: str, tmp_path: Path) -> None:
    overrides = ["steps=6", "lr=1e-4"]
    eager = rows_of(config(kind, tmp_path / "eager", *overrides))
    compiled = rows_of(config(kind, tmp_path / "compiled", *overrides, "parallel.compile=true"))
    for ours, theirs in zip(compiled, eager, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_bf16_runs(kind: str, tmp_path: Path) -> None:
    rows = rows_of(config(kind, tmp_path, "steps=6", "parallel.precision=bf16", "parallel.compile=true"))
    assert all(math.isfinite(row["loss"]) for row in rows) and rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bitwise(kind: str, precision: str, tmp_path: Path) -> None:
    # the learning rate must not depend on the number of steps
    overrides = ["deterministic=true", f"parallel.precision={precision}", "ema.decay=0.9"]
    overrides += ["schedule.name=constant", "schedule.warmup=0", "schedule.floor=0"]
    whole = config(kind, tmp_path / "whole", *overrides, "steps=8")
    rows = rows_of(whole)
    parts = tmp_path / "parts"
    rows_of(config(kind, parts, *overrides, "steps=4"))
    resumed = config(kind, parts, *overrides, "steps=8")
    resumed_rows = rows_of(resumed)
    assert len(rows) == 8
    for key in ("step", "loss", "grad_norm", "lr"):
        assert [row[key] for row in resumed_rows] == [row[key] for row in rows]
    for ema in (False, True):
        wanted = dict(load(whole.run_dir, ema=ema).model.named_parameters())
        for name, parameter in load(resumed.run_dir, ema=ema).model.named_parameters():
            assert torch.equal(parameter, wanted[name]), name


# ---- not waiting for the device ------------------------------------------------------------------------------------------

EVERY = 4


def refuse_waiting(monkeypatch: pytest.MonkeyPatch, every: int = EVERY) -> list[int]:
    """Make anything that waits for the device an error, in all steps but the first and those that log. Returns their numbers."""
    begun, watched = [], []
    agreed = Upcoming.agreed

    def begin(upcoming: Upcoming) -> Any:
        begun.append(len(begun) + 1)
        quiet = begun[-1] > 1 and begun[-1] % every != 0
        torch.cuda.set_sync_debug_mode("error" if quiet else "default")
        watched.extend(begun[-1:] if quiet else [])
        return agreed(upcoming)

    monkeypatch.setattr(Upcoming, "agreed", begin)
    return watched


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_does_not_wait(kind: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = refuse_waiting(monkeypatch)
    overrides = [f"steps={3 * EVERY}", f"log.every={EVERY}", f"parallel.precision={precision}", "ema.decay=0.9"]
    rows = rows_of(config(kind, tmp_path, *overrides))
    assert len(rows) == 3 * EVERY and watched == [2, 3, 5, 6, 7, 9, 10, 11]


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.checkpoint=none"],
        ["parallel.checkpoint=selective", "parallel.offload={smallest: 1}"],
        ["parallel.checkpoint=full", "parallel.offload={smallest: 1}"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_packed_documents_compiled_do_not_wait_between_lines(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 steps without a look at the device, over rows of several documents; and one graph for all of them."""
    watched = refuse_waiting(monkeypatch, 200)
    quick = ["steps=400", "log.every=200", "gc_every=1000", "parallel.precision=bf16", "parallel.compile=true", "ema.decay=0.9"]
    rows = rows_of(config("llm", tmp_path, *quick, *overrides))
    assert len(rows) == 400 and watched == [step for step in range(2, 400) if step != 200]
    told = [row for row in rows if "graphs" in row]
    assert [(row["graphs"], row["recompiles"]) for row in told] == [({"TransformerLayer": {"training": 1, "evaluation": 0}}, 0)]


def test_a_step_that_waits_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_waiting(monkeypatch)
    bad = Guard.bad
    monkeypatch.setattr(Guard, "bad", lambda guard, norm: bad(guard, norm * float(norm.isfinite().item())))
    with pytest.raises(RuntimeError, match="synchronizing"):
        rows_of(config("llm", tmp_path, f"steps={3 * EVERY}", f"log.every={EVERY}"))


# ---- what units keep -----------------------------------------------------------------------------------------------------

#: activations beside which weights are small
WIDE = ["layers=8", "dim=256", "mlp_dim=1024", "sequence=512", "batch.global=16", "batch.micro=16", "steps=6", "log.every=1"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpoint", ["none", "full", "selective"])
def test_offload_changes_no_bit_and_saves_memory(checkpoint: str, compiled: bool, tmp_path: Path) -> None:
    if checkpoint == "selective" and not compiled:
        pytest.skip("refused")
    peaks, found = [], []
    shared = ["deterministic=true", "parallel.precision=bf16", f"parallel.checkpoint={checkpoint}"]
    shared += [f"parallel.compile={compiled}"]
    for number, offload in enumerate(("null", "{smallest: 65536}")):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        rows = rows_of(config("llm", tmp_path / str(number), *WIDE, *shared, f"parallel.offload={offload}"))
        found.append([(row["loss"], row["grad_norm"]) for row in rows])
        peaks.append(torch.cuda.max_memory_allocated())
    assert found[0] == found[1]
    assert peaks[1] < {"none": 0.7, "selective": 0.9, "full": 1.0}[checkpoint] * peaks[0], peaks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_selective_checkpointing_knows_the_attention_of_the_device(dtype: torch.dtype, device: torch.device) -> None:
    from l3m_like.distributed.activations import apply_checkpointing, is_attention
    from tests.distributed.test_activations import Ran, Unit

    def forwards(mode: Any) -> int:
        unit = Unit().to(device, dtype)
        apply_checkpointing([unit], mode)
        x, table = (torch.randn(2, 64, 16, device=device, dtype=dtype, requires_grad=needs) for needs in (True, False))
        with Ran() as seen:
            unit(x, (table, table)).sum().backward()
        return sum(number for name, number in seen.counts.items() if is_attention(name))

    assert forwards("full") == 2 and forwards("selective") == forwards({"save": ["attention"]}) == 1


# ---- skipped steps -------------------------------------------------------------------------------------------------------


def test_a_bad_step_is_skipped_on_the_device(device: torch.device) -> None:
    torch.manual_seed(0)
    parameters = {"w": nn.Parameter(torch.randn(64, 32, device=device)), "b": nn.Parameter(torch.randn(32, device=device))}
    optimizer = AdamW(parameter_groups(parameters, lr=0.1, weight_decay=0.1), betas=(0.9, 0.95), eps=1e-8)
    ema, guard = EMA(parameters, 0.5), Guard(device, spike=None, window=4)

    def step(norm: float) -> Tensor:
        for parameter in parameters.values():
            parameter.grad = torch.full_like(parameter, norm)
        gradient_norm = torch.full((), norm, device=device)
        torch.cuda.set_sync_debug_mode("error")
        bad = guard.bad(gradient_norm)
        optimizer.step(found_inf=bad)
        ema.update(bad)
        torch.cuda.set_sync_debug_mode("default")
        return bad

    def state() -> list[Tensor]:
        tensors = [*parameters.values(), *optimizer.named_state().values(), *ema.average.values()]
        return [tensor.detach().clone() for tensor in tensors]

    assert float(step(1.0)) == 0.0
    before = state()
    for norm in (math.nan, math.inf):
        assert float(step(norm)) == 1.0
        assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert float(step(1.0)) == 0.0
    assert not any(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert int(guard.good) == 2


def test_averages_are_their_formula_without_a_wait(device: torch.device) -> None:
    torch.manual_seed(0)
    shapes = [(1024, 1152), (1152,), (48, 16), (3, 1001), (5,)]
    for precision, launches in ((torch.float32, 2), (torch.float64, 0)):
        parameters = {str(i): nn.Parameter(torch.randn(s, device=device, dtype=precision)) for i, s in enumerate(shapes)}
        ema, good = EMA(parameters, 0.9), torch.zeros((), device=device)
        wanted = {name: average.double() for name, average in ema.average.items()}
        for number in range(4):
            for name, parameter in parameters.items():
                if number == 2:  # other memory, as after resharding
                    parameter.data = parameter.data.clone()
                parameter.data.normal_()
                wanted[name] = wanted[name].lerp(parameter.detach().double(), 0.1)
            torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first one compiles
            try:
                ema.update(good)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert len(ema._tables) == launches
        for name, average in ema.average.items():
            torch.testing.assert_close(average.double(), wanted[name], rtol=1e-6, atol=1e-6)


# ---- the benchmark -------------------------------------------------------------------------------------------------------


def test_bench_adds_up(tmp_path: Path) -> None:
    result = bench(config("llm", tmp_path, "parallel.precision=bf16"), 6, warmup=2)
    assert len(result["all_seconds"]) == len(result["losses"]) == 6 and all(0 < s < 60 for s in result["all_seconds"])
    assert set(result["parts"]) == {"data", "forward", "backward", "optimizer", "other"}
    assert result["units"] == 16 * 128 and result["flops"] > 0 and result["memory"] > 0
    assert result["mfu"] is None or 0 < result["mfu"] < 1


@pytest.mark.parametrize("kind", KINDS)
def test_both_loops_of_the_bench_do_the_same(kind: str, tmp_path: Path) -> None:
    result = bench(config(kind, tmp_path, "lr=1e-4"), 12, warmup=1, overhead=True)
    assert result["losses"] == pytest.approx(result["plain_losses"], rel=1e-4)
    assert result["ratio"] > 0 and result["plain_seconds"] > 0
