"""bf16 in one process: the arithmetic of FSDP's mixed precision, with fp32 masters that everything else sees."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from l3m_like.config import RunConfig
from l3m_like.core.errors import UserError
from tests.distributed import pool
from tests.distributed.recorder import experiment, whole
from tests.generate.tiny import CONFIGS, OVERRIDES


def trained(name: str, fsdp: bool) -> tuple[list[Tensor], dict[str, Tensor], set[torch.dtype]]:
    """Losses of three steps of two micro-batches, the last gradients, and the dtypes that parameters have."""
    from l3m_like.distributed import parallelize as module
    from l3m_like.distributed.mesh import build_mesh
    from l3m_like.training.init import init_specs, initialize, materialize

    mesh = build_mesh({})
    cfg = experiment(name)
    with torch.device("meta"):
        part = cfg.instantiate("model")
    specs = init_specs(part)
    if fsdp:
        units = [unit for _, block in part.blocks() for unit in block.shard_units()]
        module.apply_fsdp(part, units, mesh, "bf16", True)
    else:
        module.parallelize(part, mesh, precision="bf16")
    materialize(part, torch.device("cpu"))
    initialize(part, 0, "", specs)
    losses, gradients = [], {}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for last in (False, True):
            if fsdp:
                part.set_requires_gradient_sync(last)
            ids = torch.randint(0, 257, (2, 16), generator=generator)
            loss = part({"text_ids": ids, "text_targets": ids})["text_nll"].sum() / 64
            loss.backward()
            losses.append(loss.detach())
        for key, parameter in part.named_parameters():
            grad: Any = parameter.grad
            gradients[key] = grad.full_tensor() if fsdp else grad
            with torch.no_grad():
                parameter.add_(grad.to(parameter.dtype), alpha=-0.1)
            parameter.grad = None
    return losses, gradients, {p.dtype for p in part.parameters()}


def compare() -> list[Any]:
    return [trained("llm", fsdp) for fsdp in (False, True)]


def test_equals_fsdp_of_one_process() -> None:
    ((ours, theirs),) = pool.run(1, compare)
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert torch.equal(a, b)
    assert list(ours[1]) == list(theirs[1]) and ours[2] == theirs[2] == {torch.float32}
    for name, grad in ours[1].items():
        assert grad.dtype == torch.float32  # a sum over two micro-batches
        torch.testing.assert_close(grad, theirs[1][name], rtol=0, atol=0)


def test_copies_follow_their_masters() -> None:
    from l3m_like.distributed.low_precision import LowPrecision

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight  # tied
    LowPrecision(model, torch.bfloat16, leave=())
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        before = model(x)
        assert before.dtype == torch.bfloat16 and model[0].weight is model[1].weight
        dict(model.named_parameters())["0.bias"].add_(1)
        assert not torch.equal(model(x), before)
        model.load_state_dict({name: torch.zeros_like(value) for name, value in model.state_dict().items()})
        assert not model(x).any()
    assert sorted(dict(model.named_parameters())) == ["0.bias", "0.weight", "1.bias"]
    model.requires_grad_(False)
    dict(model.named_parameters())["1.bias"].requires_grad_(True)
    model(x).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    # one that was frozen when the copies were made is trained like the others
    late = torch.nn.Linear(4, 4).requires_grad_(False)
    LowPrecision(late, torch.bfloat16)
    late(x)
    late.requires_grad_(True)
    for name in ("weight", "bias"):
        dict(late.named_parameters())[name].requires_grad_(True)
    late(x).sum().backward()
    assert all(p.grad is not None for p in late.parameters())
    assert grads["0.bias"] is None and grads["0.weight"] is None and grads["1.bias"].dtype == torch.bfloat16


@pytest.mark.parametrize("checkpoint", ["none", "full"])
def test_recomputes(checkpoint: str) -> None:
    from l3m_like.distributed.mesh import build_mesh
    from l3m_like.distributed.parallelize import parallelize
    from l3m_like.training.init import init_specs, initialize, materialize

    cfg = experiment("llm")
    with torch.device("meta"):
        part = cfg.instantiate("model")
    specs = init_specs(part)
    parallelize(part, build_mesh({}), precision="bf16", checkpointing=checkpoint)
    materialize(part, torch.device("cpu"))
    initialize(part, 0, "", specs)
    ids = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(0))
    part({"text_ids": ids, "text_targets": ids})["text_nll"].sum().backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in part.parameters())


def stepped(optimizer: str) -> list[bool]:
    """Of each weight, whether a step has changed it, and its copy is what a forward pass would make of it."""
    from l3m_like.distributed.low_precision import copy_of
    from l3m_like.distributed.mesh import build_mesh
    from l3m_like.distributed.parallelize import parallelize
    from l3m_like.training.init import initialize, materialize
    from l3m_like.training.optim import Guard
    from l3m_like.training.train import plan
    from l3m_like.training.updates import assign_parameters

    cfg, mesh = RunConfig.from_file(CONFIGS / "llm.yaml", [*OVERRIDES["llm"], f"optim.name={optimizer}"]), build_mesh({})
    run = plan(cfg, 1)
    (part,), (update,) = run.parts.values(), run.updates
    parallelize(part, mesh, precision="bf16")
    materialize(part, mesh.device)
    initialize(part, 0)
    assign_parameters(run.updates, dict(part.named_parameters()))
    update.prepare(mesh, Guard(mesh.device, spike=None, window=2))
    before = [p.detach().clone() for p in part.parameters()]
    ids = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        part({"text_ids": ids, "text_targets": ids})["text_nll"].sum().backward()
        update.step(mesh, 1.0)
    part({"text_ids": ids, "text_targets": ids})
    pairs = zip(before, part.parameters(), strict=True)
    return [not torch.equal(old, new) and torch.equal(copy_of(new), new.to(torch.bfloat16)) for old, new in pairs]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_next_forward_sees_what_an_optimizer_has_done(optimizer: str) -> None:
    (changed,) = pool.run(1, stepped, optimizer)
    assert all(changed) and len(changed) > 10


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_are_multiplied_as_one_lie_together(tied: bool) -> None:
    from l3m_like.distributed.low_precision import LowPrecision
    from l3m_like.layers import SwiGLU

    class Apart(SwiGLU):
        joint = ()

    found = []
    for kind in (SwiGLU, Apart):
        torch.manual_seed(0)
        layer = kind(8, hidden_dim=12)
        if tied:
            layer.up.weight = layer.gate.weight
        LowPrecision(layer, torch.bfloat16)
        x = torch.randn(600, 8, dtype=torch.bfloat16)
        for _ in range(2):  # the second step with weights that have moved
            layer(x).square().mean().backward()
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.sub_(parameter.grad.float())
                    parameter.grad = None
        found.append([layer(x), *layer.parameters()])
        joined = getattr(layer.gate, "joined_weight", None)
        assert (joined is not None) == (kind is SwiGLU and not tied)
        if joined is not None:
            assert torch.equal(joined, torch.cat([layer.gate.weight, layer.up.weight]))
            assert layer.up.weight.data_ptr() == joined[12:].data_ptr()
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def read_in_compute(axes: dict[str, int], forgotten: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """What modules with ``full_precision`` make of their parameters in a bf16 run, what it should be, and their gradients."""
    from unittest import mock

    from l3m_like.blocks import LogitScale, NoiseLevelEmbed
    from l3m_like.core import MetaModel
    from l3m_like.distributed.gradients import local
    from l3m_like.distributed.mesh import build_mesh
    from l3m_like.distributed.parallelize import parallelize
    from l3m_like.layers.embedding import FourierFeatures
    from l3m_like.training.init import init_specs, initialize, materialize

    mesh = build_mesh(axes)
    with torch.device("meta"):
        level = NoiseLevelEmbed(3, 8)
        scale = LogitScale(14.3, bias=-9.7, stream="logit", writes=["scale", "bias"])
        part = MetaModel(preprocessor={"level": level, "scale": scale}, stream="image")
    specs = init_specs(part)
    with (
        mock.patch.multiple(LogitScale, full_precision=not forgotten),
        mock.patch.multiple(FourierFeatures, full_precision=not forgotten),
    ):
        parallelize(part, mesh, precision="bf16")
    materialize(part, torch.device("cpu"))
    initialize(part, 0, "", specs)
    masters = {name: whole(p) for name, p in part.named_parameters()}
    waves: list[Tensor] = []
    level.level.features.register_forward_hook(lambda module, args, out: waves.append(out.detach()))
    time = torch.tensor([0.1, 0.9])
    out = part({"image_time": time, "image_class_id": torch.tensor([0, 3])})
    assert out["image_level"].dtype == torch.bfloat16  # the matrices are read in it
    (out["logit_scale"] * 0.37 + out["logit_bias"] * 0.73 + out["image_level"].sum()).sum().backward()
    angle = 2 * math.pi * (1 - time)[:, None] * masters["preprocessor.level.level.features.frequency"]
    scale_name, bias_name = ("preprocessor.scale.log_scale", "preprocessor.scale.bias")
    found = {"wave": waves[0], "scale": out["logit_scale"], "bias": out["logit_bias"]}
    right = {"wave": torch.cat((angle.sin(), angle.cos()), -1)}
    right |= {"scale": masters[scale_name][0].exp(), "bias": masters[bias_name][0]}
    gradients = {name: p.grad for name, p in part.named_parameters() if name in (scale_name, bias_name)}
    found |= {f"gradient of {name}": whole(grad) for name, grad in gradients.items()}
    # every rank adds its own
    right |= {f"gradient of {scale_name}": right["scale"][None] * 0.37 * mesh.dp_size}
    right |= {f"gradient of {bias_name}": torch.tensor([0.73]) * mesh.dp_size}
    assert all(local(p).dtype == torch.float32 for p in part.parameters())
    return {name: (found[name].detach(), value) for name, value in right.items()}


@pytest.mark.parametrize("axes", [{}, {"dp_shard": 2}, {"dp_shard": 1, "tp": 2}], ids=str)
def test_full_precision_is_read_as_stored(axes: dict[str, int]) -> None:
    for pairs in pool.run(max([1, *axes.values()]), read_in_compute, axes, False):
        for name, (found, right) in pairs.items():
            assert found.dtype == torch.float32, name
            torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("axes", [{}, {"dp_shard": 2}], ids=str)
def test_full_precision_forgotten_is_seen(axes: dict[str, int]) -> None:
    for pairs in pool.run(max([1, *axes.values()]), read_in_compute, axes, True):
        for name, (found, right) in pairs.items():
            assert (found.to(right.dtype) - right).abs().max() > 1e-4, name


def test_what_joined_weights_would_get_wrong() -> None:
    import copy

    from l3m_like.distributed.low_precision import LowPrecision
    from l3m_like.layers import SwiGLU

    torch.manual_seed(0)
    layer = SwiGLU(8, hidden_dim=12)
    LowPrecision(layer, torch.bfloat16)
    x = torch.randn(600, 8, dtype=torch.bfloat16, requires_grad=True)
    layer(x)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        dict(other.named_parameters())["up.weight"].add_(1)
    few = torch.cat([other(x[:100]), other(x[100:500]), other(x[500:])])  # too few rows for one product
    torch.testing.assert_close(other(x), few, rtol=0.02, atol=0.02)
    assert not torch.equal(other(x), layer(x))
    with pytest.raises(UserError, match="create_graph"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    called = []
    layer.up.register_full_backward_hook(lambda *_: called.append(True))
    layer(x).sum().backward()
    assert called


def test_a_cast_leaves_full_precision() -> None:
    from l3m_like.blocks import LogitScale
    from l3m_like.core import Frozen

    scale = LogitScale(14.3, bias=-9.7, stream="logit", writes=["scale", "bias"])
    assert {p.dtype for p in Frozen(scale, dtype="bfloat16", random_weights=True).parameters()} == {torch.float32}


def test_a_trained_module_is_freed() -> None:
    """Masters, copies and their hooks hold each other in no way that outlives the module."""
    from l3m_like.distributed.low_precision import LowPrecision, copy_of

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    LowPrecision(model, torch.bfloat16)
    model(torch.randn(2, 4, dtype=torch.bfloat16)).sum().backward()
    left = [weakref.ref(p) for p in model.parameters()] + [weakref.ref(copy_of(p)) for p in model.parameters()]
    del model
    gc.collect()
    assert [one() for one in left] == [None] * len(left)
    x = torch.randn(2, 4, dtype=torch.bfloat16, requires_grad=True)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    LowPrecision(model, torch.bfloat16)
    out = model(x).sum()
    del model
    out.backward()  # what is left of the module is in the graph
    assert x.grad is not None
