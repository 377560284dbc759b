"""Checkpointing, offload and compiled units: the gradients are bitwise those without, less is kept, and graphs are counted."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l3m_like.core import UserError
from l3m_like.distributed.activations import (
    Checkpointing,
    Offload,
    Pass,
    Saved,
    apply_checkpointing,
    apply_offload,
    is_attention,
    refuse_hidden,
)
from l3m_like.distributed.compiled import Graphs
from l3m_like.layers import MLP, Attention, DiTLayer, TransformerLayer

B, S, D, UNITS = 2, 6, 16, 5


class Unit(nn.Module):
    """A layer in small: attention, matmuls, dropout, a table shared by all units."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x * table[0] + table[1]).chunk(3, -1))
        heads = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.dropout(torch.tanh(self.out(heads.transpose(1, 2).flatten(2))))


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def units() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([Unit() for _ in range(UNITS)])


def gradients(layers: nn.ModuleList, steps: int = 1) -> list[Tensor]:
    """Of the parameters and of the input, after as many forward and backward passes."""
    torch.manual_seed(1)
    start = torch.randn(B, S, D, requires_grad=True)
    table = torch.rand(S, D), torch.rand(S, D)
    for _ in range(steps):
        x = start * 1
        for layer in layers:
            x = layer(x, table)
        x.square().sum().backward()
    return [p.grad for p in (*layers.parameters(), start) if p.grad is not None]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) > 0 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


MODES: list[Any] = ["full", "selective", 2, {"save": ["attention"]}, {"save": ["every_second_matmul", "aten::tanh"], "every": 2}]


# ---- checkpointing -------------------------------------------------------------------------------------------------------


class Ran(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def ran(mode: Any) -> tuple[list[Tensor], dict[str, int]]:
    layers = units()
    apply_checkpointing(list(layers), mode)
    with Ran() as seen:
        found = gradients(layers)
    return found, seen.counts


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_what_is_computed_again_is_what_is_not_kept(mode: Any) -> None:
    """Dropout draws the same again, and each mode recomputes just what it says."""
    plain, once = ran("none")
    found, counts = ran(mode)
    assert same(found, plain)
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    again = {name: counts[name] - once[name] for name in ("aten::addmm", attention, "aten::tanh")}
    # the output projection's result is what tanh needs, so it is made again; nothing needs what tanh makes but dropout
    assert (
        again
        == {
            "full": {"aten::addmm": 2 * UNITS, attention: UNITS, "aten::tanh": UNITS},
            "selective": {"aten::addmm": 0, attention: 0, "aten::tanh": UNITS},
            "2": {"aten::addmm": 6, attention: 3, "aten::tanh": 3},
            "{'save': ['attention']}": {"aten::addmm": 2 * UNITS, attention: 0, "aten::tanh": UNITS},
            "{'save': ['every_second_matmul', 'aten::tanh'], 'every': 2}": {"aten::addmm": 3, attention: 3, "aten::tanh": 0},
        }[str(mode)]
    )


def test_dropout_that_draws_anew_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from l3m_like.distributed import activations

    real = activations.checkpoint
    monkeypatch.setattr(activations, "checkpoint", lambda *args, **kwargs: real(*args, preserve_rng_state=False, **kwargs))
    assert not same(ran("full")[0], ran("none")[0])


@pytest.mark.parametrize(
    "name",
    [
        "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention", "aten::_flash_attention_forward", "torch_attn::_varlen_attn",
        "higher_order::flex_attention", "flash_attn::_flash_attn_varlen_forward", "flash_attn_3::fwd", "l3m_like::attention",
    ],
)  # fmt: skip
def test_attention_of_every_backend_is_known(name: str) -> None:
    assert is_attention(name)
    assert not is_attention(name.replace("forward", "") + "_backward")


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("ful", "it is none, full, selective or a number n"),
        (0, "it is none, full, selective or a number n"),
        (True, "it is none, full, selective or a number n"),
        ({"save": []}, "it is none, full, selective or a number n"),
        ({"save": ["attention"], "every": 0}, "it is none, full, selective or a number n"),
        ({"sav": ["attention"]}, "has no setting 'sav'. Did you mean 'save'?"),
        ({"save": ["atention"]}, "'atention' is neither a group (matmul, attention, .*Did you mean 'attention'?"),
        ({"save": ["aten::mmm"]}, "'aten::mmm' is neither .*Did you mean 'aten::mm'?"),
    ],
)
def test_modes_are_checked(mode: Any, message: str) -> None:
    import re

    with pytest.raises(UserError, match=re.escape(message).replace(r"\.\*", ".*")):
        Checkpointing.of(mode)


# ---- offload -------------------------------------------------------------------------------------------------------------


def wrapped(layers: nn.ModuleList, mode: Any, compiled: bool, **settings: int) -> tuple[Offload, Graphs]:
    graphs = Graphs(backend="aot_eager_decomp_partition")
    apply_checkpointing(list(layers), mode)
    if compiled:
        graphs.compile(list(layers))
    return apply_offload(list(layers), torch.device("cpu"), smallest=1, **settings), graphs


@pytest.mark.parametrize("settings", [{}, {"keep": 2, "every": 2}], ids=str)
@pytest.mark.parametrize(
    ("mode", "compiled"), [("none", False), ("full", False), ("none", True), ("full", True), ("selective", True)]
)
def test_offload_changes_no_bit(mode: Any, compiled: bool, settings: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    reference = units()
    apply_checkpointing(list(reference), mode)
    if compiled:
        Graphs(backend="aot_eager_decomp_partition").compile(list(reference))
    expected = gradients(reference, 3)
    layers = units()
    offload, _ = wrapped(layers, mode, compiled, **settings)
    copied: list[tuple[int, int]] = []
    copy = offload.copy
    monkeypatch.setattr(
        offload, "copy", lambda pairs: copied.append((len(pairs), sum(p[0].numel() for p in pairs))) or copy(pairs)
    )
    assert same(gradients(layers, 3), expected)
    gone = len(range(0, UNITS - settings.get("keep", 1), settings.get("every", 1)))
    assert len(copied) == 2 * 3 * gone
    first, last = copied[: 2 * gone], copied[-2 * gone :]
    assert first == last and first[:gone] == first[: gone - 1 : -1]  # out, and back in the opposite order
    if mode == "full" and not compiled:  # compiled, the states of the random generator are saved as well
        assert all(count == 1 and size == 4 * B * S * D for count, size in first)  # a unit's input
    # every step uses the buffers of the one before
    buffers = [buffer for found in offload._free.values() for buffer in found]
    assert len(buffers) == sum(count for count, _ in first[:gone])


def test_what_stays() -> None:
    """Parameters, tables, and tensors that are small; an evaluation moves nothing."""
    layers = units()
    apply_offload(list(layers), torch.device("cpu"), smallest=1)
    seen: list[int] = []
    pack = Pass.pack

    def watched(self: Pass, tensor: Tensor) -> Any:
        packed = pack(self, tensor)
        if self.number == 1:
            seen.append(-tensor.numel() if isinstance(packed, Saved) else tensor.numel())
        return packed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pass, "pack", watched)
        gradients(layers)
    stay, go = [size for size in seen if size > 0], [-size for size in seen if size < 0]
    assert set(stay) == {S * D, 3 * D * D, D * D} and set(go) >= {B * S * D}, (stay, go)
    small = units()
    offload = apply_offload(list(small), torch.device("cpu"), smallest=1 << 20)
    assert same(gradients(small), gradients(units())) and not offload._free
    with torch.no_grad():
        offload.last = None
        gradients_off = small[0](torch.randn(B, S, D), (torch.rand(S, D), torch.rand(S, D)))
    assert offload.last is None and not gradients_off.requires_grad


def test_a_second_backward_pass_and_an_abandoned_forward() -> None:
    layers = units().eval()
    offload = apply_offload(list(layers), torch.device("cpu"), smallest=1)
    start = torch.randn(B, S, D, requires_grad=True)
    table = torch.rand(S, D), torch.rand(S, D)

    def forward() -> Tensor:
        x = start
        for layer in layers:
            x = layer(x, table)
        return x.sum()

    loss = forward()
    (first,) = torch.autograd.grad(loss, start, retain_graph=True)
    assert torch.equal(torch.autograd.grad(loss, start)[0], first)
    taken = sum(map(len, offload._free.values()))
    forward()
    assert sum(map(len, offload._free.values())) == taken > 0  # all came back
    assert torch.equal(torch.autograd.grad(forward(), start)[0], first)


def test_less_is_alive() -> None:
    """Bytes on the device, followed on meta: what the forward pass keeps, and the peak."""
    from l3m_like.training.memory import LiveBytes

    def bytes_of(**settings: int) -> tuple[int, int]:
        layers = units().to("meta")
        if settings:
            apply_offload(list(layers), torch.device("meta"), **settings)
        x = torch.randn(64, S, D, device="meta", requires_grad=True)  # large beside the gradients of parameters
        table = torch.rand(S, D, device="meta"), torch.rand(S, D, device="meta")
        with LiveBytes([*layers.parameters(), x, *table]) as live:
            for layer in layers:
                x = layer(x, table)
            saved = live.now
            x.sum().backward()
        return saved, live.peak

    whole, offloaded = bytes_of(), bytes_of(keep=1, smallest=1)
    assert offloaded[0] < 0.3 * whole[0] and offloaded[1] < 0.7 * whole[1]


@pytest.mark.parametrize("mode", ["selective", {"save": ["attention"]}])
def test_what_cannot_be_offloaded_is_refused(mode: Any) -> None:
    with pytest.raises(UserError, match="needs parallel.compile: true"):
        refuse_hidden(mode, compiled=False)
    refuse_hidden(mode, compiled=True)
    refuse_hidden("full", compiled=False)
    with pytest.raises(UserError, match="parallel.offload.keep is 5, and there are 5 units"):
        apply_offload(list(units()), torch.device("cpu"), keep=UNITS)


# ---- compiled units ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_equal_units_share_one_graph(mode: Any, caplog: pytest.LogCaptureFixture) -> None:
    layers, graphs = units(), Graphs(limit=2, backend="aot_eager")
    apply_checkpointing(list(layers), mode)
    graphs.compile(list(layers))
    gradients(layers, 2)
    assert graphs.counts == {"Unit": {"training": 1, "evaluation": 0}}
    assert graphs.news() == {"graphs": {"Unit": {"training": 1, "evaluation": 0}}, "recompiles": 0} and graphs.news() == {}
    x, table = torch.randn(B, S, D), (torch.rand(S, D), torch.rand(S, D))
    with torch.no_grad():
        for layer in layers:
            layer(x, table)
    assert graphs.counts == {"Unit": {"training": 1, "evaluation": 1}} and graphs.late == 0
    for _ in range(3):
        graphs.after_step()
    x.requires_grad_()
    with caplog.at_level(logging.WARNING, logger="l3m_like.distributed.compiled"):
        layers[0](x[:, :4], (table[0][:4], table[1][:4]))  # a changed shape is a second graph, and visible
    assert graphs.counts["Unit"]["training"] == 2 and graphs.late == 1 and graphs.news()["recompiles"] == 1
    assert "Unit was compiled again for training (graph 2)" in caplog.text and "size mismatch" in caplog.text
    with pytest.raises(UserError, match="Unit has 3 graphs for training, and parallel.compile_limit is 2.*size mismatch"):
        layers[0](x[:, :2], (table[0][:2], table[1][:2]))
    assert str(graphs) == "Unit 3 + 1 for evaluation, 2 recompiled after step 3"


class Broken(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        torch._dynamo.graph_break()
        return x.sin()


def test_a_unit_in_pieces_is_told(caplog: pytest.LogCaptureFixture) -> None:
    graphs, layer = Graphs(backend="aot_eager"), Broken(D, D)
    graphs.compile([layer])
    with caplog.at_level(logging.WARNING, logger="l3m_like.distributed.compiled"):
        layer(torch.randn(B, D, requires_grad=True))
    assert "Broken was compiled in 2 pieces, with Python between them: Call to `torch._dynamo.graph_break()`" in caplog.text


@pytest.mark.parametrize("kind", ["transformer", "diffusion"])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_are_one_graph(kind: str, bias: bool, caplog: pytest.LogCaptureFixture) -> None:
    mixer = partial(Attention, num_heads=2, bias=bias)
    layer: Any = DiTLayer(D, mixer=mixer, mlp=MLP) if kind == "diffusion" else TransformerLayer(D, mixer=mixer, mlp=MLP)
    graphs = Graphs(backend="aot_eager")
    graphs.compile([layer])
    with caplog.at_level(logging.WARNING, logger="l3m_like.distributed.compiled"):
        layer(torch.randn(2, 512, D, requires_grad=True), torch.randn(2, D) if kind == "diffusion" else None).sum().backward()
    assert graphs.counts == {type(layer).__name__: {"training": 1, "evaluation": 0}} and not caplog.text


def test_checkpointing_is_inside_of_the_graph() -> None:
    """Of a unit that keeps attention and matmuls, the compiled backward has less to do than of one that keeps nothing."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def matmuls(mode: Any) -> tuple[int, int]:
        """In the forward and the backward graph."""
        found: list[int] = []

        def count(graph: Any, inputs: Any) -> Any:
            found.append(sum("mm" in str(node.target) for node in graph.graph.nodes if node.op == "call_function"))
            return graph.forward

        layers = units()[:1].eval()
        apply_checkpointing(list(layers), mode)
        backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)
        Graphs(backend=backend).compile(list(layers))
        gradients(layers)
        torch._dynamo.reset()
        return found[0], found[1]

    forward, backward = matmuls("selective")
    assert matmuls("full") == (forward, backward + 2)
    assert matmuls({"save": ["attention"]})[1] >= backward
