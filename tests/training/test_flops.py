"""FLOPs of a step against torch's own counter, forward and backward; every difference is accounted for to the last one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from l3m_like.benchmarks.bench import FORWARDS
from l3m_like.config import RunConfig
from l3m_like.core.wiring import Trace
from l3m_like.distributed.parallelize import apply_checkpointing
from l3m_like.layers.masks import document_lengths
from l3m_like.training.flops import FORMULA, StepFlops, Work
from l3m_like.training.init import initialize, materialize
from l3m_like.training.train import Plan, plan

CONFIGS = Path(__file__).parents[2] / "configs" / "experiment"
B, S, D, H, K, V, LAYERS = 2, 24, 32, 4, 8, 257, 3
LLM = [f"dim={D}", f"layers={LAYERS}", f"head_dim={K}", "mlp_dim=48", f"sequence={S}", f"batch.global={B}"]
SIT = ["dim=32", f"layers={LAYERS}", "heads=2", f"batch.global={B}"]


def planned(kind: str, overrides: list[str]) -> Plan:
    run = plan(RunConfig.from_file(CONFIGS / f"{kind}.yaml", overrides), 1)
    materialize(run.model, torch.device("cpu"))
    initialize(run.model, 0)
    return run


def counted(run: Plan, batch: dict[str, Tensor]) -> int:
    """Forward and backward; attention as matrix products, since the counter does not know every fused kernel."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        FORWARDS[type(run.model.trunk).__name__][0](run.model, batch).backward()
    return counter.get_total_flops()


def text(documents: list[list[int]]) -> dict[str, Tensor]:
    ids = torch.tensor(documents, dtype=torch.int32)
    positions = torch.stack([torch.tensor([int((row[:i] == row[i]).sum()) for i in range(S)]) for row in ids])
    tokens = torch.arange(B * S).view(B, S) % V
    targets = torch.where(ids >= 0, tokens, -100)
    return {"text_ids": tokens, "text_targets": targets, "text_positions": positions, "text_document_ids": ids}


def images() -> dict[str, Tensor]:
    return {"image": torch.randn(B, 1, 28, 28), "image_label": torch.zeros(B, dtype=torch.int64), "row": torch.arange(B)}


@pytest.mark.parametrize(
    "documents", [[[0] * S] * B, [[0] * 5 + [1] * 12 + [2] * 7, [0] * 20 + [-1] * 4]], ids=["whole", "packed"]
)
def test_language_model_against_the_counter(documents: list[list[int]]) -> None:
    run, batch = planned("llm", LLM), text(documents)
    work = StepFlops(run.trace).of([batch])
    lengths = document_lengths(batch["text_document_ids"])
    pairs = int((lengths * (lengths + 1) // 2).sum())
    # the counter sees dense attention over the whole square; only real (causal, same document) pairs are counted here
    masked = 3 * LAYERS * 4 * H * K * (B * S * S - pairs)
    padding = int((batch["text_document_ids"] < 0).sum())
    matrices = sum(p.numel() for p in run.model.trunk.parameters() if p.ndim == 2) + V * D
    assert work == Work(counted(run, batch) - masked - 3 * 2 * padding * matrices, 0.0)


def test_diffusion_against_the_counter() -> None:
    run = planned("sit", SIT)
    work, batch = StepFlops(run.trace).of([images()]), images()
    blocks = run.model.preprocessor
    # 3 x forward includes the gradient of each layer's input; that of the image and of the time are not computed
    inputs = blocks["patches"].flops(batch["image"]) + 2 * B * 256 * 32
    assert work is not None and work.model == counted(run, batch) + inputs


@pytest.mark.parametrize(("mode", "units"), [("full", 3), (2, 2), (3, 1), ("selective", 0)])
@pytest.mark.parametrize("kind", ["llm", "sit"])
def test_recomputation_against_the_counter(kind: str, mode: str | int, units: int) -> None:
    overrides, batch = (LLM, text([[0] * S] * B)) if kind == "llm" else (SIT, images())
    # selective checkpointing keeps the fused attention's result, which MATH does not have: matrix products alone
    plain, wrapped = planned(kind, overrides), planned(kind, overrides)
    layers = [unit for _, block in wrapped.model.blocks() for unit in block.shard_units()]
    apply_checkpointing(layers, mode)
    extra = counted(wrapped, batch) - counted(plain, batch)
    work = StepFlops(wrapped.trace, mode).of([batch])
    assert work is not None and work.hardware - work.model == work.recomputed
    one = _forward_of_a_unit(wrapped, batch)
    assert work.recomputed == pytest.approx(units * one)
    if kind == "llm":
        one += 4 * H * K * (B * S * S - B * S * (S + 1) // 2)  # the counter's squares again
        one -= 2 * B * S * D * 48  # torch stops before a unit's last product, whose result no gradient needs
    assert extra == units * one


def _forward_of_a_unit(run: Plan, batch: dict[str, Tensor]) -> float:
    (trunk,) = [flops for block, flops in run.trace.flops_by_block(batch) if block is run.model.trunk]
    return trunk / LAYERS


def test_an_unknown_block_gives_none_and_never_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    run = planned("llm", LLM)
    monkeypatch.setattr(Trace, "undeclared", lambda trace: ["trunk (Mine)"])
    flops = StepFlops(run.trace)
    assert flops.of([text([[0] * S] * B)]) is None
    assert flops.describe(1e12) == "no MFU: trunk (Mine) have parameters but no flops(...)"
    assert flops.describe(None) is None


def test_the_formula_is_said_once() -> None:
    said = StepFlops(planned("llm", LLM).trace).describe(989e12)
    assert said is not None and said.startswith(FORMULA) and "989 TFLOP/s" in said
