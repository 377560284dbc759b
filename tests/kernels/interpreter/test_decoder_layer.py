"""Decoder layers whose MLP's sum is made by the norm of the next one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from against import TOLERANCE, randn
from torch import Tensor, nn

from l3m_like.blocks import Transformer
from l3m_like.distributed.activations import apply_checkpointing
from l3m_like.distributed.compiled import Graphs
from l3m_like.kernels.launch import TUNED
from l3m_like.kernels.select import selecting
from l3m_like.layers import Attention, MoE, SwiGLU, TransformerLayer, norm

B, S, D, LAYERS = 2, 5, 24, 4


@pytest.fixture(scope="module", autouse=True)
def one_program_per_row() -> Iterator[None]:
    """Less to interpret."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TUNED, "rms_norm_backward", replace(TUNED["rms_norm_backward"], programs=1))
        yield


def trunk_with(backend: str, **more: Any) -> Transformer:
    mlp = partial(MoE, hidden_dim=8, experts=3, top_k=2) if more.pop("routed", False) else partial(SwiGLU, hidden_dim=16)
    with selecting({"rms_norm": backend, "rope": "torch", "swiglu": "torch"}):
        layer = partial(TransformerLayer, mixer=partial(Attention, num_heads=2), mlp=mlp)
        trunk = Transformer(D, LAYERS, layer=layer, **more)
    torch.manual_seed(0)
    for parameter in trunk.parameters():
        nn.init.normal_(parameter, std=0.2)
    return trunk


def outputs_and_gradients(trunk: Transformer, dtype: torch.dtype = torch.float32, **more: Any) -> list[Tensor]:
    tokens = randn(B, S, D).to(dtype).requires_grad_()
    out: Any = trunk.compute(tokens, **more)
    loss = (out * randn(B, S, D, seed=1).to(dtype)).sum()
    return [out.detach(), *torch.autograd.grad(loss, [tokens, *trunk.parameters()])]


def worst(ours: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(ours, exact, strict=True))


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "experts": {"routed": True},
    "shared keys": {"kv_every": 2},
    "stochastic depth": {"drop_path": 0.5, "seed": 0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_leaves_its_mlp_to_the_next(kind: str) -> None:
    """It is the same, compiled or not, and layers share a graph; recomputed layers are given one tensor, not two."""
    more = {"row": torch.arange(B)} if kind == "stochastic depth" else {}
    exact = outputs_and_gradients(trunk_with("torch", **KINDS[kind]).double(), torch.float64, **more)
    sums = mock.patch.object(norm, "rms_norm", wraps=norm.rms_norm)
    alone = mock.patch.object(norm, "rms_norm_and_residual", wraps=norm.rms_norm_and_residual)
    trunk = trunk_with("triton", **KINDS[kind])
    with sums as called, alone as never:
        found = outputs_and_gradients(trunk, **more)
    assert called.call_count == 2 * LAYERS and not never.call_count
    assert worst(found, exact) <= 20 * TOLERANCE[torch.float32]

    if kind == "plain":
        graphs = Graphs(backend="aot_eager")
        graphs.compile(list(trunk.layers))
        for ours, theirs in zip(outputs_and_gradients(trunk), found, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert graphs.counts == {"TransformerLayer": {"training": 1, "evaluation": 0}}

    trunk = trunk_with("triton", **KINDS[kind])
    apply_checkpointing(list(trunk.layers)[:1], "full")
    with alone as called:
        assert worst(outputs_and_gradients(trunk, **more), exact) <= 20 * TOLERANCE[torch.float32]
    assert called.call_count >= LAYERS


def test_tokens_without_gradients() -> None:
    """Of a frozen embedding."""
    wide, trunk = trunk_with("torch").double(), trunk_with("triton")
    grads = []
    for one, dtype in ((wide, torch.float64), (trunk, torch.float32)):
        out: Any = one.compute(randn(B, S, D).to(dtype))
        grads.append(list(torch.autograd.grad((out * randn(B, S, D, seed=1).to(dtype)).sum(), list(one.parameters()))))
    assert worst(grads[1], grads[0]) <= 20 * TOLERANCE[torch.float32]
