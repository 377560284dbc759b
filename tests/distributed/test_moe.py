"""Experts, latent attention and other forms: one process = every mesh = accumulation = checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from l3m_like.config.schema import Muon as MuonConfig
from tests.distributed.recorder import experiment, recorded, run_twice, trained, world_size
from tests.distributed.test_parity import compare, settings
from tests.parity.rule import check_gradients

MUON = {"optim.name": "muon", "optim.muon": MuonConfig(), "optim.lr": 0.02}


@pytest.mark.parametrize(
    ("name", "mesh", "split"),
    [
        pytest.param("moe", "dp_shard 2", "", marks=pytest.mark.slow),
        ("moe", "dp_shard 2 x tp 2", ""),
        ("deepseek", "tp 2", ""),
        pytest.param("deepseek", "dp_shard 2 x tp 2", "", marks=pytest.mark.slow),
        ("deepseek", "dp_shard 2", "accumulation 4"),
        ("deepseek", "", "full checkpointing"),
    ],
)
def test_equals_one_process(name: str, mesh: str, split: str) -> None:
    found, reference = trained(name, **settings(mesh, split)), trained(name)[0]
    compare(found, reference)
    for term in ("loss/balance", "loss/router_z"):
        assert found[0].column(term) == pytest.approx(reference.column(term), rel=1e-8)
    if not split:
        assert found[0].column("loss/violation") == pytest.approx(reference.column("loss/violation"), rel=1e-8)


@pytest.mark.parametrize("layer", ["LadderLayer", "ParallelLayer"])
def test_layers_of_other_forms(layer: str) -> None:
    form = {"model.trunk.layer._target_": f"l3m_like.layers.{layer}"}
    compare(recorded(experiment("llm", **form, tp=2), 2), recorded(experiment("llm", **form), 1)[0])


def test_resuming_changes_no_bit() -> None:
    """The biases of routers go on as well."""
    settings = {"schedule.name": "constant", "schedule.floor": 0.0}
    settings |= {"data.sets.train.source": {"_target_": "tests.distributed.toys.Texts", "samples": 97}}
    whole = recorded(experiment("deepseek", **settings), 1)[0]
    (resumed,) = recorded(experiment("deepseek", **settings), 1, task=run_twice)
    assert len(resumed.gradients) == 1
    for name, value in whole.gradients[-1].items():
        assert torch.equal(resumed.gradients[-1][name], value), name


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["moe", "deepseek"])
def test_compiled(name: str) -> None:
    compare(recorded(experiment(name, compile=True), 1, timeout=550), trained(name)[0])


def test_muon_orthogonalises_each_expert_on_every_mesh() -> None:
    one = recorded(experiment("moe", **MUON), 1)[0]
    axes = settings("dp_shard 2 x tp 2", "")
    for record in recorded(experiment("moe", **MUON, **axes), world_size(axes)):
        check_gradients(record.final, one.final)
    names = [name for name in one.state["main"] if name.endswith("experts.gate.momentum")]
    assert len(names) == 2 and one.state["main"][names[0]].shape == (4, 12, 16)


@contextmanager
def bias_of_one_rank() -> Iterator[None]:
    """Only the main rank moves it."""
    from l3m_like.blocks import Transformer

    def broken(self: Any, mesh: Any, skipped: Any = None) -> None:
        self.router_loads.step(lambda load: load * mesh.is_main)

    with mock.patch.object(Transformer, "after_step", broken):
        yield


@contextmanager
def load_of_own_rows() -> Iterator[None]:
    from l3m_like.losses import LoadBalance

    with mock.patch.object(LoadBalance, "bind", lambda self, mesh: None):
        yield


@contextmanager
def weights_not_summed() -> Iterator[None]:
    """Under tensor parallelism a router gets the gradient of each rank's slice of the experts."""
    from l3m_like.distributed import tensor_parallel

    with mock.patch.object(tensor_parallel, "_whole", lambda x, mesh: x):
        yield


@contextmanager
def rotated_key_not_summed() -> Iterator[None]:
    """Under tensor parallelism the one rotated key gets the gradient of each rank's heads."""
    from l3m_like.distributed import parallelize

    with mock.patch.dict(parallelize.TP_STYLES, {"divided": None}):
        yield


@pytest.mark.parametrize(
    ("name", "mesh", "fault"),
    [
        ("deepseek", "dp_shard 2", bias_of_one_rank),
        ("deepseek", "tp 2", rotated_key_not_summed),
        ("moe", "dp_shard 2", load_of_own_rows),
        ("moe", "tp 2", weights_not_summed),
    ],
)
def test_a_planted_fault_is_found(name: str, mesh: str, fault: Any) -> None:
    axes = settings(mesh, "")
    found = recorded(experiment(name, **axes), world_size(axes), fault=fault)
    with pytest.raises(AssertionError, match="against"):
        compare(found, trained(name)[0])


def test_the_bias_moves_and_changes_what_is_chosen() -> None:
    """Without moving, the second step's gradients are others."""
    still = recorded(experiment("deepseek", **{"model.trunk.layer.experts.mlp.router.bias_rate": 0.0}), 1)[0]
    moved = trained("deepseek")[0]
    check_gradients(still.gradients[0], moved.gradients[0])
    name = "trunk.layers.1.mlp.experts.up"
    assert not torch.allclose(still.gradients[2][name], moved.gradients[2][name], rtol=1e-3)
