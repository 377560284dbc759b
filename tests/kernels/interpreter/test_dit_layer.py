"""An adaLN layer that leaves its biases and the residual's gradient to the kernels: eager, compiled, and in half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from against import TOLERANCE, randn, worst
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from l3m_like.blocks import DiT
from l3m_like.distributed.activations import apply_checkpointing
from l3m_like.distributed.compiled import Graphs
from l3m_like.distributed.low_precision import LowPrecision
from l3m_like.kernels.launch import TUNED
from l3m_like.kernels.select import selecting
from l3m_like.layers import MLP, Attention, DiTLayer, transformer

B, S, D = 2, 11, 24


@pytest.fixture(scope="module", autouse=True)
def one_program_per_row() -> Iterator[None]:
    """Less to interpret."""
    with pytest.MonkeyPatch.context() as patch:
        for kernel in ("modulated_norm_backward", "gated_modulated_norm_backward"):
            patch.setitem(TUNED, kernel, replace(TUNED[kernel], programs=1))
        yield


def layer_with(backend: str) -> DiTLayer:
    with selecting({"modulated_norm": backend}):
        layer = DiTLayer(D, mixer=partial(Attention, num_heads=2, bias=True), mlp=partial(MLP, ratio=2.0))
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return layer


def trained(layer: nn.Module) -> list[nn.Parameter]:
    # softmax ignores what all keys have in common: the gradient of their bias is noise
    return [parameter for name, parameter in layer.named_parameters() if not name.endswith("mixer.k_proj.bias")]


def outputs_and_gradients(layer: nn.Module, call: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    leaves = [randn(B, S, D).to(dtype).requires_grad_(), randn(B, D).to(dtype).requires_grad_()]
    out = call(*leaves)
    loss = (out * randn(B, S, D, seed=1).to(dtype)).sum()
    return [out.detach(), *torch.autograd.grad(loss, [*leaves, *trained(layer)])]


@pytest.fixture(scope="module")
def exact() -> list[Tensor]:
    layer = layer_with("torch").double()
    return outputs_and_gradients(layer, layer, torch.float64)


@pytest.fixture(scope="module")
def eager() -> list[Tensor]:
    layer = layer_with("triton")
    return outputs_and_gradients(layer, layer)


def test_with_and_without(eager: list[Tensor], exact: list[Tensor]) -> None:
    assert worst(eager, exact) <= 10 * TOLERANCE[torch.float32]  # a chain of operations


def passes_over_tokens(counted: list[int], graph: Any, inputs: Any) -> Any:
    """Appends how many sums of two tensors, or over the tokens of one, are in the graph."""
    sums = (torch.ops.aten.add.Tensor, torch.ops.aten.sum.dim_IntList)
    nodes = [node for node in graph.graph.nodes if node.target in sums]
    counted.append(sum(node.all_input_nodes[0].meta["val"].numel() >= B * S * D for node in nodes))
    return graph.forward


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")
def test_compiled(eager: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled and checkpointed it is one graph, which gives the same; and no pass is left in the backward that only adds two
    gradients or sums one into that of a bias behind a gate."""
    monkeypatch.setattr("l3m_like.layers.linear._ROWS", 1)  # query, key and value are one product
    layer = layer_with("triton")
    backward: list[int] = []
    compiler = aot_autograd(fw_compiler=partial(passes_over_tokens, []), bw_compiler=partial(passes_over_tokens, backward))
    call = torch.compile(partial(checkpoint, layer.forward, use_reentrant=False), backend=compiler, fullgraph=True)
    for ours, theirs in zip(outputs_and_gradients(layer, call), eager, strict=True):
        torch.testing.assert_close(ours, theirs)
    # into the biases of query, key and value, and of `up`, whose kernel is not in use here
    assert backward == [2]


def test_copies_in_half_precision(exact: list[Tensor]) -> None:
    """The forward reads biases that are copies; their gradients arrive at the masters."""
    layer = layer_with("triton")
    LowPrecision(layer, torch.float16)
    out = layer(randn(B, S, D).half(), randn(B, D).half())
    (out * randn(B, S, D, seed=1).half()).sum().backward()
    found = [parameter.grad for parameter in trained(layer) if parameter.grad is not None]
    assert worst(found, exact[3:]) <= 10 * TOLERANCE[torch.float16]


LAYERS = 3


def trunk_with(backend: str, *, bias: bool = True) -> DiT:
    with selecting({"modulated_norm": backend}):
        mlp = partial(MLP, ratio=2.0, bias=bias)
        trunk = DiT(D, LAYERS, layer=partial(DiTLayer, mixer=partial(Attention, num_heads=2, bias=True), mlp=mlp))
    torch.manual_seed(0)
    for parameter in trunk.parameters():
        nn.init.normal_(parameter, std=0.2)
    return trunk


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_leaves_its_mlp_to_the_next(bias: bool) -> None:
    """Compiled or not it is the same, and all layers share a graph; recomputed layers are given one tensor, not two."""
    wide = trunk_with("torch", bias=bias).double()
    exact = outputs_and_gradients(wide, wide.compute, torch.float64)
    sums = mock.patch.object(transformer, "gated_residual", wraps=transformer.gated_residual)
    trunk = trunk_with("triton", bias=bias)
    with sums as called:
        found = outputs_and_gradients(trunk, trunk.compute)
    assert called.call_count == 1 and worst(found, exact) <= 20 * TOLERANCE[torch.float32]

    graphs = Graphs(backend="aot_eager")
    graphs.compile(list(trunk.layers))
    for ours, theirs in zip(outputs_and_gradients(trunk, trunk.compute), found, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert graphs.counts == {"DiTLayer": {"training": 1, "evaluation": 0}}

    trunk = trunk_with("triton", bias=bias)
    apply_checkpointing(list(trunk.layers)[:1], "full")
    with sums as called:
        assert worst(outputs_and_gradients(trunk, trunk.compute), exact) <= 20 * TOLERANCE[torch.float32]
    assert called.call_count >= LAYERS


@pytest.mark.parametrize("frozen", ["condition", "mlp.down.bias", "modulation"])
def test_a_frozen_part_needs_no_second_graph(frozen: str) -> None:
    trunk = trunk_with("triton")
    for name, parameter in trunk.named_parameters():
        parameter.requires_grad_(frozen not in name)
    graphs = Graphs(backend="aot_eager")
    graphs.compile(list(trunk.layers))
    x, condition = randn(B, S, D).float().requires_grad_(), randn(B, D).float().requires_grad_(frozen != "condition")
    trunk.compute(x, condition).sum().backward()
    assert graphs.counts == {"DiTLayer": {"training": 1, "evaluation": 0}}
    assert all((parameter.grad is None) == (frozen in name) for name, parameter in trunk.named_parameters())


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int) -> None:
    for backend in ("triton", "torch"):
        trunk = trunk_with(backend)
        x = randn(rows, S, D).float().requires_grad_()
        out = trunk.compute(x, randn(rows, D).float())
        out.sum().backward()
        assert x.grad is not None and out.shape == x.grad.shape == (rows, S, D)


def test_copies_of_a_trunk_in_half_precision() -> None:
    """The last bias of every layer but one is added by the next: its gradient arrives at its own master."""
    wide, trunk = trunk_with("torch").double(), trunk_with("triton")
    exact = outputs_and_gradients(wide, wide.compute, torch.float64)
    LowPrecision(trunk, torch.float16)
    inputs = {"tokens": randn(B, S, D).half(), "condition": randn(B, D).half()}
    out = trunk(inputs)["hidden"]
    (out * randn(B, S, D, seed=1).half()).sum().backward()
    found = [parameter.grad for parameter in trained(trunk) if parameter.grad is not None]
    assert worst(found, exact[3:]) <= 20 * TOLERANCE[torch.float16]
