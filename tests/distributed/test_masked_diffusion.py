"""Masked and block diffusion: one process = every mesh = accumulation, in losses, gradients and what is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from tests.distributed.recorder import experiment, recorded, trained, world_size
from tests.distributed.test_parity import compare, settings

DRAWN = ("text_noised", "text_masked_targets", "text_weights")
SAMPLE = [
    *(("dllm", mesh, "") for mesh in ("dp_shard 2", "hsdp 2x2", "tp 2")),
    ("dllm", "dp_shard 2", "accumulation 2, full checkpointing"),
    ("block_diffusion", "dp_shard 2 x tp 2", ""),
    ("block_diffusion", "", "accumulation 4"),
]


@pytest.mark.parametrize(("name", "mesh", "split"), SAMPLE)
def test_equals_one_process(name: str, mesh: str, split: str) -> None:
    axes = settings(mesh, split)
    records, (reference,) = trained(name, DRAWN, **axes), trained(name, DRAWN)
    compare(records, reference)
    assert len(reference.draws) == len(DRAWN) * 24 and len({float(w.amax()) for w in reference.draws.values()}) > 20
    for key, value in reference.draws.items():
        held = [record.draws[key] for record in records if key in record.draws]
        assert held and all(torch.equal(other, value) for other in held), key


def test_muon_equals_one_process() -> None:
    muon = {"optim.name": "muon"}
    reference = trained("dllm", **muon)[0]
    compare(trained("dllm", dp_shard=2, **muon), reference)
    weights, other = reference.final, trained("dllm", DRAWN)[0].final
    assert any(not torch.allclose(weights[name], other[name], atol=1e-3) for name in weights if "q_proj" in name)


@contextmanager
def drawn_by_place_in_the_batch() -> Iterator[None]:
    from l3m_like.blocks import MaskTokens

    compute = MaskTokens.compute

    def broken(self: Any, ids: Any, positions: Any, targets: Any, document_ids: Any, row: Any) -> Any:
        return compute(self, ids, positions, targets, document_ids, torch.arange(len(row), device=row.device))

    with mock.patch.object(MaskTokens, "compute", broken):
        yield


@contextmanager
def divided_by_masked_tokens() -> Iterator[None]:
    """The mean over masked tokens of each rank, where the bound divides by all tokens."""
    from l3m_like.losses import MaskedDiffusion

    def broken(self: Any, weighted_nll: Any, only: Any = None) -> Any:
        return weighted_nll.sum() * weighted_nll.numel() / (weighted_nll > 0).sum()

    with mock.patch.object(MaskedDiffusion, "compute", broken):
        yield


@pytest.mark.parametrize("fault", [drawn_by_place_in_the_batch, divided_by_masked_tokens])
def test_a_planted_fault_is_found(fault: Any) -> None:
    axes = settings("dp_shard 2", "")
    found = recorded(experiment("dllm", **axes), world_size(axes), fault=fault)
    with pytest.raises(AssertionError, match="against"):
        compare(found, trained("dllm", DRAWN)[0])


def test_the_metric_of_masked_tokens_adds_up_over_micro_batches() -> None:
    """Its count is known only in the forward, which a loss may not have with accumulation; a metric may."""
    metric = {"_target_": "l3m_like.losses.MaskedNLL", "stream": "text", "weight": None}
    whole, parts = (recorded(experiment("dllm", micro=micro, **{"loss.masked": metric}), 1)[0] for micro in (None, 2))
    compare([parts], whole)
    masked = whole.column("loss/masked")
    assert len(masked) == 3 and all(abs(a - b) < 1e-9 for a, b in zip(masked, parts.column("loss/masked"), strict=True))
    assert all(abs(a - b) > 0.01 for a, b in zip(masked, whole.column("loss/elbo"), strict=True))
