"""Losses of routers against their papers' formulas, token by token."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from l3m_like.blocks import Transformer
from l3m_like.core.errors import UserError
from l3m_like.layers import Attention, MoE, Router, TransformerLayer
from l3m_like.losses import LoadBalance, LoadViolation, RouterZ, RowLoadBalance
from l3m_like.training.updates import Update, refuse_split

L, B, S, E, K, D = 3, 4, 6, 5, 2, 8


def routed() -> tuple[dict[str, Tensor], list[Tensor], list[Tensor], Tensor]:
    """What a trunk writes, and of each layer the scores [B, S, E] and the choices [B, S, K]; some tokens are padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(B, S, dtype=torch.int32)
    ids[1, 4:], ids[3] = -1, -1
    kept, scores, choices = [], [], []
    for _ in range(L):
        router = Router(D, E, K).double()
        router.weight.data = torch.randn(E, D, generator=generator, dtype=torch.float64)
        x = torch.randn(B, S, D, generator=generator, dtype=torch.float64)
        kept.append(router(x, ids >= 0)[2])
        scores.append((x @ router.weight.mT).softmax(-1))
        choices.append(router(x)[1])
    load, probability, z = (torch.stack(values) for values in zip(*kept, strict=True))
    data = {"text_router_load": load, "text_router_probability": probability, "text_router_z": z, "text_document_ids": ids}
    return data, scores, choices, ids


def value(loss: object, data: dict[str, Tensor]) -> Tensor:
    total = float(loss.count_of(data))  # type: ignore[attr-defined]
    out, count = loss.term(data, total)  # type: ignore[attr-defined]
    return out / count


def number(loss: object, data: dict[str, Tensor]) -> float:
    return value(loss, data).item()


def test_row_load_balance_is_the_formula() -> None:
    """arXiv:2412.19437, eq. 17 to 20, of every row and layer, then the mean over rows."""
    data, scores, choices, ids = routed()
    wanted = 0.0
    for s, chosen in zip(scores, choices, strict=True):
        for row in range(3):  # the fourth is all padding
            real = ids[row] >= 0
            length = int(real.sum())
            for e in range(E):
                f = E / (K * length) * float((chosen[row][real] == e).sum())
                p = float(s[row][real][:, e].detach().sum()) / length
                wanted += f * p / 3
    assert abs(number(RowLoadBalance(stream="text"), data) - wanted) < 1e-12


def test_load_balance_is_the_formula() -> None:
    """arXiv:2101.03961, eq. 4 to 6, over the tokens of all layers."""
    data, scores, choices, ids = routed()
    real = ids >= 0
    tokens = torch.cat([s[real] for s in scores])
    chosen = torch.cat([c[real] for c in choices])
    f = torch.stack([(chosen == e).double().sum(1).mean() for e in range(E)])
    wanted = E * (f * tokens.mean(0)).sum()
    torch.testing.assert_close(value(LoadBalance(stream="text"), data), wanted)


def test_even_loads_are_the_least() -> None:
    load = torch.full((1, 2, E), 4.0)
    data = {"text_router_load": load, "text_router_probability": load / K}
    data["text_document_ids"] = torch.zeros(2, E * 4 // K, dtype=torch.int32)
    assert abs(number(LoadBalance(stream="text"), data) - K) < 1e-6
    assert abs(number(RowLoadBalance(stream="text"), data) - 1) < 1e-6
    assert number(LoadViolation(stream="text"), data) == 0


def test_violation_and_z() -> None:
    data, scores, choices, ids = routed()
    real = ids >= 0
    violation = 0.0
    for chosen in choices:
        load = torch.bincount(chosen[real].flatten(), minlength=E).double()
        violation += float(load.max() / load.mean() - 1) / L
    assert abs(number(LoadViolation(stream="text"), data) - violation) < 1e-12
    assert number(RouterZ(stream="text"), data) > 0


def test_z_is_the_formula() -> None:
    router = Router(D, E, K).double()
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    data = {"text_router_z": router(x)[2].z.unsqueeze(0), "text_document_ids": torch.zeros(2, 3, dtype=torch.int32)}
    wanted = (x @ router.weight.mT).exp().sum(-1).log().square().mean()
    torch.testing.assert_close(value(RouterZ(stream="text"), data), wanted)


def test_gradients_reach_the_scores_and_not_the_loads() -> None:
    data, *_ = routed()
    for loss in (LoadBalance(stream="text"), RowLoadBalance(stream="text")):
        (grad,) = torch.autograd.grad(value(loss, data), data["text_router_probability"], retain_graph=True)
        assert grad.isfinite().all() and grad.abs().max() > 0
        assert not data["text_router_load"].requires_grad


def test_the_batch_form_refuses_accumulation() -> None:
    update = Update("main", {}, {"balance": LoadBalance(stream="text")}, ["*"], None)
    with pytest.raises(UserError, match="scope: batch"):
        refuse_split([update], 2, 1)
    refuse_split([Update("main", {}, {"balance": RowLoadBalance(stream="text")}, ["*"], None)], 2, 1)


class OtherRanks:
    """A mesh on which other ranks have batches of their own."""

    def sum(self, values: Tensor) -> Tensor:
        return values * 2 + torch.arange(values.numel()).view(values.shape)


@pytest.mark.parametrize("kind", [LoadBalance, LoadViolation])
def test_an_evaluation_looks_at_no_other_rank(kind) -> None:
    """Which batches others have at the same time, and whether these count, depends on how many processes there are."""
    data, *_ = routed()
    alone, loss = number(kind(stream="text"), data), kind(stream="text")
    loss.bind(OtherRanks())
    assert number(loss, data) != alone  # in training, all ranks' batches are one
    with torch.no_grad():
        assert number(loss, data) == alone


def test_of_a_clean_copy_nothing_is_counted() -> None:
    """Rows of block diffusion: losses are of the noisy half, and are divided by its tokens."""
    layer = partial(TransformerLayer, mixer=partial(Attention, num_heads=2), mlp=partial(MoE, hidden_dim=8, experts=E, top_k=K))
    ports = ["hidden", "router_load", "router_probability", "router_z"]
    trunk = Transformer(D, L, layer, mask="staged", writes=ports, stream="paired").double()  # type: ignore[arg-type]
    for p in trunk.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(B, S, dtype=torch.int32)
    ids[0, 4:] = -1
    stages = 2 * (torch.arange(S) // 2).expand(B, S)
    x = torch.randn(B, 2 * S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = trunk.compute(x, document_ids=ids.repeat(1, 2), stages=torch.cat((stages, stages + 1), dim=1), outputs=ports)
    tokens = (ids >= 0).sum()
    assert out["router_load"].sum() == L * K * tokens
    data = {f"text_{port}": value for port, value in out.items()} | {"text_document_ids": ids}
    load, probability = (out[port].sum((0, 1)) / (L * tokens) for port in ports[1:3])
    torch.testing.assert_close(value(LoadBalance(stream="text"), data), E * (load * probability).sum())
