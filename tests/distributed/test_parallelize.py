"""parallelize: names stay, plans are complete, frozen parts are sharded in their own dtype."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l3m_like.core import Frozen, MetaModel, ReadWriteBlock, UserError, Wrap
from l3m_like.distributed.parallelize import parallelize
from l3m_like.losses import Loss
from tests.distributed import pool
from tests.distributed.recorder import experiment, recorded, toy
from tests.distributed.toys import VECTORS
from tests.parity.rule import check_gradients

MODES: list[dict[str, Any]] = [
    *({"checkpointing": mode} for mode in ("none", "full", "selective", 2)),
    {"compile_units": True},
    {"precision": "bf16"},
    {"precision": "fp64", "checkpointing": "full", "compile_units": True, "reshard_after_forward": False},
]


# ---- names ---------------------------------------------------------------------------------------------------------------


def names_and_ties(name: str, axes: dict[str, int]) -> list[tuple[list[str], bool]]:
    """Before, and after each mode; and whether what is tied still is."""
    from l3m_like.distributed.mesh import build_mesh
    from l3m_like.distributed.parallelize import parallelize
    from l3m_like.training.init import init_specs, initialize, materialize

    cfg = experiment(name)
    with torch.device("meta"):
        made = cfg.instantiate("model")
    found = [([*dict(made.named_parameters())], True)]
    for mode in MODES:
        with torch.device("meta"):
            part = cfg.instantiate("model")
        specs = init_specs(part)
        parallelize(part, build_mesh(axes), **mode)
        materialize(part, torch.device("cpu"))
        initialize(part, 0, "", specs)
        tied = all(part.get_parameter(a) is part.get_parameter(b) for a, b in part.tie.items())
        found.append(([*dict(part.named_parameters())], tied))
    return found


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        *(("llm", {}), ("sit", {"tp": 2}), ("llm", {"dp_shard": 2})),
        *(pytest.param(name, {"dp_shard": 2, "tp": 2}, marks=pytest.mark.slow) for name in ("llm", "sit")),
    ],
)
def test_no_parameter_changes_its_name(name: str, axes: dict[str, int]) -> None:
    ranks = 1
    for size in axes.values():
        ranks *= size
    for before, *after in pool.run(ranks, names_and_ties, name, axes):
        assert len(before[0]) > 20
        for mode, (names, tied) in zip(MODES, after, strict=True):
            assert names == before[0], mode
            assert tied, mode


def may_copy_keys(axes: dict[str, int]) -> set[bool]:
    """What the layers say outside of their units."""
    from l3m_like.distributed.mesh import build_mesh

    with torch.device("meta"):
        part = experiment("llm").instantiate("model")
    parallelize(part, build_mesh(axes))
    return {layer.mixer.may_copy_keys for layer in part.trunk.layers}


@pytest.mark.parametrize(("axes", "may"), [({"dp_shard": 2}, True), ({"tp": 2}, False)])
def test_which_layers_copy_keys(axes: dict[str, int], may: bool) -> None:
    """FSDP gathers the projections for a unit; tensor parallelism leaves them cut."""
    assert pool.run(2, may_copy_keys, axes) == [{may}, {may}]


def test_a_tie_between_units_is_refused() -> None:
    """FSDP holds a unit's parameters by themselves, so none of them may be another's as well."""
    several = SimpleNamespace(world_size=2, size=lambda axis: 1)
    for tie, words in (
        ({"trunk.layers.1.mlp.up.weight": "trunk.layers.0.mlp.up.weight"}, "trunk.layers.0 and trunk.layers.1"),
        ({"trunk.layers.1.norm_1.weight": "head.norm.weight"}, "trunk.layers.1 and the rest of the model"),
    ):
        model = experiment("llm").instantiate("model")
        model.tie |= tie
        model.retie()
        with pytest.raises(UserError, match=f"tie: .*{words}.* one process"):
            parallelize(model, several)  # type: ignore[arg-type]


# ---- tensor-parallel plans -----------------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """Two projections and a scale, with a plan that a test may spoil."""

    def __init__(self, plan: dict[str, str], width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(4, width, bias=False)
        self.down = nn.Linear(width, 4)
        self.scale = nn.Parameter(torch.ones(1))
        self.plan = plan

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x))) * self.scale

    def tp_plan(self) -> dict[str, str]:
        return self.plan


class Stack(ReadWriteBlock):
    outputs = ("hidden",)

    def __init__(self, plan: dict[str, str], width: int = 8, **ports: Any) -> None:
        super().__init__(**ports)
        self.layers = nn.ModuleList([Mixer(plan, width)])

    def compute(self, tokens: Tensor) -> Tensor:
        return self.layers[0](tokens)

    def shard_units(self) -> Any:
        return self.layers


PLAN = {"up": "colwise", "down": "rowwise", "down.bias": "replicated", "scale": "replicated"}


def apply_plan(plan: dict[str, str], width: int) -> str:
    from l3m_like.distributed.mesh import build_mesh
    from l3m_like.distributed.parallelize import parallelize

    try:
        parallelize(MetaModel(trunk=Stack(plan, width, stream="text")), build_mesh({"tp": 2}))
    except UserError as error:
        return str(error)
    return "fine"


@pytest.mark.parametrize(
    ("change", "width", "message"),
    [
        ({}, 8, "fine"),
        ({"up": "columnwise"}, 8, "'columnwise' is not a style. Did you mean 'colwise'?"),
        ({"scael": "replicated"}, 8, "tp_plan of trunk.layers.0 names 'scael', which it does not have. Did you mean 'scale'?"),
        ({"down.bais": "replicated"}, 8, "names 'down.bais', which it does not have. Did you mean 'down.bias'?"),
        ({"scale": None}, 8, "trunk.layers.0.scale (of trunk.layers.0) is in no tp_plan. Name every parameter of the unit"),
        ({"up": None}, 8, "trunk.layers.0.up.weight (of trunk.layers.0) is in no tp_plan."),
        ({}, 7, "trunk.layers.0.up has 7 outputs, not a multiple of parallel.tp 2"),
    ],
)
def test_plans_are_checked(change: dict[str, str | None], width: int, message: str) -> None:
    plan = {name: style for name, style in (PLAN | change).items() if style is not None}
    assert all(message in answer for answer in pool.run(2, apply_plan, plan, width))


def every_plan(name: str) -> dict[str, tuple[set[str], set[str]]]:
    """Per unit: its parameters, and those that some layer's plan names."""
    cfg = experiment(name)
    with torch.device("meta"):
        part = cfg.instantiate("model")
    planned = set()
    for path, module in part.named_modules():
        for target in getattr(module, "tp_plan", dict)():
            planned |= {n for n, _ in part.named_parameters(remove_duplicate=False) if f"{n}.".startswith(f"{path}.{target}.")}
    return {"all": ({n for n, _ in part.named_parameters(remove_duplicate=False)}, planned)}


@pytest.mark.parametrize("name", ["llm", "sit"])
def test_every_parameter_of_the_shipped_models_is_planned(name: str) -> None:
    parameters, planned = every_plan(name)["all"]
    assert parameters == planned


def wrong_checkpointing(mode: Any) -> str:
    from l3m_like.distributed.mesh import build_mesh
    from l3m_like.distributed.parallelize import parallelize

    try:
        parallelize(MetaModel(trunk=Stack(PLAN, stream="text")), build_mesh({}), checkpointing=mode)
    except UserError as error:
        return str(error)
    return "fine"


@pytest.mark.parametrize("mode", ["ful", 0, -1])
def test_checkpointing_modes_are_checked(mode: Any) -> None:
    assert "it is none, full, selective or a number n" in pool.run(1, wrong_checkpointing, mode)[0]


# ---- frozen parts --------------------------------------------------------------------------------------------------------


def teacher(dtype: str | None, **settings: Any) -> dict[str, Any]:
    return {
        "_target_": "l3m_like.core.Frozen",
        "model": {
            "_target_": "l3m_like.core.MetaModel",
            "trunk": {
                "_target_": "l3m_like.core.Wrap",
                "module": {"_target_": "tests.distributed.test_parallelize.Noisy"},
                "reads": {"x": "data_x"},
                "writes": {"y": "data_goal"},
            },
        },
        "dtype": dtype,
        **settings,
    }


class Noisy(nn.Sequential):
    """Tells training from evaluation by its output."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 6))


class Student(ReadWriteBlock):
    outputs = ("loss",)

    def __init__(self, **ports: Any) -> None:
        super().__init__(**ports)
        self.proj = nn.Linear(6, 6)

    def compute(self, x: Tensor, goal: Tensor) -> Tensor:
        weight = self.proj.weight
        return (self.proj(x.to(weight.dtype)) - goal.to(weight.dtype)).square().sum(-1)


def distilled(dtype: str | None = None, **settings: Any) -> dict[str, Any]:
    return {
        "data": VECTORS,
        "model": {
            "_target_": "l3m_like.core.MetaModel",
            "stream": "data",
            "preprocessor": {"teacher": teacher(dtype, **settings)},
            "head": {"_target_": "tests.distributed.test_parallelize.Student"},
        },
        "loss": {"distance": {"_target_": "tests.distributed.test_parallelize.Sum", "stream": "data"}},
    }


class Sum(Loss):
    def compute(self, loss: Tensor) -> Tensor:
        return loss.to(torch.promote_types(loss.dtype, torch.float32)).sum()

    def count(self, kept: Tensor) -> Tensor:
        return torch.tensor(len(kept))


def test_a_frozen_part_is_not_trained() -> None:
    alone = recorded(toy(distilled(random_weights=True)), 1)[0]
    for settings, ranks in (({"dp_shard": 2}, 2), ({"micro": 2}, 1)):
        for record in recorded(toy(distilled(random_weights=True), **settings), ranks):
            for ours, theirs in zip(record.gradients, alone.gradients, strict=True):
                assert set(ours) == {"head.proj.weight", "head.proj.bias"}  # and no dropout: evaluation mode
                check_gradients(ours, theirs)
            assert {name.rpartition(".")[0] for name in record.state["main"]} == set(record.gradients[0])
            assert set(record.final) == set(record.gradients[0])


def test_random_weights_must_be_wanted() -> None:
    with pytest.raises(
        pool.TaskFailed, match="preprocessor.teacher is Frozen, but no weights were loaded into it.*random_weights: true"
    ):
        recorded(toy(distilled()), 1)


def frozen_facts(dtype: str | None, precision: str) -> tuple[set[torch.dtype], torch.dtype, bool, bool, bool, torch.dtype]:
    """Its parameters' dtype, that of its output, whether it is sharded, evaluating, without gradients; the student's dtype."""
    from torch.distributed.tensor import DTensor

    from l3m_like.distributed.mesh import build_mesh
    from l3m_like.distributed.parallelize import parallelize
    from l3m_like.training.init import init_specs, initialize, materialize

    seen: dict[str, torch.dtype] = {}
    with torch.device("meta"):
        frozen = Frozen(
            MetaModel(trunk=Wrap(Noisy(), reads={"x": "data_x"}, writes={"y": "data_goal"})), dtype=dtype, random_weights=True
        )
        part = MetaModel({"teacher": frozen}, head=Student(), stream="data")
    specs = init_specs(part)
    parallelize(part, build_mesh({"dp_shard": 2}), precision=precision)
    materialize(part, torch.device("cpu"))
    initialize(part, 0, "", specs)
    part.train()
    frozen.register_forward_hook(lambda block, args, out: seen.update(goal=out["data_goal"].dtype))
    part.head.register_forward_hook(lambda block, args, out: seen.update(student=out["data_loss"].dtype))
    part({"data_x": torch.randn(3, 6)})["data_loss"].float().sum().backward()
    parameters = list(frozen.parameters())
    return (
        {p.dtype for p in parameters},
        seen["goal"],
        all(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in parameters),
        not any(module.training for module in frozen.modules()) and part.head.training,
        all(p.grad is None and not p.requires_grad for p in parameters),
        seen["student"],
    )


@pytest.mark.parametrize(
    ("dtype", "precision", "stored", "computed", "student"),
    [
        (None, "fp32", torch.float32, torch.float32, torch.float32),
        (None, "bf16", torch.float32, torch.bfloat16, torch.bfloat16),
        ("bfloat16", "fp32", torch.bfloat16, torch.bfloat16, torch.float32),
        ("float32", "bf16", torch.float32, torch.float32, torch.bfloat16),
        ("bfloat16", "bf16", torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_frozen_part_has_its_own_dtype(dtype: str | None, precision: str, stored: Any, computed: Any, student: Any) -> None:
    for dtypes, goal, sharded, evaluating, still, rest in pool.run(2, frozen_facts, dtype, precision):
        assert dtypes == {stored} and goal == computed and rest == student
        assert sharded and evaluating and still
