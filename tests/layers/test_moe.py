"""Mixtures of experts against their definition, token by token, and what their routers report."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.kernels.grouped_linear import grouped_linear
from l3m_like.layers import MoE, Router, TransformerLayer
from l3m_like.layers.moe import RouterLoads

D, FFN, E, K, B, S = 16, 24, 8, 3, 2, 7

ROUTERS = {
    "qwen3": partial(Router),
    "not normalized": partial(Router, normalize=False, scale=1.5),
    "deepseek v2": partial(Router, normalize=False, groups=4, kept_groups=2, group_top=1, scale=16.0),
    "deepseek v3": partial(Router, score="sigmoid", groups=4, kept_groups=2, scale=2.5, bias_rate=1e-3),
}


def moe_of(name: str, shared: int | None = None) -> MoE:
    moe = MoE(D, hidden_dim=FFN, experts=E, top_k=K, router=ROUTERS[name], shared_hidden_dim=shared).double()
    generator = torch.Generator().manual_seed(0)
    for tensor in (*moe.parameters(), *moe.buffers()):
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.5)
    return moe


def tokens_of(seed: int = 1) -> Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def choice_of(moe: MoE, x: Tensor) -> tuple[list[int], Tensor]:
    """A token's experts and their weights, by the papers."""
    router = moe.router
    logits = router.weight @ x
    scores = logits.softmax(0) if router.score == "softmax" else torch.sigmoid(logits)
    choice = (scores if router.bias is None else scores + router.bias).tolist()
    size = E // router.groups
    groups = [choice[g * size : (g + 1) * size] for g in range(router.groups)]
    best = sorted(range(router.groups), key=lambda g: -sum(sorted(groups[g])[-router.group_top :]))[: router.kept_groups]
    allowed = [e for e in range(E) if e // size in best]
    chosen = sorted(allowed, key=lambda e: -choice[e])[:K]
    weights = scores[chosen]
    return chosen, (weights / weights.sum() if router.normalize else weights) * router.scale


def by_definition(moe: MoE, x: Tensor) -> Tensor:
    rows = []
    for token in x.flatten(0, 1):
        out = torch.zeros(D, dtype=x.dtype) if moe.shared is None else moe.shared(token)
        for expert, weight in zip(*choice_of(moe, token), strict=True):
            gate, up, down = (getattr(moe.experts, name)[expert] for name in ("gate", "up", "down"))
            out = out + weight * (down @ (F.silu(gate @ token) * (up @ token)))
        rows.append(out)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("shared", [None, 10])
@pytest.mark.parametrize("name", ROUTERS)
def test_equals_the_definition(name: str, shared: int | None) -> None:
    moe, x = moe_of(name, shared), tokens_of().requires_grad_()
    results = []
    for forward in (lambda x: moe(x)[0], partial(by_definition, moe)):
        out = forward(x)
        wanted = [x, *moe.parameters()]
        results.append((out, *torch.autograd.grad((out * tokens_of(2)).sum(), wanted)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_reports_what_it_did_without_padding() -> None:
    moe, x = moe_of("deepseek v3"), tokens_of()
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[0, 5:] = False
    routing = moe(x, valid)[1]
    load, probability, z = torch.zeros(B, E), torch.zeros(B, E), torch.zeros(B)
    for row, place in valid.nonzero().tolist():
        logits = moe.router.weight @ x[row, place]
        load[row, choice_of(moe, x[row, place])[0]] += 1
        probability[row] += (torch.sigmoid(logits) / torch.sigmoid(logits).sum()).float()
        z[row] += logits.logsumexp(0).square().float()
    assert torch.equal(routing.load.float(), load) and load.sum() == K * valid.sum()
    torch.testing.assert_close(routing.probability.float(), probability)
    torch.testing.assert_close(routing.z.float(), z)
    assert not routing.load.requires_grad and routing.probability.requires_grad
    # padding has its output as any token has
    torch.testing.assert_close(moe(x, valid)[0], moe(x)[0])


def test_the_bias_chooses_and_does_not_weigh() -> None:
    moe, x = moe_of("deepseek v3"), tokens_of()
    moe.router.groups = 1
    assert moe.router.bias is not None
    moe.router.bias.zero_()
    moe.router.bias[5] = 10.0
    weights, indices, _ = moe.router(x)
    assert bool((indices == 5).any(-1).all())
    scores = (x @ moe.router.weight.mT).sigmoid().gather(-1, indices)
    torch.testing.assert_close(weights, 2.5 * scores / scores.sum(-1, keepdim=True))


def test_moving_the_bias_balances_a_skewed_router() -> None:
    """Every token likes expert 0 best; its load falls to the mean, and the mean of the biases stays."""
    router = Router(D, E, 2, score="sigmoid", bias_rate=0.02)
    torch.nn.init.normal_(router.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    router.weight.data[0] += 0.3
    x = torch.randn(4, 64, D, generator=torch.Generator().manual_seed(3)) + 1.0
    loads = RouterLoads([router])
    found = []
    for _ in range(60):
        for micro in x.chunk(2):
            loads.add(router(micro)[2].load.unsqueeze(0))
        found.append(router(x)[2].load.sum(0))
        loads.step(lambda load: load)
    even = 4 * 64 * 2 / E
    assert found[0].max() > 3.5 * even
    assert found[-1].max() < 1.4 * even
    assert router.bias is not None and abs(router.bias.sum()) < 1e-5
    assert router.bias[0] == router.bias.min()


def test_one_move_is_the_formula() -> None:
    router = Router(D, 4, 1, score="sigmoid", bias_rate=0.1)
    router.move(torch.tensor([10.0, 0.0, 2.0, 4.0]))  # mean 4: signs -1, 1, 1, 0, whose mean is 0.25
    assert router.bias is not None
    torch.testing.assert_close(router.bias, torch.tensor([-0.125, 0.075, 0.075, -0.025]))
    kept = Router(D, 4, 1, bias_rate=0.0)
    kept.move(torch.tensor([10.0, 0.0, 2.0, 4.0]))
    assert kept.bias is not None and not kept.bias.any()


def test_the_bias_of_a_frozen_router_and_of_a_skipped_step_stays() -> None:
    router = Router(D, 4, 1, score="sigmoid", bias_rate=0.1)
    assert router.bias is not None
    uneven = torch.tensor([[[10.0, 0.0, 2.0, 4.0]]])
    for trained, skipped in ((False, 0.0), (True, 1.0), (True, 0.0)):
        router.weight.requires_grad_(trained)
        loads = RouterLoads([router])
        loads.add(uneven)
        loads.step(lambda load: load, torch.tensor(skipped))
        assert bool(router.bias.any()) == (trained and not skipped)


def test_the_bias_stays_wide_in_half_precision() -> None:
    """Neighbours in float32 are one number in bfloat16."""
    moe = MoE(D, hidden_dim=FFN, experts=4, top_k=1, router=partial(Router, score="sigmoid", bias_rate=0.1))
    values = torch.tensor([0.1010, 0.1011, 0.1012, 0.1013])
    moe.router.bias.copy_(values)
    moe.to(torch.bfloat16)
    assert moe.router.weight.dtype == torch.bfloat16 and torch.equal(moe.router.bias, values)
    with torch.device("meta"):
        empty = MoE(D, hidden_dim=FFN, experts=4, top_k=1, router=partial(Router, bias_rate=0.1)).to(torch.bfloat16)
    assert empty.router.bias.dtype == torch.float32


def test_empty_groups_have_zero_gradients() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    out = grouped_linear(x, weight, ends)
    torch.testing.assert_close(out, torch.cat((x[:2] @ weight[1].mT, x[2:] @ weight[3].mT)))
    assert torch.autograd.gradcheck(lambda a, b: grouped_linear(a, b, ends), (x, weight))
    out.sum().backward()
    assert weight.grad is not None and not weight.grad[[0, 2]].any() and weight.grad[[1, 3]].all()


def test_shapes_do_not_depend_on_the_routing() -> None:
    layer = partial(MoE, hidden_dim=FFN, experts=E, top_k=K)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.device("meta"):
            moe = layer(D).to(dtype)
            out, routing = moe(torch.empty(B, S, D, dtype=dtype))
        assert out.shape == (B, S, D) and out.dtype == dtype
        assert routing.load.shape == (B, E) and routing.load.dtype == torch.float32
        out.sum().backward()
        assert moe.experts.gate.grad is not None and moe.experts.gate.grad.shape == (E, FFN, D)


def test_flops_are_those_of_the_experts_in_use() -> None:
    assert moe_of("qwen3").flops(10) == 10 * (2 * D * E + K * 6 * D * FFN)
    assert moe_of("qwen3", shared=5).flops(10) == 10 * (2 * D * E + K * 6 * D * FFN + 6 * D * 5)


def test_a_layer_hands_the_routing_on() -> None:
    from l3m_like.layers import Attention

    layer = TransformerLayer(D, mixer=partial(Attention, num_heads=2), mlp=partial(MoE, hidden_dim=FFN, experts=E, top_k=K))
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.1)
    out, routing = layer(tokens_of().float())
    assert out.shape == (B, S, D) and routing.load.sum() == B * S * K


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "relu"}, "no score"),
        ({"groups": 3}, "must divide"),
        ({"groups": 4, "kept_groups": 5}, "must divide"),
        ({"groups": 8, "kept_groups": 2, "group_top": 1}, "top_k is 3"),
        ({"groups": 4, "kept_groups": 2, "group_top": 3}, "group_top"),
    ],
)
def test_wrong_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Router(D, E, K, **settings)  # type: ignore[arg-type]
