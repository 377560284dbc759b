"""Muon's passes over memory against their definitions."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from l3m_like.config.schema import Muon as MuonConfig
from l3m_like.kernels.muon import (
    apply_pass,
    apply_pass_reference,
    momentum_pass,
    momentum_pass_reference,
)
from l3m_like.kernels.scale import scaled, scaled_reference

FULL, HALF = torch.float32, torch.float16
GOOD, BAD = torch.zeros(()), torch.ones(())
#: smaller than a block; more than one, and no whole number of them
SHAPES = [(2, 4, 6), (3, 66, 130)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(shape: tuple[int, ...], *dtypes: torch.dtype | None) -> list[Tensor | None]:
    wide = randn(*shape, seed=1)
    return [None if dtype is None else grad.to(dtype) for grad, dtype in zip(wide, dtypes, strict=False)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtypes", [(FULL,) * 3, (HALF,) * 3, (HALF, FULL, HALF), (FULL, None, None), (None,) * 3], ids=str)
def test_momentum(shape: tuple[int, ...], split: int, nesterov: bool, dtypes: tuple[torch.dtype | None, ...]) -> None:
    grads, momentum = gradients(shape, *dtypes), randn(*shape)
    exact = momentum.double()
    settings = {"mu": 0.9, "nesterov": nesterov, "split": split, "found_inf": GOOD}
    update, norm = momentum_pass(grads, momentum, dtype=torch.float16, grad_scale=torch.tensor(1.7), **settings)
    wide = [None if grad is None else grad.double() for grad in grads]
    scale = torch.tensor(1.7).double()
    wanted, wanted_norm = momentum_pass_reference(wide, exact, dtype=torch.float64, grad_scale=scale, **settings)
    torch.testing.assert_close(momentum.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(update.double(), wanted, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(norm.double(), wanted_norm, rtol=1e-3, atol=0)
    torch.testing.assert_close(norm, torch.linalg.matrix_norm(update.float(), keepdim=True), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("copied", [(True,) * 3, (False,) * 3, (True, False, True)], ids=str)
def test_apply(shape: tuple[int, ...], copied: tuple[bool, ...]) -> None:
    weights, update = [w.clone() for w in randn(*shape)], randn(*shape, seed=1).half()
    copies = [torch.full(shape[1:], 7.0, dtype=torch.float16) if some else None for some in copied[: shape[0]]]
    exact = [w.double() for w in weights]
    apply_pass(weights, update, rate=0.3, decay=0.01, found_inf=GOOD, copies=copies)
    apply_pass_reference(exact, update, rate=0.3, decay=0.01, found_inf=GOOD, copies=[None] * shape[0])
    for weight, wanted, copy in zip(weights, exact, copies, strict=True):
        torch.testing.assert_close(weight.double(), wanted, rtol=1e-6, atol=1e-6)
        assert copy is None or torch.equal(copy, weight.half())


def test_unaligned() -> None:
    """Parts of larger tensors, from the second element on."""
    weight, grad = randn(1001)[1:].view(40, 25), randn(1001, seed=1)[1:].view(40, 25)
    momentum, before = torch.zeros(1, 40, 25), weight.clone()
    update, _ = momentum_pass([grad], momentum, mu=0.9, nesterov=False, dtype=torch.float32, found_inf=GOOD)
    assert torch.equal(update[0], grad)
    apply_pass([weight], update, rate=0.5, decay=0.0, found_inf=GOOD, copies=[None])
    torch.testing.assert_close(weight, before - 0.5 * grad)


@pytest.mark.parametrize(("move", "put"), [(momentum_pass, apply_pass), (momentum_pass_reference, apply_pass_reference)])
def test_a_bad_step_changes_nothing(move: object, put: object) -> None:
    momentum, weight = randn(1, 4, 4), randn(4, 4, seed=1)
    copy = weight.half()
    before = [momentum.clone(), weight.clone(), copy.clone()]
    move([torch.full((4, 4), torch.nan)], momentum, mu=0.9, nesterov=True, dtype=torch.float16, found_inf=BAD)
    put([weight], torch.full((1, 4, 4), torch.nan), rate=1.0, decay=0.1, found_inf=BAD, copies=[copy])
    assert all(torch.equal(a, b) for a, b in zip((momentum, weight, copy), before, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scaled(shape: tuple[int, ...]) -> None:
    x, factor = randn(*shape), torch.rand(shape[0], 1, 1)
    for by in (factor, factor[0, 0, 0]):
        assert torch.equal(scaled(x, by, torch.float16), scaled_reference(x, by, torch.float16))
        assert torch.equal(scaled(x.half(), by, torch.float32), scaled_reference(x.half(), by, torch.float32))


def stepped(fused: bool) -> list[Tensor]:
    """Weights, momentum and copies after steps of several shapes and groups; the third step is bad."""
    from l3m_like.distributed.mesh import build_mesh
    from l3m_like.training.optim import Muon, muon, parameter_groups

    shapes = {"a": (12, 12), "b": (12, 12), "c": (24, 8), "d": (24, 8), "e": (24, 8), "f": (6, 30)}
    parameters = {name: nn.Parameter(randn(*shape, seed=i)) for i, (name, shape) in enumerate(shapes.items())}
    copies = {name: parameter.detach().half() for name, parameter in parameters.items() if name != "b"}
    for name, copy in copies.items():
        parameters[name].low_precision_copy = copy  # type: ignore[attr-defined]
    groups = parameter_groups(
        parameters, lr=0.02, weight_decay=0.1, groups={"slow": {"params": ["d"], "lr_scale": 0.5}}, no_decay=["a"]
    )
    with mock.patch.object(muon, "_IN_WORK_ALONE", 7000), mock.patch.object(muon, "takes", lambda momentum: fused):
        optimizer = Muon(groups, {"a": 3}, MuonConfig(per_head=True), build_mesh({}), torch.float32)
        assert [len(bucket.matrices) for bucket in optimizer.buckets].count(2) == 1
        for step in range(4):
            for i, (name, parameter) in enumerate(parameters.items()):
                parameter.grad = None if name == "f" and step == 1 else randn(*parameter.shape, seed=10 * step + i)
            optimizer.step(torch.tensor(float(step == 2)), torch.tensor(2.0))
    return [*(p.detach() for p in parameters.values()), *optimizer.named_state().values(), *copies.values()]


def test_a_step_is_that_of_the_definitions() -> None:
    for ours, wanted in zip(stepped(True), stepped(False), strict=True):
        bound = 1e-5 if ours.dtype == torch.float32 else 1e-3
        torch.testing.assert_close(ours, wanted, rtol=bound, atol=bound)
