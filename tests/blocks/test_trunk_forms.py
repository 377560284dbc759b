"""Forms of trunks: layers by count, experts in some layers, side by side, ladder residuals, learned positions."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from l3m_like.blocks import PlacedTokenEmbed, TokenEmbed, Transformer
from l3m_like.core.errors import UserError
from l3m_like.kernels.attention import LoweredMask
from l3m_like.layers import Attention, LadderLayer, MoE, ParallelLayer, Rope, SwiGLU, TransformerLayer
from l3m_like.layers.patch_embed import sincos_positions
from tests.parity.rule import check_gradients, check_values

D, H, S = 16, 2, 6
MIXER, MLP = partial(Attention, num_heads=H), partial(SwiGLU, hidden_dim=24)
EXPERTS = partial(TransformerLayer, mixer=MIXER, mlp=partial(MoE, hidden_dim=8, experts=4, top_k=2))
DENSE = partial(TransformerLayer, mixer=MIXER, mlp=MLP)


def trunk_of(layer: Any, num_layers: int = 3, **settings: Any) -> Transformer:
    trunk = Transformer(D, num_layers, layer, Rope(D // H, 1e4), **settings)
    generator = torch.Generator().manual_seed(0)
    for name, p in trunk.named_parameters():
        noise = torch.randn(p.shape, generator=generator) * 0.3
        p.data = (noise + 1 if "norm" in name else noise).double()
    return trunk


def tokens_of(seed: int = 1) -> Tensor:
    return torch.randn(2, S, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_layers_by_count() -> None:
    kinds = {"dense": DENSE, "experts": EXPERTS}

    def made(num_layers: int, **pattern: int | None) -> list[str]:
        return ["experts" if layer.routes else "dense" for layer in trunk_of(kinds, num_layers, pattern=pattern).layers]

    assert made(3, dense=1, experts=2) == made(3, dense=1, experts=None) == ["dense", "experts", "experts"]
    for pattern in ({"dense": 1, "experts": 1}, {"dense": None, "experts": None}, {"dense": 4, "experts": None}):
        with pytest.raises(UserError, match="does not make num_layers"):
            made(3, **pattern)
    with pytest.raises(UserError, match="names no layer"):
        made(3, dense=1, expert=2)


def test_what_routers_did_is_written_if_it_is_named() -> None:
    ids = torch.tensor([[0] * S, [0, 0, 1, 1, -1, -1]])
    kinds = {"dense": DENSE, "experts": EXPERTS}
    trunk = trunk_of(kinds, pattern=["dense", "experts", "experts"], writes=["router_load"], stream="t")
    out = trunk({"t_tokens": tokens_of(), "t_document_ids": ids})
    assert set(out) == {"t_tokens", "t_document_ids", "t_hidden", "t_router_load"}
    assert out["t_router_load"].sum(-1).tolist() == [[2 * S, 2 * 4]] * 2  # two layers; 2 experts for each token
    assert "t_router_load" not in trunk({"t_tokens": tokens_of()}, inference=True)
    with pytest.raises(UserError, match="no layer has experts"):
        trunk_of(DENSE, writes=["router_z"])


def test_packed_equals_apart_with_experts() -> None:
    trunk = trunk_of(EXPERTS)
    x, ids = tokens_of()[:1], torch.tensor([[0, 0, 0, 0, 1, 1]])
    packed = trunk.compute(x, torch.tensor([[0, 1, 2, 3, 0, 1]]), ids)
    for at in (slice(0, 4), slice(4, 6)):
        torch.testing.assert_close(packed[:, at], trunk.compute(x[:, at]), rtol=1e-10, atol=1e-12)


def modules_of(trunk: Transformer, x: Tensor) -> list[Any]:
    """Every attention and MLP after its norm, as functions of a stream."""
    rope, mask = Rope(D // H, 1e4)(torch.arange(S), torch.float64), LoweredMask(causal=True)
    found: list[Any] = []
    for layer in trunk.layers:
        found.append(lambda x, layer=layer: layer.mixer(layer.norm_1(x), rope, mask))
        found.append(lambda x, layer=layer: layer.mlp(layer.norm_2(x)))
    return found


def test_ladder_residual_is_the_formula() -> None:
    """x_i = x_{i-1} + h_i(x_{i-2}), x_{-1} = x_0."""
    trunk, x = trunk_of(partial(LadderLayer, mixer=MIXER, mlp=MLP)), tokens_of()
    streams = [x, x]
    for module in modules_of(trunk, x):
        streams.append(streams[-1] + module(streams[-2]))
    torch.testing.assert_close(trunk.compute(x), streams[-1], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        cache = trunk.make_cache(2, S)
        parts = [trunk.compute(part, cache=cache) for part in x.split([3, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), streams[-1], rtol=1e-12, atol=1e-12)


def test_streams_do_not_mix() -> None:
    kinds = {"a": partial(LadderLayer, mixer=MIXER, mlp=MLP), "b": DENSE}
    with pytest.raises(UserError, match="do not go together"):
        trunk_of(kinds, 2, pattern=["a", "b"])
    for kind in (LadderLayer, ParallelLayer):
        with pytest.raises(UserError, match="takes no experts"):
            kind(D, mixer=MIXER, mlp=partial(MoE, hidden_dim=8, experts=4, top_k=2))


def test_side_by_side() -> None:
    trunk, x = trunk_of(partial(ParallelLayer, mixer=MIXER, mlp=MLP), 1), tokens_of()
    layer = trunk.layers[0]
    normed = layer.norm(x)
    rope = Rope(D // H, 1e4)(torch.arange(S), torch.float64)
    wanted = x + layer.mixer(normed, rope, LoweredMask(causal=True)) + layer.mlp(normed)
    torch.testing.assert_close(trunk.compute(x), wanted)


# ---- keys and values of other layers ---------------------------------------------------------------------------------------

SHARING = partial(TransformerLayer, mixer=partial(Attention, num_heads=4, num_kv_heads=2, qk_norm=True), mlp=MLP)


def sharing(num_layers: int = 5, kv_every: int = 2, layer: Any = SHARING) -> Transformer:
    trunk = Transformer(D, num_layers, layer, Rope(4, 1e4), kv_every=kv_every)
    generator = torch.Generator().manual_seed(0)
    for name, p in trunk.named_parameters():
        noise = torch.randn(p.shape, generator=generator) * 0.3
        p.data = (noise + 1 if "norm" in name else noise).double()
    return trunk


def transcribed(trunk: Transformer, x: Tensor, kv_every: int) -> Tensor:
    """Plain formulas: layer i has its own queries, and the keys and values of layer i - i % kv_every."""

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def heads(x: Tensor, weight: Tensor, norm: Tensor | None) -> Tensor:
        out = (x @ weight.T).unflatten(-1, (-1, 4)).transpose(1, 2)
        if norm is None:
            return out
        out = normed(out, norm)
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * 1e4 ** (-torch.arange(2, dtype=x.dtype) / 2)
        a, b = out.chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    p = dict(trunk.named_parameters())
    hidden = ~torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    for i in range(len(trunk.layers)):
        at, below = f"layers.{i}", f"layers.{i - i % kv_every}.mixer"
        y = normed(x, p[f"{at}.norm_1.weight"])
        q = heads(y, p[f"{at}.mixer.q_proj.weight"], p[f"{at}.mixer.q_norm.weight"])
        if i % kv_every == 0:
            k = heads(y, p[f"{below}.k_proj.weight"], p[f"{below}.k_norm.weight"]).repeat_interleave(2, 1)
            v = heads(y, p[f"{below}.v_proj.weight"], None).repeat_interleave(2, 1)
        scores = (q @ k.mT / 2).masked_fill(hidden, -torch.inf).softmax(-1)
        x = x + (scores @ v).transpose(1, 2).flatten(2) @ p[f"{at}.mixer.out_proj.weight"].T
        y = normed(x, p[f"{at}.norm_2.weight"])
        gate, up, down = (p[f"{at}.mlp.{name}.weight"] for name in ("gate", "up", "down"))
        x = x + (torch.nn.functional.silu(y @ gate.T) * (y @ up.T)) @ down.T
    return x


@pytest.mark.parametrize("kv_every", [2, 3])
def test_shared_keys_and_values_are_the_formula(kv_every: int) -> None:
    trunk, x = sharing(kv_every=kv_every), tokens_of()
    names = [name for name, _ in trunk.named_parameters() if "k_proj" in name]
    assert names == [f"layers.{i}.mixer.k_proj.weight" for i in range(0, 5, kv_every)]
    outputs = [trunk.compute(x), transcribed(trunk, x, kv_every)]
    check_values(outputs[0].detach(), outputs[1].detach())
    wanted = [torch.autograd.grad(out.square().sum(), list(trunk.parameters())) for out in outputs]
    check_gradients(*(dict(zip(dict(trunk.named_parameters()), gradients, strict=True)) for gradients in wanted))
    assert not torch.allclose(outputs[0], transcribed(sharing(kv_every=1), x, 1))


def test_shared_keys_and_values_in_a_cache_and_in_packed_rows() -> None:
    trunk, x = sharing(), tokens_of()
    whole = trunk.compute(x)
    with torch.no_grad():
        cache = trunk.make_cache(2, S)
        parts = [trunk.compute(part, cache=cache) for part in x.split([3, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)
    assert [layer is None for layer in cache.layers] == [False, True, False, True, False]
    ids = torch.tensor([[0, 0, 0, 0, 1, 1]] * 2)
    packed = trunk.compute(x, torch.tensor([[0, 1, 2, 3, 0, 1]]), ids)
    for at in (slice(0, 4), slice(4, 6)):
        torch.testing.assert_close(packed[:, at], trunk.compute(x[:, at]), rtol=1e-10, atol=1e-12)


def test_experts_with_shared_keys_and_values() -> None:
    trunk, x = sharing(2, layer=partial(SHARING, mlp=partial(MoE, hidden_dim=8, experts=4, top_k=2))), tokens_of()
    out = trunk.compute(x, outputs=("hidden", "router_load"))
    assert out["router_load"].shape == (2, 2, 4) and torch.equal(out["hidden"], trunk.compute(x))


def test_flops_and_refusals_of_shared_keys_and_values() -> None:
    x = tokens_of()
    saved = 2 * 2 * S * D * (2 * 8)  # two layers of five have no keys and values: [D, 8] each
    assert sharing(kv_every=1).flops(x) - sharing().flops(x) == 2 * saved
    for layer, kv_every, words in (
        (SHARING, 0, "kv_every is 0"),
        (partial(ParallelLayer, mixer=partial(Attention, num_heads=4), mlp=MLP), 2, "not ParallelLayer of Attention"),
    ):
        with pytest.raises(UserError, match=words):
            sharing(kv_every=kv_every, layer=layer)
    kinds = {"a": SHARING, "b": partial(SHARING, mixer=partial(Attention, num_heads=4))}
    with pytest.raises(UserError, match="layer 1 has other key heads"):
        Transformer(D, 2, kinds, Rope(4, 1e4), pattern=["a", "b"], kv_every=2)


def test_learned_positions() -> None:
    embed = PlacedTokenEmbed(10, 4, max_positions=5)
    ids, positions = torch.tensor([[1, 2, 3]]), torch.tensor([[0, 0, 4]])
    table, places = embed.embed.weight, embed.place.weight
    assert torch.equal(embed.compute(ids), table[ids] + places[:3])
    assert torch.equal(embed.compute(ids, positions), table[ids] + places[positions])
    with pytest.raises(UserError, match="max_positions"):
        embed.compute(torch.zeros(1, 6, dtype=torch.int64))
    assert set(embed.init_spec()) == {name for name, _ in embed.named_parameters()} == {"embed.weight", "place.weight"}
    assert "positions" not in TokenEmbed(10, 4).ports and embed.ports["positions"]


def test_fixed_positions() -> None:
    embed = PlacedTokenEmbed(10, 8, max_positions=5, fixed=True).double()
    ids, positions = torch.tensor([[1, 2, 3]]), torch.tensor([[0, 0, 4]])
    places = sincos_positions(5, 1, 8, torch.float64, torch.device("cpu"))
    assert torch.equal(places[:, :4], torch.tensor([0.0, 0, 1, 1], dtype=torch.float64).expand(5, 4))
    angle = torch.tensor([3.0, 0.03], dtype=torch.float64)
    torch.testing.assert_close(places[3, 4:], torch.cat((angle.sin(), angle.cos())))
    assert torch.equal(embed.compute(ids), embed.embed.weight[ids] + places[:3])
    for many in (1, 3):  # fewer and more of them than the table has rows
        theirs = embed.embed.weight[ids] + places[positions]
        assert torch.equal(embed.compute(ids.repeat(many, 1), positions.repeat(many, 1)), theirs.repeat(many, 1, 1))
    assert set(embed.init_spec()) == {name for name, _ in embed.named_parameters()} == {"embed.weight"}
    assert embed.limits(ids) == {"ids": 10, "positions": 5}  # beyond them a few positions would have sinusoids still
    with pytest.raises(UserError, match="multiple of 4"):
        PlacedTokenEmbed(10, 6, max_positions=5, fixed=True)


@pytest.mark.parametrize("interleaved", [False, True])
def test_shared_keys_are_in_the_order_of_their_queries(interleaved: bool) -> None:
    """A layer with the giver's queries mixes what the giver mixes."""
    layer = partial(TransformerLayer, mixer=partial(Attention, num_heads=H, interleaved=interleaved), mlp=MLP)
    giver, taker = (unit.mixer for unit in trunk_of(layer, 2, kv_every=2).layers)
    for name in ("q_proj", "out_proj"):
        getattr(taker, name).load_state_dict(getattr(giver, name).state_dict())
    rope, mask = Rope(D // H, 1e4)(torch.arange(S), torch.float64), LoweredMask(causal=True)
    out, kv = giver(tokens_of(), rope, mask)
    torch.testing.assert_close(taker(tokens_of(), rope, mask, None, kv), out, rtol=1e-12, atol=1e-12)
