"""Contrastive losses are those of the whole batch: one process = every mesh = accumulation with cached features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from tests.distributed.recorder import experiment, recorded, trained, world_size
from tests.distributed.test_parity import compare, settings

SIGMOID = {
    "loss": {"contrast": {"_target_": "l3m_like.losses.SigmoidContrastive"}},
    "model.contrast.head.bias": -2.0,
    "model.contrast.head.writes": ["scale", "bias"],
}
#: keys move all scores of a query alike, which the softmax does not see
VANISHING = {"k_proj.bias": "the softmax does not see a constant in the scores"}
LOSSES: dict[str, dict[str, Any]] = {"clip": {}, "siglip": SIGMOID}


def run(name: str, mesh: str, split: str, fault: Any = None) -> Any:
    axes = settings(mesh, split) | ({"micro": 1} if split == "accumulation 2" else {})
    return recorded(experiment("clip", **LOSSES[name], **axes), world_size(axes), fault=fault)


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return {"clip": trained("clip")[0], "siglip": run("siglip", "", "")[0]}


@pytest.mark.parametrize(
    ("name", "mesh", "split"),
    [
        ("clip", "dp_shard 2", ""),
        ("clip", "hsdp 2x2", ""),
        pytest.param("clip", "dp_shard 2 x tp 2", "", marks=pytest.mark.slow),
        ("clip", "", "accumulation 4"),
        pytest.param("clip", "dp_shard 2", "accumulation 2, full checkpointing", marks=pytest.mark.slow),
        ("siglip", "dp_shard 2", ""),
        pytest.param("siglip", "hsdp 2x2", "", marks=pytest.mark.slow),
        ("siglip", "dp_shard 4", "accumulation 2"),
    ],
)
def test_equals_one_process(one: dict[str, Any], name: str, mesh: str, split: str) -> None:
    compare(run(name, mesh, split), one[name], VANISHING)


def test_it_is_not_the_loss_of_parts(one: dict[str, Any]) -> None:
    """The batch is of 8 rows: its loss at chance is ln 8, and all of it is steps of one model."""
    losses = one["clip"].column("loss")
    assert len(losses) == 3 and losses[0] > losses[2] > 0
    assert {"contrast.head.log_scale"} <= set(one["clip"].weights)
    assert {"contrast.head.bias", "contrast.head.log_scale"} <= set(one["siglip"].weights)


@contextmanager
def gather_without_gradient() -> Iterator[None]:
    from l3m_like.distributed.mesh import Mesh

    gather = Mesh.gather_rows
    with mock.patch.object(Mesh, "gather_rows", lambda self, rows: gather(self, rows).detach()):
        yield


@contextmanager
def own_rows_alone_have_a_gradient() -> Iterator[None]:
    """As a gather that puts this rank's own rows back into the others' copies."""
    from l3m_like.distributed.mesh import Mesh

    gather = Mesh.gather_rows

    def broken(self: Any, rows: torch.Tensor) -> torch.Tensor:
        parts = list(gather(self, rows).detach().split(len(rows)))
        parts[self.dp_rank] = rows
        return torch.cat(parts)

    with mock.patch.object(Mesh, "gather_rows", broken):
        yield


@contextmanager
def ring_without_gradient() -> Iterator[None]:
    from l3m_like.distributed.mesh import Mesh

    pass_on = Mesh.pass_rows_on
    with mock.patch.object(Mesh, "pass_rows_on", lambda self, rows: pass_on(self, rows).detach()):
        yield


@contextmanager
def each_micro_batch_alone() -> Iterator[None]:
    """Every micro-batch has its own negatives."""
    from l3m_like.training.updates import Update

    with mock.patch.object(Update, "whole_batch", lambda self, number, *_: [None] * number):
        yield


@pytest.mark.parametrize(
    ("name", "mesh", "split", "fault"),
    [
        ("clip", "dp_shard 2", "", gather_without_gradient),
        ("clip", "dp_shard 2", "", own_rows_alone_have_a_gradient),
        ("siglip", "dp_shard 2", "", ring_without_gradient),
        ("clip", "", "accumulation 4", each_micro_batch_alone),
    ],
)
def test_a_planted_fault_is_found(one: dict[str, Any], name: str, mesh: str, split: str, fault: Any) -> None:
    with pytest.raises(AssertionError, match="against"):
        compare(run(name, mesh, split, fault), one[name], VANISHING)
