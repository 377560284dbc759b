"""One process = every mesh = accumulation = activation checkpointing = compile, over three real optimizer steps.

The rule is that of ``tests/parity/rule.py``: loss, gradient norm and every gradient of every step, in float64 from perturbed
weights, and once more in float32. Each has a twin with a planted fault that the rule must find.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from tests.distributed.recorder import Record, experiment, recorded, trained, world_size
from tests.parity.rule import TOLERANCE, check_gradients

MESHES: dict[str, dict[str, Any]] = {
    "dp_shard 2": {"dp_shard": 2},
    "dp_replicate 2": {"dp_replicate": 2, "dp_shard": 1},
    "hsdp 2x2": {"dp_replicate": 2, "dp_shard": 2},
    "tp 2": {"tp": 2},
    "dp_shard 2 x tp 2": {"dp_shard": 2, "tp": 2},
    "dp_replicate 2 x tp 2": {"dp_replicate": 2, "dp_shard": 1, "tp": 2},
    "dp_shard 4": {"dp_shard": 4},
}
SPLITS: dict[str, dict[str, Any]] = {
    "accumulation 4": {"micro": 2},
    "full checkpointing": {"checkpoint": "full"},
    "selective checkpointing": {"checkpoint": "selective"},
    "checkpointing every 2": {"checkpoint": 2},
}
#: the sample that every run of the tests takes; the rest is slow
SAMPLE = [
    *(("llm", mesh, "") for mesh in ("dp_shard 2", "dp_replicate 2", "hsdp 2x2", "tp 2", "dp_shard 2 x tp 2")),
    *(("sit", mesh, "") for mesh in ("dp_shard 2", "hsdp 2x2", "tp 2", "dp_shard 2 x tp 2")),
    *(("llm", "", split) for split in ("accumulation 4", "selective checkpointing")),
    *(("sit", "", split) for split in ("accumulation 4", "full checkpointing", "checkpointing every 2")),
    ("llm", "dp_shard 2", "accumulation 2, full checkpointing"),
    ("sit", "dp_shard 2", "accumulation 4, selective checkpointing"),
]
MIXED = {
    "accumulation 2, full checkpointing": {"micro": 2, "checkpoint": "full"},
    "accumulation 4, selective checkpointing": {"micro": 1, "checkpoint": "selective"},
}
WHOLE = [
    (name, mesh, split)
    for name in ("llm", "sit")
    for mesh in ("", *MESHES)
    for split in ("", *SPLITS, *MIXED)
    if (mesh or split) and (name, mesh, split) not in SAMPLE
]

#: a constant added to every key of a head moves all scores of a query alike, which the softmax does not see
VANISHING = {"sit_shipped": {"k_proj.bias": "the softmax does not see a constant in the scores"}}


#: what sit draws in the model
DRAWN = ("image_noised", "image_target", "image_flow_weight", "image_time", "image_class_id")


def drawn(name: str) -> tuple[str, ...]:
    """Recorded with every run, so that a run serves several tests."""
    return DRAWN if name == "sit" else ()


def settings(mesh: str, split: str) -> dict[str, Any]:
    return MESHES.get(mesh, {}) | SPLITS.get(split, {}) | MIXED.get(split, {})


def compare(found: list[Record], reference: Record, vanishing: dict[str, str] | None = None) -> None:
    """Every rank's gradients of every step, and rank 0's losses and norms."""
    dtype = next(iter(reference.weights.values())).dtype
    relative = TOLERANCE[dtype][0]
    assert len(reference.gradients) == 3
    for record in found:
        assert len(record.gradients) == 3
        for ours, theirs in zip(record.gradients, reference.gradients, strict=True):
            check_gradients(ours, theirs, vanishing=vanishing)
    for column in ("loss", "grad_norm"):
        ours, theirs = found[0].column(column), reference.column(column)
        assert len(ours) == len(theirs) == 3
        for a, b in zip(ours, theirs, strict=True):
            assert abs(a - b) <= relative * abs(b), f"{column}: {a} against {b}"


def check(name: str, mesh: str, split: str, **more: Any) -> None:
    found = trained(name, drawn(name), **settings(mesh, split), **more)
    compare(found, trained(name, drawn(name), **more)[0], VANISHING.get(name))


@pytest.mark.parametrize(("name", "mesh", "split"), SAMPLE)
def test_equals_one_process(name: str, mesh: str, split: str) -> None:
    check(name, mesh, split)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh", "split"), WHOLE)
def test_equals_one_process_everywhere(name: str, mesh: str, split: str) -> None:
    check(name, mesh, split)


def test_without_qk_norm() -> None:
    """As shipped, sit has parameters without a gradient; they are listed, and nothing else is too small to be tested."""
    check("sit_shipped", "tp 2", "")
    with pytest.raises(AssertionError, match="too small"):
        compare(trained("sit_shipped"), trained("sit_shipped")[0])


def test_keys_and_values_of_the_layer_below() -> None:
    """They cross the border of two units, which are sharded, cut and recomputed."""
    shared = {"model.trunk.kv_every": 2}
    assert not any(name.startswith("trunk.layers.1.mixer.k_") for name in trained("llm", **shared)[0].weights)
    check("llm", "dp_shard 2 x tp 2", "full checkpointing", **shared)


@contextmanager
def sums_left_to_the_next_layer() -> Iterator[None]:
    """As the kernels of a GPU have it."""
    from l3m_like.layers.norm import RMSNorm

    with mock.patch.object(RMSNorm, "adds_residual", lambda self, x: True):
        yield


def test_sums_left_to_the_next_layer() -> None:
    """They cross the borders of units, which are sharded and cut."""
    axes = settings("dp_shard 2 x tp 2", "")
    compare(recorded(experiment("llm", **axes), world_size(axes), fault=sums_left_to_the_next_layer), trained("llm")[0])


def test_the_reference_has_what_it_should() -> None:
    names = set(trained("llm")[0].weights)
    assert {"trunk.layers.0.mixer.q_norm.weight", "trunk.layers.0.mixer.k_proj.bias"} <= names
    assert "preprocessor.embed.weight" in names and "head.proj.weight" not in names  # tied
    weights = trained("llm")[0].weights
    assert weights["trunk.layers.0.mixer.k_proj.weight"].shape[0] * 2 == weights["trunk.layers.0.mixer.q_proj.weight"].shape[0]
    losses = trained("llm")[0].column("loss")
    assert losses[0] > losses[1] > losses[2]  # it steps
    assert all(norm > 0.2 for norm in trained("llm")[0].column("grad_norm"))  # and clipping acts


@pytest.mark.parametrize(
    ("name", "mesh", "split"), [("llm", "dp_shard 2 x tp 2", ""), ("sit", "hsdp 2x2", "")]
)
def test_in_float32(name: str, mesh: str, split: str) -> None:
    check(name, mesh, split, precision="fp32")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llm", "sit"])
@pytest.mark.parametrize(("mesh", "split"), [*((mesh, "") for mesh in MESHES), *(("", split) for split in SPLITS)])
def test_in_float32_everywhere(name: str, mesh: str, split: str) -> None:
    check(name, mesh, split, precision="fp32")


@pytest.mark.timeout(300)
def test_compiled() -> None:
    found = recorded(experiment("llm", compile=True), 1, timeout=250)
    compare(found, trained("llm", drawn("llm"))[0])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["llm", "sit"])
@pytest.mark.parametrize("mesh", ["", "dp_shard 2", "tp 2", "hsdp 2x2"])
@pytest.mark.parametrize("checkpoint", ["none", "selective"])
def test_compiled_everywhere(name: str, mesh: str, checkpoint: str) -> None:
    axes = settings(mesh, "")
    found = recorded(experiment(name, compile=True, checkpoint=checkpoint, **axes), world_size(axes), timeout=550)
    compare(found, trained(name, drawn(name))[0])


# ---- planted faults: each must be found ----------------------------------------------------------------------------------


@contextmanager
def tp_sum_dropped() -> Iterator[None]:
    """The gradients of QK-norms stay those of each tp rank's own heads."""
    from l3m_like.training import updates

    with mock.patch.object(updates, "sum_partial_gradients", lambda parameters, mesh: None):
        yield


@contextmanager
def replicas_not_reduced() -> Iterator[None]:
    """HSDP 2x2 without its all-reduce over dp_replicate (ranks 0 and 2, 1 and 3)."""
    import torch.distributed as dist

    all_reduce = dist.all_reduce

    def broken(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group")
        apart = group is not None and dist.get_process_group_ranks(group) in ([0, 2], [1, 3])
        return None if apart and tensor.numel() > 1 else all_reduce(tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", broken):
        yield


@contextmanager
def one_gradient_halved() -> Iterator[None]:
    from l3m_like.training.updates import Update

    step = Update.step

    def broken(self: Any, *args: Any) -> Any:
        list(self.parameters.values())[-1].grad.mul_(0.5)
        return step(self, *args)

    with mock.patch.object(Update, "step", broken):
        yield


@contextmanager
def divided_by_dp() -> Iterator[None]:
    """The mean over ranks that FSDP takes by default."""
    from torch.distributed.fsdp import FSDPModule

    from l3m_like.training import train

    parallelize = train.parallelize

    def broken(part: Any, mesh: Any, **kwargs: Any) -> Any:
        parallelize(part, mesh, **kwargs)
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(float(mesh.dp_size))
        return part

    with mock.patch.object(train, "parallelize", broken):
        yield


@contextmanager
def mean_of_means() -> Iterator[None]:
    """Each micro-batch divided by its own count, as if all counts were equal."""
    from l3m_like.losses import Loss

    term = Loss.term

    def broken(self: Any, data: Any, total: Any, mesh: Any = None) -> Any:
        return term(self, data, float(self.count_of(data)) * 8 / len(data["row"]), mesh)

    with mock.patch.object(Loss, "term", broken):
        yield


@contextmanager
def something_is_left_to_the_first_layer() -> Iterator[None]:
    from l3m_like.layers import TransformerLayer

    planted = mock.patch.object(TransformerLayer, "nothing_deferred", lambda self, x: x.new_full(x.shape, 0.01))
    with sums_left_to_the_next_layer(), planted:
        yield


FAULTS = [
    ("llm", "dp_shard 2", "", something_is_left_to_the_first_layer),
    ("llm", "tp 2", "", tp_sum_dropped),
    ("sit", "tp 2", "", tp_sum_dropped),
    ("llm", "hsdp 2x2", "", replicas_not_reduced),
    ("llm", "", "accumulation 4", one_gradient_halved),
    ("sit", "dp_shard 2", "", one_gradient_halved),
    ("llm", "dp_shard 2", "", divided_by_dp),
    ("llm", "", "accumulation 4", mean_of_means),
    ("llm", "dp_shard 2", "", mean_of_means),
]


@pytest.mark.parametrize(("name", "mesh", "split", "fault"), FAULTS)
def test_a_planted_fault_is_found(name: str, mesh: str, split: str, fault: Any) -> None:
    axes = settings(mesh, split)
    found = recorded(experiment(name, **axes), world_size(axes), fault=fault)
    with pytest.raises(AssertionError, match="against"):
        compare(found, trained(name, drawn(name))[0])


# ---- what is drawn -------------------------------------------------------------------------------------------------------


DRAWN_ON = [("", ""), ("dp_shard 2", ""), ("tp 2", ""), ("dp_shard 2 x tp 2", ""), ("hsdp 2x2", ""), ("", "accumulation 4")]


@pytest.mark.parametrize(("mesh", "split"), DRAWN_ON[1:])
def test_noise_times_and_dropped_labels_are_bitwise_equal(mesh: str, split: str) -> None:
    """Row by row, on whichever rank the row lies; 3 steps of 8 rows."""
    reference = trained("sit", DRAWN)[0].draws
    assert len(reference) == len(DRAWN) * 24
    axes = settings(mesh, split)
    records = trained("sit", DRAWN, **axes)
    for key, value in reference.items():
        held = [record.draws[key] for record in records if key in record.draws]
        assert len(held) == axes.get("tp", 1), f"{key} is on {len(held)} ranks"
        for other in held:
            assert other.dtype == value.dtype and torch.equal(other, value), key


@pytest.mark.parametrize(("mesh", "split"), DRAWN_ON[1:])
@pytest.mark.parametrize("name", ["llm", "sit"])
def test_initial_weights_are_bitwise_equal(name: str, mesh: str, split: str) -> None:
    reference = trained(name, drawn(name))[0].weights
    assert (
        len({value.flatten()[0].item() for name, value in reference.items() if name.endswith("proj.weight") and value.any()}) > 4
    )
    for record in trained(name, drawn(name), **settings(mesh, split)):
        assert set(record.weights) == set(reference)
        for parameter, value in reference.items():
            assert torch.equal(record.weights[parameter], value), parameter


def test_draws_differ_from_row_to_row() -> None:
    draws = trained("sit", DRAWN)[0].draws
    times = {float(draws["image_time", row]) for row in range(24)}
    labels = [int(draws["image_class_id", row]) for row in range(24)]
    assert len(times) == 24 and 0 <= labels.count(10) < 12 and max(labels) <= 10
