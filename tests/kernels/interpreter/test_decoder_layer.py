"""Decoder layers whose MLP's sum is made by the norm of the next one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from against import TOLERANCE, randn, worst
from torch import Tensor, nn

from l3m_like.blocks import Transformer
from l3m_like.distributed.activations import apply_checkpointing, apply_offload
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


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "experts": {"routed": True},
    "shared keys": {"kv_every": 2},
    "stochastic depth": {"drop_path": 0.5, "seed": 0},
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def exact(kind: str) -> list[Tensor]:
    return outputs_and_gradients(trunk_with("torch", **KINDS[kind]).double(), torch.float64, **reads(kind))


def reads(kind: str) -> dict[str, Tensor]:
    return {"row": torch.arange(B)} if kind == "stochastic depth" else {}


def test_a_layer_leaves_its_mlp_to_the_next(kind: str, exact: list[Tensor]) -> None:
    trunk = trunk_with("triton", **KINDS[kind])
    with (
        mock.patch.object(norm, "rms_norm", wraps=norm.rms_norm) as of_sums,
        mock.patch.object(norm, "rms_norm_and_residual", wraps=norm.rms_norm_and_residual) as alone,
    ):
        found = outputs_and_gradients(trunk, **reads(kind))
    assert of_sums.call_count == 2 * LAYERS and not alone.call_count
    assert worst(found, exact) <= 20 * TOLERANCE[torch.float32]


def test_recomputed_layers_are_given_one_tensor(kind: str, exact: list[Tensor]) -> None:
    trunk = trunk_with("triton", **KINDS[kind])
    apply_checkpointing(list(trunk.layers)[:1], "full")
    with mock.patch.object(norm, "rms_norm_and_residual", wraps=norm.rms_norm_and_residual) as alone:
        assert worst(outputs_and_gradients(trunk, **reads(kind)), exact) <= 20 * TOLERANCE[torch.float32]
    assert alone.call_count >= LAYERS


def test_layers_share_a_graph() -> None:
    trunk = trunk_with("triton")
    eager = outputs_and_gradients(trunk)
    graphs = Graphs(backend="aot_eager")
    graphs.compile(list(trunk.layers))
    for ours, theirs in zip(outputs_and_gradients(trunk), eager, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert graphs.counts == {"TransformerLayer": {"training": 1, "evaluation": 0}}


def test_with_offload(kind: str) -> None:
    wanted = outputs_and_gradients(trunk_with("triton", **KINDS[kind]), **reads(kind))
    trunk = trunk_with("triton", **KINDS[kind])
    offload = apply_offload(list(trunk.layers), torch.device("cpu"), smallest=1)
    with mock.patch.object(offload, "copy", wraps=offload.copy) as copied:
        found = outputs_and_gradients(trunk, **reads(kind))
    assert copied.call_count and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_tokens_without_gradients() -> None:
    """Of a frozen embedding."""
    wide, trunk = trunk_with("torch").double(), trunk_with("triton")
    grads = []
    for one, dtype in ((wide, torch.float64), (trunk, torch.float32)):
        out: Any = one.compute(randn(B, S, D).to(dtype))
        grads.append(list(torch.autograd.grad((out * randn(B, S, D, seed=1).to(dtype)).sum(), list(one.parameters()))))
    assert worst(grads[1], grads[0]) <= 20 * TOLERANCE[torch.float32]
