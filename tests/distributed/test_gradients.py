"""Norms, clipping, skipped steps and averages over the whole mesh."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from l3m_like.core.errors import UserError
from l3m_like.training.optim import EMA, AdamW, Guard, parameter_groups
from l3m_like.training.record import watch_bad_steps
from tests.distributed import pool
from tests.distributed.recorder import Record, experiment, recorded, trained, world_size

BOTH = {"dp_shard": 2, "tp": 2}
MESHES: list[Any] = [{}, {"dp_shard": 2}, {"tp": 2}, pytest.param(BOTH, marks=pytest.mark.slow)]


# ---- the norm ------------------------------------------------------------------------------------------------------------


def mixed() -> list[float]:
    """Gradients of every kind that a mesh of dp_shard 2 x tp 2 holds, and of another mesh besides."""
    from l3m_like.distributed.gradients import gradient_norm
    from l3m_like.distributed.mesh import build_mesh

    mesh = build_mesh({"dp_shard": 2, "tp": 2})
    plane, dp, tp = mesh.device_mesh["dp_shard", "tp"], mesh["dp_shard"], mesh["tp"]
    generator = torch.Generator().manual_seed(0)
    full = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in [(5, 3), (4, 4), (7,), (2, 6), (3, 5), (1, 2), (6,)]
    ]
    kinds: list[Any] = [
        (plane, [Shard(0), Shard(1)]),
        (plane, [Shard(0), Shard(0)]),
        (plane, [Shard(0), Replicate()]),
        (tp, [Shard(1)]),
        (dp, [Shard(0)]),  # 3 rows over 2 ranks
        (dp, [Shard(0)]),  # 1 row: one rank has none
        None,
    ]
    gradients = [g if kind is None else _place(g, *kind) for g, kind in zip(full, kinds, strict=True)]
    norm = gradient_norm(gradients)
    assert norm.dtype == torch.float64
    expected = torch.cat([g.flatten() for g in full]).norm()
    half = [gradient * 0.5 for gradient in gradients]
    with pytest.raises(RuntimeError, match="partial sum"):
        gradient_norm([DTensor.from_local(full[0], dp, [Partial()])])
    with pytest.raises(RuntimeError, match="no gradients"):
        gradient_norm([])
    # a norm that forgets that replicas are copies
    wrong = torch.stack([(g.to_local() if isinstance(g, DTensor) else g).square().sum() for g in half]).sum()
    torch.distributed.all_reduce(wrong)
    return [float(norm), float(expected), float(gradient_norm(half)), float(wrong.sqrt())]


def _place(full: Tensor, mesh: Any, placements: Any) -> DTensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.clone(), mesh, placements, src_data_rank=None)


def test_norm_of_gradients_in_several_dtypes() -> None:
    """One call for those of a dtype: torch is fast on lists of one."""
    from l3m_like.distributed import gradients

    generator = torch.Generator().manual_seed(0)
    kinds = (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32)
    mixture = [torch.randn(5, 3, generator=generator).to(dtype) for dtype in kinds]
    with mock.patch.object(torch, "_foreach_norm", wraps=torch._foreach_norm) as called:
        norm = gradients.gradient_norm(mixture)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), torch.cat([g.double().flatten() for g in mixture]).norm(), rtol=1e-6, atol=0)
    assert [{g.dtype for g in call.args[0]} for call in called.call_args_list] == [{torch.bfloat16}, {torch.float32}]


def test_norm_over_mixed_placements() -> None:
    for norm, expected, half, wrong in pool.run(4, mixed):
        assert norm == pytest.approx(expected, rel=1e-13)
        assert half == pytest.approx(expected / 2, rel=1e-13)
        assert wrong != pytest.approx(half, rel=1e-3)


@pytest.mark.parametrize("settings", [*MESHES[:3], BOTH], ids=str)
def test_logged_norm_and_clipping(settings: dict[str, Any]) -> None:
    """The logged norm is that of the whole gradients; the optimizer gets them scaled to the limit, or as they are."""
    for record in trained("llm", **settings):
        for gradients, stepped in zip(record.gradients, record.stepped, strict=True):
            norm = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
            assert norm > 0.1 and stepped == pytest.approx(0.1, rel=1e-4)  # optim.clip; + 1e-6 in its denominator
    first = trained("llm", **settings)[0]
    norms = [float(torch.cat([g.flatten() for g in gradients.values()]).norm()) for gradients in first.gradients]
    assert first.column("grad_norm") == pytest.approx(norms, rel=1e-9)


@pytest.mark.parametrize(("settings", "clip"), [({}, None), ({"tp": 2}, 1e4)], ids=str)
def test_without_clipping(settings: dict[str, Any], clip: float | None) -> None:
    settings = settings | {"optim.clip": clip, "steps": 1}
    for record in trained("llm", **settings):
        norm = float(torch.cat([g.flatten() for g in record.gradients[0].values()]).norm())
        assert record.stepped == pytest.approx([norm], rel=1e-12)


# ---- steps that are skipped ----------------------------------------------------------------------------------------------


@contextmanager
def spoiled(value: float, at: int) -> Iterator[None]:
    """In step ``at``, on the last rank alone, one element of one gradient becomes ``value``."""
    from l3m_like.distributed.gradients import local
    from l3m_like.training.updates import Update

    step, done = Update.step, []

    def broken(self: Any, mesh: Any, scale: float) -> Any:
        if len(done) == at and mesh.rank == mesh.world_size - 1:
            local(next(iter(self.parameters.values())).grad).view(-1)[0] = value
        done.append(True)
        return step(self, mesh, scale)

    with mock.patch.object(Update, "step", broken):
        yield


def nan_at_1() -> Any:
    return spoiled(math.nan, 1)


def infinity_at_1() -> Any:
    return spoiled(math.inf, 1)


def spike_at_2() -> Any:
    return spoiled(1e6, 2)


PLAIN = {"schedule.name": "constant", "schedule.floor": 0.0}


def same_state(found: list[Record], reference: Record) -> None:
    for record in found:
        for ours, theirs in (
            (record.final, reference.final),
            (record.average, reference.average),
            (record.state["main"], reference.state["main"]),
        ):
            assert set(ours) == set(theirs)
            for name, value in theirs.items():
                assert torch.equal(ours[name], value), name


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        *(({"dp_shard": 2}, nan_at_1), ({"tp": 2}, infinity_at_1)),
        *(pytest.param(a, nan_at_1, marks=pytest.mark.slow) for a in ({}, BOTH, {"dp_replicate": 2, "dp_shard": 2}, {"tp": 2})),
    ],
)
def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(settings: dict[str, Any], fault: Any) -> None:
    """Weights, averages, moments and step counts are those of the run that ends one step earlier, bit by bit."""
    before = trained("sit", **settings, **PLAIN, steps=1)[0]
    found = recorded(experiment("sit", **settings, **PLAIN, steps=2), world_size(settings), fault=fault)
    same_state(found, before)
    assert found[0].column("skipped") == [0, 1]
    assert not math.isfinite(found[0].column("grad_norm")[1])
    assert {float(v) for name, v in found[0].state["main"].items() if name.endswith(".step")} == {1.0}


def test_a_spike_skips_the_step_and_training_goes_on() -> None:
    settings = {"dp_shard": 2, "guard.spike_factor": 10.0, "guard.window": 2, **PLAIN}
    before = trained("sit", **settings, steps=2)[0]
    same_state(recorded(experiment("sit", **settings, steps=3), 2, fault=spike_at_2), before)
    longer = recorded(experiment("sit", **settings, steps=5), 2, fault=spike_at_2)
    assert longer[0].column("skipped") == [0, 0, 1, 0, 0]
    assert not torch.equal(longer[0].final["head.proj.bias"], before.final["head.proj.bias"])
    assert {float(v) for name, v in longer[0].state["main"].items() if name.endswith(".step")} == {4.0}


def test_guard() -> None:
    """A norm is a spike against the median of the last good ones, once the window is full; bad ones do not enter it."""
    guard = Guard(torch.device("cpu"), spike=3.0, window=3)
    verdicts = [float(guard.bad(torch.tensor(norm))) for norm in (1.0, 100.0, 2.0, 6.1, 5.9, math.nan, 7.0, 18.0, -math.inf, 2.0)]
    # windows: - - - [1, 100, 2]: 6 -> 6.1 bad; 5.9 good; nan; [5.9, 100, 2]: 7.0 good; [5.9, 7, 2]: 18 > 17.7 bad
    assert verdicts == [0, 0, 0, 1, 0, 1, 0, 1, 1, 0]
    assert sorted(guard.named_state()["norms"].tolist()) == pytest.approx([2.0, 5.9, 7.0]) and int(guard.good) == 6
    only_finite = Guard(torch.device("cpu"), spike=None, window=2)
    assert [float(only_finite.bad(torch.tensor(norm))) for norm in (1.0, 1.0, 1e30, math.nan)] == [0, 0, 0, 1]


def test_too_many_bad_steps_end_the_run() -> None:
    rows = [{"step": step, "skipped": skipped, "grad_norm": math.nan} for step, skipped in enumerate([1, 0, 1, 1, 0, 1], start=1)]
    assert watch_bad_steps(rows, 0, 3) == 1
    assert watch_bad_steps(rows[:1], 1, 3) == 2
    with pytest.raises(UserError, match=r"step 4: .*not finite.*3 steps in a row.*guard.max_bad_steps"):
        watch_bad_steps(rows[2:4], 1, 3)


# ---- averages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", MESHES, ids=str)
def test_ema_is_its_formula(settings: dict[str, Any]) -> None:
    for record in trained("sit", **settings, **{"ema.decay": 0.7}):
        assert len(record.trail) == 3
        for name, average in record.start.items():
            for weights in record.trail:
                average = average + (1 - 0.7) * (weights[name] - average)
            torch.testing.assert_close(record.average[name], average, rtol=1e-13, atol=1e-15)
            assert not torch.equal(record.average[name], record.final[name])


def test_ema_is_wide_and_can_be_swapped_in() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    ema = EMA({"p": p}, decay=0.9999)
    assert ema.average["p"].dtype == torch.float32
    with torch.no_grad():
        p.fill_(3.0)
    for _ in range(100):
        ema.update()
    expected = 3 + (torch.tensor([1.0, 2.0]) - 3) * 0.9999**100  # in bf16 it would not have moved
    torch.testing.assert_close(ema.average["p"], expected, rtol=1e-5, atol=0)
    ema.update(torch.ones(()))
    torch.testing.assert_close(ema.average["p"], expected, rtol=1e-5, atol=0)
    kept = ema.average["p"].clone()
    ema.swap()
    assert (
        p.dtype == torch.bfloat16
        and torch.equal(p.detach(), kept.bfloat16())
        and torch.equal(ema.average["p"], torch.full((2,), 3.0))
    )
    ema.swap()
    assert torch.equal(p.detach(), torch.full((2,), 3.0, dtype=torch.bfloat16))


# ---- the optimizer -------------------------------------------------------------------------------------------------------


def test_state_exists_from_construction_and_found_inf_leaves_it_alone() -> None:
    model = nn.Linear(3, 2)
    groups = parameter_groups(dict(model.named_parameters()), lr=0.1, weight_decay=0.5)
    optimizer = AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    names = {f"{p}.{s}" for p in ("weight", "bias") for s in ("step", "exp_avg", "exp_avg_sq")}
    assert set(optimizer.named_state()) == names and not any(value.any() for value in optimizer.named_state().values())
    reference = torch.optim.AdamW(
        [
            {"params": [nn.Parameter(p.detach().clone())], "weight_decay": d}
            for p, d in zip(model.parameters(), (0.5, 0.0), strict=True)
        ],
        lr=0.1,
        betas=(0.9, 0.95),
    )
    for number, bad in enumerate([0.0, 1.0, 0.0]):
        theirs = [group["params"][0] for group in reference.param_groups]
        for p, q in zip(model.parameters(), theirs, strict=True):
            p.grad = torch.full_like(p, number + 1.0 if not bad else math.nan)
            q.grad = torch.full_like(q, number + 1.0)
        before = {name: value.clone() for name, value in optimizer.named_state().items()}
        weights = [p.detach().clone() for p in model.parameters()]
        optimizer.step(found_inf=torch.tensor(bad))
        if bad:
            assert all(torch.equal(value, before[name]) for name, value in optimizer.named_state().items())
            assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
        else:
            reference.step()
            for p, q in zip(model.parameters(), theirs, strict=True):
                torch.testing.assert_close(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 3.7])
def test_adamw_divides_gradients(dtype: torch.dtype, scale: float) -> None:
    """As if they had been divided before; a first step hides it (its size is the learning rate), so there are three."""
    torch.manual_seed(0)
    made = []
    for _ in range(2):
        parameters = {"w": nn.Parameter(torch.ones(4, 3, dtype=dtype)), "b": nn.Parameter(torch.ones(3, dtype=dtype))}
        made.append((AdamW(parameter_groups(parameters, lr=0.1, weight_decay=0.5), betas=(0.9, 0.95), eps=1e-3), parameters))
    divisor = torch.tensor(scale, dtype=dtype)
    for number in range(3):
        for name in ("w", "b"):
            gradient = torch.randn(made[0][1][name].shape, dtype=dtype) * 10**number
            made[0][1][name].grad = gradient.clone()
            made[1][1][name].grad = gradient / divisor
        made[0][0].step(torch.zeros(()), divisor)
        made[1][0].step(torch.zeros(()), None)
    for ours, theirs in zip(*(optimizer.named_state().values() for optimizer, _ in made), strict=True):
        torch.testing.assert_close(ours, theirs)
    for name in ("w", "b"):
        torch.testing.assert_close(made[0][1][name], made[1][1][name])


def test_parameter_groups() -> None:
    parameters = {
        name: nn.Parameter(torch.zeros(shape))
        for name, shape in {"a.weight": (2, 2), "a.bias": (2,), "b.weight": (2, 2), "c": (2, 2)}.items()
    }

    def made(**settings: Any) -> dict[str, tuple[float, float]]:
        groups = parameter_groups(parameters, lr=1.0, weight_decay=0.1, **settings)
        return {name: (group["peak_lr"], group["weight_decay"]) for group in groups for name in group["names"]}

    assert made() == {"a.weight": (1.0, 0.1), "a.bias": (1.0, 0.0), "b.weight": (1.0, 0.1), "c": (1.0, 0.1)}
    assert made(no_decay=["b.*"])["b.weight"] == (1.0, 0.0)
    assert made(groups={"slow": {"params": ["a.*"], "lr_scale": 0.5}})["a.bias"] == (0.5, 0.0)
    assert made(groups={"slow": {"params": ["a.*"], "weight_decay": 0.3}})["a.bias"] == (1.0, 0.3)
    with pytest.raises(
        UserError, match="optim.groups.slow.params: the pattern 'a.weigth' matches no parameter. Did you mean 'a.weight'"
    ):
        made(groups={"slow": {"params": ["a.weigth"]}})
    with pytest.raises(UserError, match="'a.bias' is in both 'slow' and 'fast'"):
        made(groups={"slow": {"params": ["a.*"]}, "fast": {"params": ["*.bias"]}})
    with pytest.raises(UserError, match="optim.no_decay"):
        made(no_decay=["nope"])
