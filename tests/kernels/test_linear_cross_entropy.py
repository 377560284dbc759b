"""The chunked linear + cross-entropy against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from l3m_like.core.errors import UserError
from l3m_like.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

V, D = 23, 8


def inputs(targets: torch.Tensor, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*targets.shape, D, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype)
    return [hidden.requires_grad_(), weight.requires_grad_()]


def some_targets() -> torch.Tensor:
    targets = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(1))
    targets[0, :5] = -100  # with chunks of 4 or 5 tokens, the first one has no target at all
    targets[1, 2] = -100
    return targets


@pytest.mark.parametrize("chunk", [1, 4, 5, 18, 100, None])
@pytest.mark.parametrize("targets", [some_targets(), torch.full((2, 9), -100)], ids=["some", "none"])
def test_equals_the_definition(targets: torch.Tensor, chunk: int | None) -> None:
    scale = torch.linspace(-1, 2, 18, dtype=torch.float64).view(2, 9)  # any gradient from above
    hidden, weight = inputs(targets)
    nll = linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk)
    grads = torch.autograd.grad((nll * scale).sum(), (hidden, weight))
    expected = F.cross_entropy((hidden @ weight.T).mT, targets, reduction="none", ignore_index=-100)
    expected_grads = torch.autograd.grad((expected * scale).sum(), (hidden, weight))
    torch.testing.assert_close(nll, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(linear_cross_entropy_reference(hidden, weight, targets)[0], expected, rtol=1e-12, atol=1e-12)
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-12, atol=1e-12)


def test_no_nan_from_infinite_gradient_at_an_ignored_target() -> None:
    targets = some_targets()
    hidden, weight = inputs(targets)
    nll = linear_cross_entropy(hidden, weight, targets)
    grad = torch.where(targets == -100, float("inf"), 1.0).double()
    assert all(g.isfinite().all() for g in torch.autograd.grad(nll, (hidden, weight), grad))


def test_triton_is_refused_where_it_cannot_run() -> None:
    targets = some_targets()
    with pytest.raises(UserError, match="it needs an NVIDIA GPU"):
        linear_cross_entropy(*inputs(targets), targets, backend="triton")


def test_gradcheck() -> None:
    targets = some_targets()
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, chunk_tokens=4), inputs(targets))


def test_bfloat16_weight_gradient_is_summed_in_float32() -> None:
    """4096 equal small contributions: a sum kept in bfloat16 stalls far below the true one."""
    targets = torch.zeros(1, 4096, dtype=torch.int64)
    hidden = torch.ones(1, 4096, D, dtype=torch.bfloat16)
    weight = torch.zeros(V, D, dtype=torch.bfloat16, requires_grad=True)
    nll = linear_cross_entropy(hidden, weight, targets, chunk_tokens=4)
    assert nll.dtype == torch.float32
    nll.sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad[1].float(), torch.full((D,), 4096 / V), rtol=0.01, atol=0)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("upstream", ["sum", "mean", "tokens", "normalizer", "both"])
@pytest.mark.parametrize("chunk", [4, 100])
def test_every_gradient(upstream: str, softcap: float | None, chunk: int) -> None:
    """One number for all tokens (computed in the forward pass), one for each, and the z-loss."""
    targets = some_targets()
    scale = torch.linspace(-1, 2, 18, dtype=torch.float64).view(2, 9)
    results = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        hidden, weight = inputs(targets)
        if function is linear_cross_entropy:
            nll, norm = function(hidden, weight, targets, softcap=softcap, normalizer=True, chunk_tokens=chunk)
        else:
            nll, norm = function(hidden, weight, targets, softcap=softcap)
        totals = {
            "sum": nll.sum() * 0.3,
            "mean": nll.mean(),
            "tokens": (nll * scale).sum(),
            "normalizer": (norm.square() * scale).sum(),
            "both": nll.sum() + norm.square().sum(),
        }
        results.append((nll, norm, *torch.autograd.grad(totals[upstream], (hidden, weight))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("upstream", ["sum", "tokens", "both"])
@pytest.mark.parametrize("chunk", [4, 100])
def test_weighted_losses(upstream: str, softcap: float | None, chunk: int) -> None:
    """The weights multiply losses and gradients, wherever there is a target; nothing flows into them."""
    targets = some_targets()
    factors = torch.linspace(0, 5, 18).view(2, 9).requires_grad_()  # float32, as they come
    scale = torch.linspace(-1, 2, 18, dtype=torch.float64).view(2, 9)
    results = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        hidden, weight = inputs(targets)
        if function is linear_cross_entropy:
            settings = {"softcap": softcap, "chunk_tokens": chunk, "weights": factors}
            nll, norm = function(hidden, weight, targets, normalizer=True, **settings)
            simple = function(hidden, weight, targets, **settings)
        else:
            nll, norm = function(hidden, weight, targets, softcap=softcap)
            nll = simple = nll * factors.detach().double()
        total = {"sum": simple.sum() * 0.3, "tokens": (simple * scale).sum(), "both": nll.sum() + (norm * scale).sum()}[upstream]
        results.append((nll, simple, norm, *torch.autograd.grad(total, (hidden, weight))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert factors.grad is None
    hidden, weight = inputs(targets)
    expected = linear_cross_entropy(hidden, weight, targets, weights=factors, softcap=softcap, backend="reference")
    torch.testing.assert_close(expected, results[0][1], rtol=1e-12, atol=1e-12)


def products(run) -> int:  # type: ignore[no-untyped-def]
    """Matrix products that ``run`` computes."""

    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.number += op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            return op(*args, **(kwargs or {}))

    with Count() as count:
        run()
    return count.number


def test_logits_are_computed_once_for_a_sum_and_twice_for_weights_that_come_later() -> None:
    targets = some_targets()

    def train(before: torch.Tensor | None, after: torch.Tensor | None) -> None:
        nll = linear_cross_entropy(*inputs(targets), targets, weights=before)
        (nll if after is None else nll * after).sum().backward()

    ones = torch.ones(2, 9, dtype=torch.float64)
    assert products(lambda: train(None, None)) == 3
    assert products(lambda: train(ones, None)) == 3
    assert products(lambda: train(None, ones)) == 6


def test_no_gradient_no_work_for_one() -> None:
    targets = some_targets()
    with torch.no_grad():
        assert products(lambda: linear_cross_entropy(*inputs(targets), targets)) == 1


def test_backward_twice() -> None:
    targets = some_targets()
    hidden, weight = inputs(targets)
    total = linear_cross_entropy(hidden, weight, targets).sum()
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(total, (hidden, weight)), strict=True):
        assert torch.equal(a, b)


def test_names() -> None:
    with pytest.raises(UserError, match="Did you mean 'triton'"):
        linear_cross_entropy(*inputs(some_targets()), some_targets(), backend="tritom")


def test_runs_on_meta_and_saves_no_logits() -> None:
    hidden = torch.empty(4, 2048, 64, device="meta", requires_grad=True)
    weight = torch.empty(150_000, 64, device="meta", requires_grad=True)
    targets = torch.empty(4, 2048, dtype=torch.int64, device="meta")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        nll = linear_cross_entropy(hidden, weight, targets)
    nll.sum().backward()
    assert nll.shape == (4, 2048) and weight.grad.shape == weight.shape
    assert max(saved) == weight.numel()
