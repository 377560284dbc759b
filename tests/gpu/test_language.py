"""On an NVIDIA GPU: experts, latent attention, diffusion LMs, the chunked cross-entropy and generation, against the CPU."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from l3m_like import load
from l3m_like.config import RunConfig
from l3m_like.core.errors import UserError
from l3m_like.data import Loader
from l3m_like.generate import Autoregressive, autoregressive
from l3m_like.kernels.grouped_linear import grouped_linear, rows_reference
from l3m_like.kernels.linear_cross_entropy import linear_cross_entropy
from tests.gpu.test_gpu import CONFIGS, EVERY, refuse_waiting, rows_of
from tests.parity.rule import check_gradients, perturb

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
    pytest.mark.timeout(300),
]
KINDS = ["moe", "deepseek", "dllm", "block_diffusion"]
TINY = ["dim=64", "layers=2", "head_dim=16", "mlp_dim=64", "sequence=128", "batch.global=16", "batch.micro=8"]


def config(kind: str, folder: Path, *overrides: str) -> RunConfig:
    quiet = ["~evals", "log.console=false", "checkpoint.every=null", f"run.dir={folder}"]
    own = [setting for setting in TINY if kind != "deepseek" or not setting.startswith("head_dim")]
    return RunConfig.from_file(CONFIGS / f"{kind}.yaml", [*own, *quiet, *overrides])


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double().cpu() - exact.cpu()).norm() / exact.norm())


def with_gradients(call: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


# ---- products and losses --------------------------------------------------------------------------------------------------


def test_errors_of_grouped_products(device: torch.device) -> None:
    """Empty groups, groups of one row, and groups of no round number of rows; compiled too."""
    generator = torch.Generator().manual_seed(0)
    sizes = [0, 700, 1, 333, 0, 0, 1000, 14, 0]
    ends = torch.tensor(sizes).cumsum(0).int().to(device)
    x, weight, grad = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)
        for shape in ((sum(sizes), 512), (len(sizes), 768, 512), (sum(sizes), 768))
    )
    half = [t.bfloat16() for t in (x, weight)]

    def loop(x: Tensor, weight: Tensor) -> Tensor:
        return rows_reference(x, weight.mT, ends)

    exact = with_gradients(loop, grad, *(t.double() for t in half))
    theirs = with_gradients(loop, grad, *half)
    torch.cuda.set_sync_debug_mode("error")
    ours = with_gradients(lambda x, w: grouped_linear(x, w, ends), grad, *half)
    torch.cuda.set_sync_debug_mode("default")
    compiled = with_gradients(torch.compile(lambda x, w: grouped_linear(x, w, ends), fullgraph=True), grad, *half)
    for a, c, b, e in zip(ours, compiled, theirs, exact, strict=True):
        assert a.dtype == torch.bfloat16 and error(a, e) <= 2 * error(b, e)
        assert torch.equal(a, c)


@pytest.mark.parametrize("normalizer", [False, True], ids=["", "normalizer"])
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["", "softcap"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_errors_of_cross_entropy(dtype: torch.dtype, weighted: bool, softcap: float | None, normalizer: bool) -> None:
    """Losses of tokens and both gradients, over several chunks: at most twice torch's error with all logits."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).cuda().to(dtype) for shape in ((700, 256), (5003, 256))
    )
    targets = torch.randint(0, 5003, (700,), generator=generator).cuda()
    targets[::7] = -100
    weights = torch.rand(700, generator=generator).cuda() * 3 if weighted else None

    def call(hidden: Tensor, weight: Tensor, backend: str) -> Tensor:
        settings: dict[str, Any] = {"weights": weights, "softcap": softcap, "chunk_tokens": 256}
        found = linear_cross_entropy(hidden, weight, targets, normalizer=normalizer, backend=backend, **settings)
        return found[0] + 0.1 * found[1].square() if normalizer else found

    ones = torch.ones((), device="cuda").expand(700)
    exact = with_gradients(partial(call, backend="reference"), ones, hidden.double(), weight.double())
    theirs = with_gradients(partial(call, backend="reference"), ones, hidden, weight)
    ours = with_gradients(partial(call, backend="triton"), ones, hidden, weight)
    for a, b, e in zip(ours, theirs, exact, strict=True):
        assert error(a, e) <= 2 * error(b, e) + 5e-7


# ---- whole models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_the_cpu_in_float64(kind: str, device: torch.device, tmp_path: Path) -> None:
    cfg = config(kind, tmp_path)
    losses = [loss for loss in cfg.instantiate("loss").values() if loss is not None and loss.weight]
    exact = load(cfg, device="cpu", dtype="float64").model
    perturb(exact)
    ours = copy.deepcopy(exact).to(device, torch.float32)
    ours.retie()
    batch = Loader(cfg.instantiate("data.train"), seed=0, global_batch=4, micro_batch=4, prefetch=0).next_step().micro[0]

    def run(model: Any, where: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        data = model({key: value.to(where) for key, value in batch.items()})
        total = torch.zeros((), device=where)
        for loss in losses:
            value, count = loss.term(data, None if loss.count_late else float(loss.count_of(batch)))
            total = total + loss.weight * value / count
        total.backward()
        return total.detach().cpu(), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}

    wanted_loss, wanted = run(exact, torch.device("cpu"))
    found_loss, found = run(ours, device)
    assert float((found_loss - wanted_loss).abs()) <= 1e-5 * float(wanted_loss)
    check_gradients(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_compiled_learns_without_waiting(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = refuse_waiting(monkeypatch)
    settings = ["steps=32", f"log.every={EVERY}", "parallel.precision=bf16", "parallel.compile=true", "gc_every=1000"]
    rows = rows_of(config(kind, tmp_path, *settings))
    assert len(watched) == 23 and all(math.isfinite(row["loss"]) for row in rows)
    assert sum(row["loss"] for row in rows[-5:]) < 0.95 * sum(row["loss"] for row in rows[:5])


# ---- generation ------------------------------------------------------------------------------------------------------------


PROMPTS = [[5, 3, 9], [200, 1, 7, 8, 40, 13, 2], [11]]
DRAWS: list[dict[str, Any]] = [{"greedy": True}, {"temperature": 0.8, "top_p": 0.95}]


def generated(kind: str, dtype: str, folder: Path, *runs: dict[str, Any]) -> list[list[list[int]]]:
    """The tokens of every run, for both kinds of draws, of prompts of unequal length."""
    loaded = load(config(kind, folder), device="cuda", dtype=dtype)
    perturb(loaded.model)
    samplers = [Autoregressive(PROMPTS, 40, end=False, **draws, **settings) for draws in DRAWS for settings in runs]
    return [sampler.run(loaded.model).tokens for sampler in samplers]


def test_static_cache_with_graphs_gives_the_same_tokens(tmp_path: Path) -> None:
    found = generated("llm", "float32", tmp_path, {"cache": False}, {}, {"compile": True})
    assert all(len(tokens) == 40 for tokens in found[0]) and found[0] == found[1] == found[2] and found[3] == found[4] == found[5]


def test_static_cache_with_graphs_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded step alone, bitwise; compiled layers round elsewhere, and in bfloat16 that changes tokens."""
    monkeypatch.setattr(autoregressive, "forwards", lambda units, graphs: contextlib.nullcontext())
    found = generated("deepseek", "bfloat16", tmp_path, {}, {"compile": True})
    assert found[0] == found[1] and found[2] == found[3]
    monkeypatch.undo()
    assert all(len(tokens) == 40 for tokens in generated("deepseek", "bfloat16", tmp_path, {"compile": True})[0])
    with pytest.raises(UserError, match="generate in bfloat16"):
        generated("deepseek", "float32", tmp_path, {"compile": True})
