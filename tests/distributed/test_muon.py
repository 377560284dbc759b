"""Muon: each step against a transcription of the published ones, and the same on every mesh.

``MUON`` runs orthogonalise in float64 (parallel.precision fp64), so that meshes agree to rounding.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from l3m_like.config.schema import Muon as MuonConfig
from l3m_like.core.errors import UserError
from tests.distributed import pool
from tests.distributed.recorder import Record, experiment, recorded, run_one, run_twice, world_size
from tests.distributed.test_gradients import PLAIN, nan_at_1, same_state
from tests.distributed.test_parity import MESHES, compare, one_gradient_halved, replicas_not_reduced
from tests.parity.rule import check_gradients

MUON = {"optim.name": "muon", "optim.muon": MuonConfig(), "optim.lr": 0.02, "optim.weight_decay": 0.1}
PER_HEAD = MUON | {"optim.muon": MuonConfig(per_head=True, scale="spectral", adamw_lr=0.01)}
SHAPES = {"square": (12, 12), "tall": (24, 8), "wide": (6, 30), "wide again": (6, 30), "heads": (12, 10)}


# ---- one step ------------------------------------------------------------------------------------------------------------


def orthogonal(u: Tensor) -> Tensor:
    """As published, in float64."""
    x = u.T if u.shape[0] > u.shape[1] else u
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if u.shape[0] > u.shape[1] else x


class Published:
    """Keller Jordan's Muon, and Moonlight's scale: one matrix, or parts of it apart."""

    def __init__(self, weight: Tensor, lr: float, decay: float, settings: MuonConfig, parts: int) -> None:
        self.weight, self.lr, self.decay, self.settings, self.parts = weight.clone(), lr, decay, settings, parts
        self.momentum = torch.zeros_like(weight)

    def step(self, gradient: Tensor) -> None:
        mu = self.settings.momentum
        if self.settings.scale == "rms":  # Moonlight
            self.momentum.mul_(mu).add_(gradient)
            update = gradient.add(self.momentum, alpha=mu)
        else:  # Keller Jordan: 1 - mu times as large, which does not change a direction
            self.momentum.lerp_(gradient, 1 - mu)
            update = gradient.lerp(self.momentum, mu)
        update = update if self.settings.nesterov else self.momentum
        made = []
        for part in update.chunk(self.parts):
            rows, cols = part.shape
            factor = 0.2 * max(rows, cols) ** 0.5 if self.settings.scale == "rms" else max(1, rows / cols) ** 0.5
            made.append(factor * orthogonal(part))
        self.weight.mul_(1 - self.lr * self.decay).add_(torch.cat(made), alpha=-self.lr)


def gradients_of(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def made(settings: MuonConfig, splits: dict[str, int], *, decay: float = 0.1, dtype: torch.dtype = torch.float64) -> Any:
    """The optimizer over matrices of ``SHAPES``, on this process alone, and its parameters."""
    from l3m_like.distributed.mesh import build_mesh
    from l3m_like.training.optim import Muon, parameter_groups

    parameters = {name: nn.Parameter(value.to(dtype)) for name, value in gradients_of(100).items()}
    groups = parameter_groups(
        parameters, lr=0.02, weight_decay=decay, groups={"slow": {"params": ["tall"], "lr_scale": 0.5}}, no_decay=["square"]
    )
    return Muon(groups, splits, settings, build_mesh({}), dtype), parameters


def against_published(settings: MuonConfig, scaled: bool) -> None:
    splits = {"heads": 3} if settings.per_head else {}
    optimizer, parameters = made(settings, splits)
    theirs = {
        name: Published(
            p.detach(),
            0.02 * (0.5 if name == "tall" else 1) * 0.7,
            0.0 if name == "square" else 0.1,
            settings,
            splits.get(name, 1),
        )
        for name, p in parameters.items()
    }
    optimizer.set_lr_scale(0.7)
    for step in range(3):
        for name, gradient in gradients_of(step).items():
            parameters[name].grad = gradient * (4 if scaled else 1)
            theirs[name].step(gradient)
        optimizer.step(torch.zeros(()), torch.tensor(4.0) if scaled else None)
        for name, parameter in parameters.items():
            # the 1e-7 that is added to a norm counts for more where the momentum is smaller
            bound = 1e-12 if settings.scale == "rms" else 1e-7
            torch.testing.assert_close(parameter.detach(), theirs[name].weight, rtol=bound, atol=bound, msg=name)
    smaller = 1.0 if settings.scale == "rms" else 1 - settings.momentum
    momentum = {name: theirs[name].momentum / smaller for name in parameters}
    for name, value in optimizer.named_state().items():
        torch.testing.assert_close(value, momentum[name.removesuffix(".momentum")])


@pytest.mark.parametrize(
    "settings",
    [
        MuonConfig(),
        MuonConfig(scale="spectral"),
        MuonConfig(nesterov=False, momentum=0.8),
        MuonConfig(per_head=True),
        MuonConfig(per_head=True, scale="spectral"),
    ],
    ids=str,
)
def test_equals_what_was_published(settings: MuonConfig) -> None:
    pool.run(1, against_published, settings, False)


def test_gradients_are_divided_by_the_clipping_factor() -> None:
    pool.run(1, against_published, MuonConfig(), True)


def against_torch(scale: str, theirs: str) -> None:
    """torch.optim.Muon orthogonalises in bfloat16, whose rounding is a few percent of an update."""
    optimizer, parameters = made(MuonConfig(scale=scale), {}, decay=0.0, dtype=torch.float32)
    copies = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items() if name != "tall"}  # of its own rate
    reference = torch.optim.Muon(copies.values(), lr=0.02, weight_decay=0.0, adjust_lr_fn=theirs)
    start = {name: p.detach().clone() for name, p in copies.items()}
    for step in range(3):
        for name, gradient in gradients_of(step).items():
            parameters[name].grad = gradient.float()
            if name in copies:
                copies[name].grad = gradient.float()
        optimizer.step(torch.zeros(()))
        reference.step()
    for name, value in copies.items():
        moved, expected = parameters[name].detach() - start[name], value.detach() - start[name]
        assert float((moved - expected).norm() / expected.norm()) < 0.04, name


@pytest.mark.parametrize(("scale", "theirs"), [("spectral", "original"), ("rms", "match_rms_adamw")])
def test_equals_torch(scale: str, theirs: str) -> None:
    pool.run(1, against_torch, scale, theirs)


def skipping() -> None:
    optimizer, parameters = made(MuonConfig(), {})
    for step, bad in enumerate((0.0, 1.0, 1.0, 0.0)):
        before = {name: value.clone() for name, value in (optimizer.named_state() | dict(parameters)).items()}
        for name, gradient in gradients_of(step).items():
            parameters[name].grad = gradient * (math.nan if bad else 1) if step != 2 else gradient / 0
        optimizer.step(torch.tensor(bad), torch.tensor(math.inf if bad else 2.0))
        for name, value in (optimizer.named_state() | dict(parameters)).items():
            assert value.isfinite().all() and torch.equal(value, before[name]) == bool(bad), name
        optimizer.zero_grad()
        assert all(p.grad is None for p in parameters.values())


def test_a_bad_step_changes_nothing() -> None:
    pool.run(1, skipping)


def without_a_gradient() -> None:
    optimizer, parameters = made(MuonConfig(), {}, decay=0.0)
    before = parameters["wide"].detach().clone()
    for name, gradient in gradients_of(0).items():
        parameters[name].grad = None if name == "wide" else gradient
    optimizer.step(torch.zeros(()))
    assert torch.equal(parameters["wide"], before) and not torch.equal(parameters["wide again"], gradients_of(100)["wide again"])


def test_a_matrix_without_a_gradient() -> None:
    pool.run(1, without_a_gradient)


# ---- on every mesh -------------------------------------------------------------------------------------------------------


@contextmanager
def small_buckets() -> Iterator[None]:
    """One matrix at a time, so that several exchanges are under way."""
    from l3m_like.training.optim import muon

    with mock.patch.object(muon, "_IN_WORK", 1):
        yield


def check(found: list[Record], reference: Record) -> None:
    """Gradients and losses of three steps, then weights and momentum."""
    compare(found, reference)
    for record in found:
        check_gradients(record.final, reference.final)
        momentum = {name: value for name, value in reference.state["main"].items() if name.endswith(".momentum")}
        assert len(momentum) == 14
        check_gradients({name: record.state["main"][name] for name in momentum}, momentum)


@functools.cache
def reference(name: str, per_head: bool = False) -> Record:
    return recorded(experiment(name, **(PER_HEAD if per_head else MUON)), 1)[0]


def on(name: str, mesh: str, fault: Any = None, *, per_head: bool = False) -> list[Record]:
    axes = MESHES[mesh]
    return recorded(experiment(name, **(PER_HEAD if per_head else MUON), **axes), world_size(axes), fault=fault)


@pytest.mark.parametrize("mesh", ["dp_shard 2", "hsdp 2x2", "tp 2", "dp_shard 2 x tp 2", "dp_replicate 2 x tp 2"])
def test_equals_one_process(mesh: str) -> None:
    check(on("llm", mesh, small_buckets), reference("llm"))


@pytest.mark.parametrize(("mesh", "fault"), [("dp_shard 2 x tp 2", None), ("hsdp 2x2", small_buckets)])
def test_per_head_equals_one_process(mesh: str, fault: Any) -> None:
    check(on("llm", mesh, fault, per_head=True), reference("llm", True))
    assert not torch.equal(reference("llm", True).final[K], reference("llm").final[K])


K = "trunk.layers.0.mixer.k_proj.weight"


def test_uneven_shards() -> None:
    """10 rows over 4 ranks are 3, 3, 3 and 1; 2 over 4 leave ranks without any."""
    size = {"model.trunk.layer.mlp.hidden_dim": 10, "model.trunk.layer.mixer.head_dim": 2, "model.trunk.rope.head_dim": 2}
    settings = MUON | size | {"model.trunk.layer.mixer.num_heads": 1, "model.trunk.layer.mixer.num_kv_heads": 1}
    one = recorded(experiment("llm", **settings), 1)[0]
    assert one.final[K].shape == (2, 16)
    found = recorded(experiment("llm", **settings, dp_shard=4), 4)
    for record in found:
        for name, value in one.final.items():
            torch.testing.assert_close(record.final[name], value, rtol=1e-8, atol=1e-9, msg=name)


@contextmanager
def in_bfloat16() -> Iterator[None]:
    """What an accelerator does in a bf16 run."""
    from l3m_like.training.optim import build

    with mock.patch.object(build, "muon_dtype", lambda *args: torch.bfloat16):
        yield


@pytest.mark.parametrize("mesh", ["dp_shard 2", "dp_replicate 2 x tp 2"])
def test_bfloat16_travels(mesh: str) -> None:
    """Each update is rounded; the movement of three steps is that of float64 to a percent or two."""
    exact = reference("llm")
    for record in on("llm", mesh, in_bfloat16):
        for name in (name.removesuffix(".momentum") for name in exact.state["main"] if name.endswith(".momentum")):
            moved, wanted = record.final[name] - exact.start[name], exact.final[name] - exact.start[name]
            assert 0 < float((moved - wanted).norm() / wanted.norm()) < 0.03, name


@contextmanager
def shards_orthogonalised() -> Iterator[None]:
    """Each half of the rows apart, as if every rank took its own shard for the matrix."""
    from l3m_like.kernels.newton_schulz import newton_schulz
    from l3m_like.training.optim.muon import Muon

    def broken(self: Any, stack: Tensor, split: int) -> Tensor:
        return newton_schulz(stack.unflatten(1, (2, -1)).flatten(0, 1)).view(stack.shape)

    with mock.patch.object(Muon, "_orthogonal", broken):
        yield


@contextmanager
def sent_to_one_replica() -> Iterator[None]:
    """The ranks 2 and 3 get zeros."""
    from l3m_like.distributed.owners import Bucket

    scatter = Bucket.scatter

    def broken(self: Any, stacks: Any, like: Tensor) -> Any:
        arriving = scatter(self, stacks, like)
        received = arriving.wait()
        if torch.distributed.get_rank() > 1:
            received.zero_()
        return arriving

    with mock.patch.object(Bucket, "scatter", broken):
        yield


@contextmanager
def rows_in_another_order() -> Iterator[None]:
    """FSDP over tensor parallelism cuts what tensor parallelism has cut; here the other way round. Only heads show it: the
    iteration treats all orders of the rows alike."""
    from l3m_like.distributed import owners

    region = owners._region

    def broken(parameter: Tensor, place: dict[str, int]) -> Any:
        return region(parameter, place | {"tp": place["dp_shard"], "dp_shard": place["tp"]})

    with mock.patch.object(owners, "_region", broken):
        yield


@pytest.mark.parametrize(
    ("mesh", "fault"),
    [
        ("dp_shard 2", shards_orthogonalised),
        ("hsdp 2x2", sent_to_one_replica),
        ("hsdp 2x2", replicas_not_reduced),
        ("dp_shard 2", one_gradient_halved),
    ],
)
def test_a_planted_fault_is_found(mesh: str, fault: Any) -> None:
    with pytest.raises(AssertionError, match="against"):
        check(on("llm", mesh, fault), reference("llm"))


def test_heads_in_another_order_are_found() -> None:
    with pytest.raises(AssertionError, match="against"):
        check(on("llm", "dp_shard 2 x tp 2", rows_in_another_order, per_head=True), reference("llm", True))


def counted(cfg: Any) -> dict[str, Any]:
    """What Muon's steps receive on this rank, in elements, beside the sizes of matrices and shards."""
    import torch.distributed as dist

    from l3m_like.training.optim.muon import Muon
    from l3m_like.training.updates import Update

    received: list[int] = []
    optimizers: list[Any] = []
    exchange, step, prepare = dist.all_to_all_single, Muon.step, Update.prepare

    def counting(output: Tensor, sent: Tensor, *args: Any, **kwargs: Any) -> Any:
        received.append(output.numel())
        return exchange(output, sent, *args, **kwargs)

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("another collective")

    def watched(self: Any, *args: Any) -> None:
        others = ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast", "reduce_scatter_tensor", "all_gather_object")
        with mock.patch.multiple(dist, all_to_all_single=counting, **dict.fromkeys(others, forbidden)):
            step(self, *args)

    def remembered(self: Any, *args: Any) -> None:
        prepare(self, *args)
        optimizers.append(self.optimizer.both[0])

    with mock.patch.object(Muon, "step", watched), mock.patch.object(Update, "prepare", remembered):
        run_one(cfg)
    buckets = optimizers[0].buckets
    return {
        "received": sum(received),
        "owned": sum(m.parameter.numel() for bucket in buckets for m in bucket.owned),
        "shards": sum(bucket.numel for bucket in buckets),
        "all": sum(m.parameter.numel() for bucket in buckets for m in bucket.matrices),
    }


@pytest.mark.parametrize("mesh", ["dp_shard 4", "hsdp 2x2", "dp_shard 2 x tp 2"])
def test_no_rank_gathers_every_matrix(mesh: str, tmp_path: Path) -> None:
    cfg = experiment("llm", **MUON, **MESHES[mesh], steps=1)
    cfg.run.dir = str(tmp_path)
    ranks = pool.run(4, counted, cfg)
    everything = ranks[0]["all"]
    assert sum(rank["owned"] for rank in ranks) == everything
    for rank in ranks:
        assert rank["received"] == rank["owned"] + rank["shards"]
        assert rank["owned"] <= 0.4 * everything
        assert rank["shards"] == everything // (2 if mesh == "hsdp 2x2" else 4)


def test_matrices_are_shared_out_evenly() -> None:
    from l3m_like.distributed.owners import Matrix, share_out

    shapes = [(6, 2)] * 84 + [(2, 2)] * 56 + [(1, 2)] * 56
    matrices = [Matrix(str(i), nn.Parameter(torch.empty(shape)), 1) for i, shape in enumerate(shapes)]

    def cost(matrix: Matrix) -> int:
        return matrix.parameter.numel()

    given = share_out(matrices, 8, cost)
    load = [sum(cost(m) for m in given if m.owner == rank) for rank in range(8)]
    assert sum(load) == sum(map(cost, matrices)) and max(load) <= 1.01 * min(load)
    assert [m.owner for m in given] == sorted(m.owner for m in given)
    assert sorted(m.name for m in given) == sorted(m.name for m in matrices)


# ---- steps that are skipped, checkpoints ---------------------------------------------------------------------------------

#: a run goes on only with the same configuration, defaults written out
RESUMED = {"data.sets.train.source": {"_target_": "tests.distributed.toys.Texts", "samples": 97}}


@pytest.mark.parametrize("axes", [{}, {"dp_shard": 2}, {"dp_replicate": 2, "dp_shard": 2}], ids=str)
def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(axes: dict[str, Any]) -> None:
    settings = MUON | PLAIN | axes
    before = recorded(experiment("llm", **settings, steps=1), world_size(axes))[0]
    found = recorded(experiment("llm", **settings, steps=2), world_size(axes), fault=nan_at_1)
    same_state(found, before)
    assert found[0].column("skipped") == [0, 1]


@pytest.mark.parametrize("axes", [{}, pytest.param({"dp_shard": 2}, marks=pytest.mark.slow), {"dp_shard": 2, "tp": 2}], ids=str)
def test_resuming_changes_no_bit(axes: dict[str, Any]) -> None:
    settings = MUON | PLAIN | RESUMED | axes
    uninterrupted = recorded(experiment("llm", **settings), world_size(axes))[0]
    same_state(recorded(experiment("llm", **settings), world_size(axes), task=run_twice), uninterrupted)


def saving(cfg: Any) -> Record:
    return run_one(cfg, saves=True)


@pytest.mark.parametrize(("first", "then"), [({}, {"dp_shard": 2}), ({"dp_shard": 2}, {}), ({"tp": 2}, {"dp_shard": 2})], ids=str)
def test_a_checkpoint_moves_to_another_mesh(first: dict[str, Any], then: dict[str, Any], tmp_path: Path) -> None:
    settings = MUON | PLAIN | RESUMED
    for axes, steps in ((first, 2), (then, 3)):
        cfg = experiment("llm", **settings, **axes, steps=steps)
        cfg.run.dir = str(tmp_path)
        records = pool.run(world_size(axes), saving, cfg)
    uninterrupted = recorded(experiment("llm", **settings), 1)[0]
    for record in records:
        for pieces, whole in ((record.final, uninterrupted.final), (record.state["main"], uninterrupted.state["main"])):
            assert set(pieces) == set(whole)
            for name, piece in pieces.items():
                mine = torch.full(piece.shape, math.nan, dtype=piece.local.dtype)
                piece.write(mine)
                held = ~mine.isnan()
                torch.testing.assert_close(mine[held], whole[name][held], rtol=1e-8, atol=1e-10, msg=name)


def test_it_trains() -> None:
    losses = reference("llm").column("loss")
    assert losses[0] > losses[1] > losses[2]


# ---- what goes where -----------------------------------------------------------------------------------------------------


@functools.cache
def planned(name: str) -> tuple[Any, dict[str, nn.Parameter]]:
    from l3m_like.training.train import plan

    run = plan(experiment(name), 1)
    return run.parts, dict(run.model.named_parameters())


def routed(name: str, **settings: Any) -> dict[str, tuple[str, str, int]]:
    from l3m_like.training.optim import routes

    parts, parameters = planned(name)
    return {route.name: (route.to, route.why, route.split) for route in routes(parameters, parts, MuonConfig(**settings))}


def test_routes() -> None:
    llm, sit = routed("llm"), routed("sit")
    assert {name.split("layers.0.")[-1] for name, route in llm.items() if route[0] == "muon" and ".1." not in name} == {
        *(f"mixer.{name}_proj.weight" for name in ("q", "k", "v", "out")),
        *(f"mlp.{name}.weight" for name in ("gate", "up", "down")),
    }
    assert llm["preprocessor.embed.weight"] == ("adamw", "says TokenEmbedding", 1)  # the tied head's as well
    inputs = ("modulation.proj.weight", "label.weight", "time.up.weight", "time.down.weight")
    assert {name for name, route in sit.items() if route[1].startswith("says")} == {
        *(name for name in sit if name.endswith(inputs)),
        "head.proj.weight",
        "preprocessor.patches.projection.proj.weight",
    }
    heads = routed("llm", per_head=True)
    assert heads["trunk.layers.1.mixer.q_proj.weight"][2] == 4 and heads[K][2] == 2
    assert heads["trunk.layers.1.mixer.out_proj.weight"][2] == 1
    changed = routed("sit", include=["trunk.*.modulation.proj.weight"], exclude=["trunk.layers.0.mlp.*.weight"])
    assert changed["trunk.layers.0.modulation.proj.weight"][:2] == ("muon", "optim.muon.include")
    assert changed["trunk.layers.0.mlp.up.weight"][:2] == ("adamw", "optim.muon.exclude")
    assert changed["trunk.layers.1.mlp.up.weight"][0] == "muon"


def test_the_listing_groups_what_is_alike() -> None:
    from l3m_like.training.optim import listing, routes
    from l3m_like.training.optim.routing import ranges

    parts, parameters = planned("llm")
    some = routes(parameters, parts, MuonConfig(per_head=True))
    rows = listing(some, {route.name: number % 3 for number, route in enumerate(some)})
    assert sum(int(row[3]) for row in rows) == len(parameters)
    q = next(row for row in rows if "q_proj.weight" in row[1])
    assert q[:5] == ("muon", "trunk.layers.{0-1}.mixer.q_proj.weight", "32 x 16 in 4 parts", "2", "hidden matrix")
    assert q[5].startswith("rank ") and ("adamw", "head.norm.weight", "16", "1", "no matrix", "") in rows
    assert [ranges(n) for n in ([3], [2, 0, 1], [0, 2, 3, 9])] == ["3", "{0-2}", "{0,2-3,9}"]


def test_the_listing_is_printed_once(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from l3m_like.training.train import train

    cfg = experiment("llm", **MUON, steps=1)
    cfg.run.dir = str(tmp_path)
    train(cfg)
    assert capfd.readouterr().out.count("trunk.layers.{0-1}.mlp.gate.weight") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"include": ["nope"]}, "optim.muon.include: the pattern 'nope' matches no parameter"),
        ({"exclude": ["trunk.*.q_prj.weight"]}, "optim.muon.exclude: .* Did you mean"),
        ({"include": ["trunk.*"], "exclude": ["*.q_proj.weight"]}, "'trunk.layers.0.mixer.q_proj.weight' is in include and in"),
        ({"include": ["trunk.layers.0.norm_1.weight"]}, r"'trunk.layers.0.norm_1.weight' has shape \(16,\)"),
        ({"exclude": ["*"]}, "none of these parameters is a hidden matrix"),
    ],
)
def test_bad_patterns(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        routed("llm", **settings)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"q_proj.wieght": "adamw"}, "names 'q_proj.wieght', which is not one of its parameters"),
        ({"q_proj.weight": "sgd"}, "optim_spec of Attention says 'sgd' of"),
        ({"q_proj.weight": 5}, r"says 5 of .*\(32, 16\); .*divides its rows"),
    ],
)
def test_bad_declarations(said: dict[str, Any], message: str) -> None:
    from l3m_like.layers import Attention

    with mock.patch.object(Attention, "optim_spec", lambda self: said), pytest.raises(UserError, match=message):
        routed("llm")


def test_bad_settings() -> None:
    from l3m_like.config.schema import Optim
    from l3m_like.config.strict import build

    assert build(Optim, {"lr": 1, "name": "muon"}, "optim").muon == MuonConfig()
    assert build(Optim, {"lr": 1}, "optim").muon is None
    for given, message in (
        ({"muon": {}}, "optim.muon: optim.name is adamw, so nothing would read it"),
        ({"name": "muon", "muon": {"momentum": 1}}, "optim.muon.momentum = 1.0: it must be below 1"),
        ({"name": "muon", "muon": {"scale": "rsm"}}, "Did you mean 'rms'"),
        ({"name": "muon", "muon": {"steps": 0}}, "at least 1"),
        ({"name": "moun"}, "Did you mean 'muon'"),
    ):
        with pytest.raises(UserError, match=message):
            build(Optim, {"lr": 1} | given, "optim")


def test_adamw_has_a_rate_of_its_own() -> None:
    from l3m_like.training.optim import muon_groups, routes

    parts, parameters = planned("llm")
    optim = copy.deepcopy(experiment("llm", **PER_HEAD).optim)
    optim.groups = {"first": {"params": ["trunk.layers.0.*"], "lr_scale": 0.5}}
    matrices, rest = muon_groups(parameters, routes(parameters, parts, optim.muon), optim)
    assert {group["peak_lr"] for group in matrices} == {0.02, 0.01} and {group["peak_lr"] for group in rest} == {0.01, 0.005}
    names = [name for group in (*matrices, *rest) for name in group["names"]]
    assert sorted(names) == sorted(parameters)
    assert {group["weight_decay"] for group in matrices} == {0.1}
