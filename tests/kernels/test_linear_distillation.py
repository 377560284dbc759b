"""The chunked divergence between teacher and student against its definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from l3m_like.core.errors import UserError
from l3m_like.kernels.linear_distillation import (
    DIVERGENCES,
    Divergence,
    linear_distillation,
    linear_distillation_reference,
    linear_distillation_top_k,
    linear_top_k,
)

V, D, TEACHER_D = 23, 8, 12
KINDS = [Divergence(kind) for kind in DIVERGENCES] + [Divergence("jensen_shannon", beta=0.1)]
KINDS += [Divergence(kind, temperature=2.5) for kind in DIVERGENCES]


def inputs() -> tuple[Tensor, ...]:
    """hidden, weight, teacher's hidden, teacher's weight, targets."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 9, D), (V, D), (2, 9, TEACHER_D), (V, TEACHER_D))
    hidden, weight, *teacher = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    targets = torch.randint(0, V, (2, 9), generator=draw)
    targets[0, :5] = targets[1, 2] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), *teacher, targets


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("chunk", [5, None])
@pytest.mark.parametrize("upstream", ["sum", "tokens"])
@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_equals_the_definition(divergence: Divergence, upstream: str, chunk: int | None) -> None:
    scale = torch.linspace(-1, 2, 18, dtype=torch.float64).view(2, 9) if upstream == "tokens" else torch.tensor(0.3).double()
    results = []
    for function, more in ((linear_distillation, {"chunk_tokens": chunk}), (linear_distillation_reference, {})):
        hidden, weight, *rest = inputs()
        value = function(hidden, weight, *rest, divergence, **more)
        results.append((value, *torch.autograd.grad((value * scale).sum(), (hidden, weight))))
    close(*results)


@pytest.mark.parametrize("divergence", KINDS[:4], ids=str)
def test_gradcheck_of_the_top_k(divergence: Divergence) -> None:
    hidden, weight, teacher, teacher_weight, targets = inputs()
    hidden, teacher, targets = hidden.detach()[:, 3:6, :3].requires_grad_(), teacher[:, 3:6], targets[:, 3:6]
    weight = weight.detach()[:, :3].requires_grad_()
    top = linear_top_k(teacher, teacher_weight, 5)
    run = lambda h, w: linear_distillation_top_k(h, w, *top, targets, divergence, chunk_tokens=4)  # noqa: E731
    assert torch.autograd.gradcheck(run, (hidden, weight))
    assert (targets == -100).any() and (run(hidden, weight)[targets == -100] == 0).all()


def test_directions_on_two_bernoullis() -> None:
    """p = (0.8, 0.2), q = (0.5, 0.5): KL(p||q) = 0.8 ln 1.6 + 0.2 ln 0.4, KL(q||p) = 0.5 ln 0.625 + 0.5 ln 2.5."""
    teacher, student = torch.tensor([[0.8, 0.2]]).double().log(), torch.tensor([[0.5, 0.5]]).double().log()
    eye, target = torch.eye(2, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    value = {
        kind: float(linear_distillation(student, eye, teacher, eye, target, Divergence(kind, beta=0.25))) for kind in DIVERGENCES
    }
    assert math.isclose(value["forward_kl"], 0.8 * math.log(1.6) + 0.2 * math.log(0.4), rel_tol=1e-12)
    assert math.isclose(value["reverse_kl"], 0.5 * math.log(0.625) + 0.5 * math.log(2.5), rel_tol=1e-12)
    middle = (0.25 * 0.8 + 0.75 * 0.5, 0.25 * 0.2 + 0.75 * 0.5)
    to_middle = [sum(x * math.log(x / m) for x, m in zip(dist, middle, strict=True)) for dist in ((0.8, 0.2), (0.5, 0.5))]
    assert math.isclose(value["jensen_shannon"], 0.25 * to_middle[0] + 0.75 * to_middle[1], rel_tol=1e-12)


@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_a_student_like_its_teacher_has_none(divergence: Divergence) -> None:
    hidden, weight, _, _, targets = inputs()
    value = linear_distillation(hidden, weight, hidden, weight, targets, divergence)
    assert value.abs().max() < 1e-14
    assert all(grad.abs().max() < 1e-13 for grad in torch.autograd.grad(value.sum(), (hidden, weight)))
    if divergence.temperature == 1:
        top = linear_top_k(hidden, weight, 4)
        value = linear_distillation_top_k(hidden, weight, *top, targets, divergence)
        assert value.abs().max() < 1e-14
        assert all(grad.abs().max() < 1e-13 for grad in torch.autograd.grad(value.sum(), (hidden, weight)))


@pytest.mark.parametrize("divergence", KINDS[:4], ids=str)
def test_top_k_grows_to_the_whole(divergence: Divergence) -> None:
    """Merging outcomes never raises a divergence; with all tokens but one it is the whole."""
    hidden, weight, teacher, teacher_weight, targets = inputs()
    totals = []
    for k in (1, 4, 12, V - 1):
        log_probs, ids = linear_top_k(teacher, teacher_weight, k)
        totals.append(linear_distillation_top_k(hidden, weight, log_probs, ids, targets, divergence))
    whole = linear_distillation(hidden, weight, teacher, teacher_weight, targets, divergence)
    for less, more in zip(totals, totals[1:], strict=False):
        assert (less <= more + 1e-14).all()
    torch.testing.assert_close(totals[-1], whole, rtol=1e-7, atol=1e-12)


def test_top_k_of_the_teacher() -> None:
    _, _, teacher, teacher_weight, _ = inputs()
    log_probs, ids = linear_top_k(teacher, teacher_weight, 3, chunk_tokens=4)
    expected = (teacher @ teacher_weight.T).log_softmax(-1).topk(3)
    close(log_probs, expected.values)
    assert torch.equal(ids, expected.indices)


def test_top_k_of_a_certain_teacher() -> None:
    """In float32, what is left of the probability of a teacher with a logit of 30 among zeros keeps its digits."""
    teacher, student = torch.zeros(1, 1, 1000), torch.zeros(1, 1, 1000)
    teacher[..., 7], student[..., 7] = 30.0, 14.0
    eye, targets = torch.eye(1000), torch.zeros(1, 1, dtype=torch.int64)
    rule = Divergence("reverse_kl")
    exact = linear_distillation(student.double(), eye.double(), teacher.double(), eye.double(), targets, rule)
    found = linear_distillation_top_k(student, eye, *linear_top_k(teacher, eye, 10), targets, rule)
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0)


def test_certain_teachers_and_low_precision_stay_finite() -> None:
    """A teacher that is certain, a student that is certain of something else, in bfloat16: no NaN, and no divergence below 0."""
    hidden = torch.full((1, 4, D), 30.0, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    targets = torch.zeros(1, 4, dtype=torch.int64)
    for kind in DIVERGENCES:
        whole = linear_distillation(hidden, weight, -hidden.detach(), weight.detach(), targets, Divergence(kind))
        top = linear_distillation_top_k(hidden, weight, *linear_top_k(-hidden, weight, 3), targets, Divergence(kind))
        for value in (whole, top):
            assert value.dtype == torch.float32 and value.isfinite().all() and (value >= 0).all()
            assert all(grad.isfinite().all() for grad in torch.autograd.grad(value.sum(), (hidden, weight)))


def test_never_all_logits() -> None:
    """Of 40 tokens and 5 at a time, no tensor has more than 5 rows of logits, and none of them is kept."""
    draw = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(40, 4, generator=draw) for _ in range(2))
    weight, teacher_weight = (torch.randn(500, 4, generator=draw) for _ in range(2))
    targets, largest, kept = torch.zeros(40, dtype=torch.int64), 0, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = op(*args, **(kwargs or {}))
            largest = max(largest, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)), 0)
            return out

    with Watch(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        value = linear_distillation(
            hidden.requires_grad_(), weight.requires_grad_(), teacher, teacher_weight, targets, Divergence(), chunk_tokens=5
        )
        value.sum().backward()
    assert largest == 5 * 500 and max(kept) == 500 * 4


def test_runs_on_meta() -> None:
    hidden, teacher = (torch.empty(2, 2048, dim, device="meta", requires_grad=True) for dim in (64, 96))
    weight, teacher_weight = (torch.empty(150_000, dim, device="meta", requires_grad=True) for dim in (64, 96))
    targets = torch.empty(2, 2048, dtype=torch.int64, device="meta")
    value = linear_distillation(hidden, weight, teacher, teacher_weight, targets, Divergence())
    value.sum().backward()
    assert value.shape == (2, 2048) and weight.grad.shape == weight.shape and teacher.grad is None


def test_errors() -> None:
    for settings, message in (
        ({"kind": "forwrd_kl"}, "Did you mean 'forward_kl'"),
        ({"beta": 1.0}, "between 0 and 1"),
        ({"temperature": 0.0}, "above 0"),
    ):
        with pytest.raises(UserError, match=message):
            Divergence(**settings)
    hidden, weight, teacher, teacher_weight, targets = inputs()
    with pytest.raises(UserError, match="only 1 is possible"):
        top = linear_top_k(teacher, teacher_weight, 3)
        linear_distillation_top_k(hidden, weight, *top, targets, Divergence(temperature=2.0))
