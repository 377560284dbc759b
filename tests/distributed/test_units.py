"""Whole runs with compiled, checkpointed and offloaded units: the numbers of a plain run, and how many graphs that takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

from l3m_like.distributed import activations, compiled
from tests.distributed.recorder import Record, experiment, recorded, trained
from tests.parity.rule import check_gradients

OFFLOAD = {"parallel.offload": {"keep": 1, "every": 1, "smallest": 1}}


@contextmanager
def quick_compiler() -> Iterator[None]:
    """The real graphs without code for them, which takes long to make."""
    with mock.patch.object(compiled, "BACKEND", "aot_eager_decomp_partition"):
        yield


def same(found: list[Record], reference: Record) -> None:
    for record in found:
        assert len(record.gradients) == len(reference.gradients) == 3
        for ours, theirs in zip(record.gradients, reference.gradients, strict=True):
            check_gradients(ours, theirs)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llm", {"checkpoint": "none", "micro": 4}),
        ("sit", {"checkpoint": "full"}),
        ("llm", {"checkpoint": "full", "dp_shard": 2}),
        ("llm", {"checkpoint": "none", "tp": 2}),
        ("sit", {"checkpoint": "selective", "compile": True, "dp_shard": 2}),
    ],
    ids=str,
)
def test_offload_keeps_parity(name: str, settings: dict[str, Any]) -> None:
    world = settings.get("dp_shard", 1) * settings.get("tp", 1)
    same(recorded(experiment(name, **settings, **OFFLOAD), world, fault=quick_compiler), trained(name)[0])


@contextmanager
def spoiled() -> Iterator[None]:
    """One tensor in a hundred that comes back is not what was sent."""
    tensor, number = activations.Saved.tensor, itertools.count(1)

    def wrong(self: activations.Saved) -> Any:
        return tensor(self) * (1.001 if next(number) % 100 == 0 and self.view[0].is_floating_point else 1)

    with mock.patch.object(activations.Saved, "tensor", wrong):
        yield


def test_a_tensor_that_comes_back_wrong_is_found() -> None:
    with pytest.raises(AssertionError):
        same(recorded(experiment("sit", dp_shard=2, **OFFLOAD), 2, fault=spoiled), trained("sit")[0])


@pytest.mark.parametrize("checkpoint", ["none", "selective"])
def test_one_graph_for_training_and_one_for_evaluation(checkpoint: str) -> None:
    """Over batches with different numbers of documents, and an evaluation before the last step."""
    from l3m_like.config import RunConfig
    from tests.distributed.recorder import ROOT, TINY, change

    cfg = RunConfig.from_file(ROOT / "configs" / "experiment" / "llm.yaml", TINY["llm"])
    source = {"_target_": "tests.distributed.toys.Texts"}
    settings = {"steps": 6, "log.every": 1, "log.console": False, "checkpoint.every": None, "parallel.compile": True}
    change(cfg, {**settings, "parallel.checkpoint": checkpoint, "data.sets.train.source": source})
    cfg.evals["heldout"].every, cfg.evals["heldout"].samples = 4, 8
    cfg.evals["heldout"].data["source"] = source
    (record,) = recorded(cfg, 1, fault=quick_compiler)
    told = [row for row in record.rows if "graphs" in row]
    assert [(row["step"], row["graphs"]) for row in told] == [
        (1, {"TransformerLayer": {"training": 1, "evaluation": 0}}),
        (5, {"TransformerLayer": {"training": 1, "evaluation": 1}}),
    ]
    assert all(row["recompiles"] == 0 for row in told)
