"""Blocks against their definitions, their errors and their declared FLOPs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from l3m_like.blocks import (
    DiT,
    DropLabel,
    FlowNoise,
    LanguageModelHead,
    PatchDecode,
    PatchEmbed,
    TimeLabelEmbed,
    TokenEmbed,
    Transformer,
)
from l3m_like.core.errors import UserError
from l3m_like.layers import MLP, Attention, DiTLayer, Rope, SwiGLU, TransformerLayer

V, D, H, HKV, K, FFN = 20, 16, 4, 2, 8, 24


def layer_of(backend: str = "auto", **changes: object) -> partial:
    mixer = partial(
        Attention, **({"num_heads": H, "num_kv_heads": HKV, "head_dim": K, "qk_norm": True, "backend": backend} | changes)
    )
    return partial(TransformerLayer, mixer=mixer, mlp=partial(SwiGLU, hidden_dim=FFN))


def trunk_of(backend: str = "auto", **changes: object) -> Transformer:
    torch.manual_seed(0)
    return Transformer(**({"dim": D, "num_layers": 3, "layer": layer_of(backend), "rope": Rope(K, 100.0)} | changes))


def tokens_of(batch: int = 2, length: int = 6) -> torch.Tensor:
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(1))


# ---- keys ----------------------------------------------------------------------------------------------------------


def test_a_straight_language_model_needs_no_wiring() -> None:
    blocks = [TokenEmbed(V, D, stream="text"), trunk_of(stream="text"), LanguageModelHead(V, D, stream="text", writes=["nll"])]
    data = {"text_ids": torch.zeros(2, 6, dtype=torch.int64), "text_targets": torch.zeros(2, 6, dtype=torch.int64)}
    for block in blocks:
        data = block(data)
    assert set(data) == {"text_ids", "text_targets", "text_tokens", "text_hidden", "text_nll"}
    assert "text_logits" in blocks[-1](data, inference=True)


def test_wrong_argument_of_a_block_is_an_error() -> None:
    with pytest.raises(TypeError, match="vocab_sise"):
        TokenEmbed(V, D, vocab_sise=3)
    with pytest.raises(UserError, match="Did you mean 'tokens'"):
        trunk_of(reads={"token": "x"})


# ---- noise and labels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_flow_noise(path: str) -> None:
    block = FlowNoise(seed=5, path=path, stream="image")
    image, row = torch.rand(512, 2, 4, 4), torch.arange(100, 612)
    noised, time, velocity, weight = block.compute(image, row)
    assert weight.tolist() == [1.0] * 512 and weight.dtype == torch.float32
    t = time.double().view(-1, 1, 1, 1).requires_grad_()
    angle = t * torch.pi / 2
    alpha, sigma = (t, 1 - t) if path == "linear" else (angle.sin(), angle.cos())
    noise = (noised - alpha * image) / sigma
    assert abs(noise[time < 0.9].mean()) < 0.02 and abs(noise[time < 0.9].std() - 1) < 0.02
    # the velocity is the derivative of the path
    (slope,) = torch.autograd.grad((alpha * image + sigma * noise.detach())[:, 0, 0, 0].sum(), t)
    torch.testing.assert_close(velocity[:, 0, 0, 0].double(), slope.flatten(), rtol=1e-3, atol=1e-3)
    assert time.dtype == noised.dtype == torch.float32 and time.min() > 0 and time.max() < 1
    assert abs(time.mean() - 0.5) < 0.05 and abs(time.std() - 12**-0.5) < 0.03
    if path == "linear":
        torch.testing.assert_close(velocity, image - noise.detach().float(), rtol=1e-3, atol=1e-3)


def test_noise_is_a_function_of_seed_stream_and_row() -> None:
    image, row = torch.rand(6, 1, 3, 3), torch.tensor([7, 2, 9, 4, 11, 3])
    noised, time, _, _ = FlowNoise(0, stream="image").compute(image, row)
    order = torch.tensor([5, 0, 3])
    part, part_time, _, _ = FlowNoise(0, stream="image").compute(image[order], row[order])
    assert torch.equal(part, noised[order]) and torch.equal(part_time, time[order])
    for other in (FlowNoise(1, stream="image"), FlowNoise(0, stream="video")):
        assert not torch.equal(other.compute(image, row)[1], time)
    wide, wide_time, velocity, _ = FlowNoise(0, stream="image").compute(image.double(), row)
    assert wide.dtype == velocity.dtype == torch.float64 and torch.equal(wide_time, time)
    torch.testing.assert_close(wide.float(), noised)
    with pytest.raises(UserError, match="Did you mean 'linear'"):
        FlowNoise(0, path="liner")


def test_drop_label() -> None:
    block, row = DropLabel(seed=0, classes=10, probability=0.1, stream="image"), torch.arange(20_000)
    label = row % 10
    class_id = block.compute(label, row)
    dropped = class_id == 10
    assert abs(dropped.double().mean() - 0.1) < 0.01 and torch.equal(class_id[~dropped], label[~dropped])
    assert torch.equal(block.compute(label[50:60], row[50:60]), class_id[50:60])
    assert not (DropLabel(0, 10, 0.0).compute(label, row) == 10).any()
    assert (DropLabel(0, 10, 1.0).compute(label, row) == 10).all()
    with pytest.raises(UserError, match="0 .. 1"):
        DropLabel(0, 10, 1.5)


def test_time_label_embed_adds_time_and_class() -> None:
    block = TimeLabelEmbed(10, D)
    time, label = torch.tensor([0.25, 0.5]), torch.tensor([3, 10])
    torch.testing.assert_close(block.compute(time, label), block.time(time) + block.label.weight[label])


# ---- images --------------------------------------------------------------------------------------------------------


def test_patches_in_and_out() -> None:
    embed = PatchEmbed(8, 4, 1, D)
    assert embed.compute(torch.rand(2, 1, 8, 8)).shape == (2, 4, D)
    with pytest.raises(UserError, match=r"\(3, 8, 8\)"):
        embed.compute(torch.rand(2, 3, 8, 8))
    for make in (lambda: PatchEmbed(9, 4, 1, D), lambda: PatchDecode(D, 9, 4, 1)):
        with pytest.raises(UserError, match="multiple of patch"):
            make()
    with pytest.raises(UserError, match="multiple of 4"):
        PatchEmbed(8, 4, 1, 18)
    with pytest.raises(UserError, match="at least channels"):
        PatchDecode(D, 8, 4, 3, out_channels=2)


def test_patch_decode_keeps_the_first_channels() -> None:
    head = PatchDecode(D, 8, 4, 2, out_channels=4)
    hidden, condition = torch.randn(2, 4, D), torch.randn(2, D)
    image = head.compute(hidden, condition)
    assert image.shape == (2, 2, 8, 8)
    # patch (1, 0), pixel (2, 3) in it, channel 1: the linear map's outputs are in the order (p, p, C)
    shift, scale = F.linear(F.silu(condition), head.modulation.proj.weight, head.modulation.proj.bias).chunk(2, -1)
    x = F.layer_norm(hidden[:, 2], (D,), eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(image[:, 1, 6, 3], head.proj(x)[:, (2 * 4 + 3) * 4 + 1])


# ---- the transformer trunk -----------------------------------------------------------------------------------------


def test_named_layers_and_pattern() -> None:
    wide = partial(TransformerLayer, mixer=partial(Attention, num_heads=2, head_dim=K), mlp=partial(MLP, ratio=2.0))
    trunk = trunk_of(num_layers=6, layer={"a": layer_of(), "b": wide}, pattern=["a", "a", "b"])
    assert [type(unit.mlp).__name__ for unit in trunk.shard_units()] == ["SwiGLU", "SwiGLU", "MLP"] * 2
    assert trunk.compute(tokens_of()).shape == (2, 6, D)
    named = {"a": layer_of(), "b": wide}
    for changes, message in [
        ({"layer": named, "pattern": ["a", "c"], "num_layers": 4}, "names no layer 'c'"),
        ({"layer": named, "pattern": ["a", "b"], "num_layers": 3}, "divides num_layers"),
        ({"layer": named}, "pattern"),
        ({"layer": named, "pattern": ["a"]}, "layer 'b' is not in the pattern"),
        ({"pattern": ["a"]}, "named dict"),
        ({"num_layers": 0}, "at least 1"),
        ({"mask": "casual"}, "Did you mean 'causal'"),
        ({"rope": Rope(16, 100.0)}, "make them equal"),
    ]:
        with pytest.raises(UserError, match=message):
            trunk_of(**changes)


def test_backends_can_be_mixed_and_agree() -> None:
    trunk, ids = trunk_of(), torch.tensor([[0, 0, 1, 1, 1, -1]] * 2)
    mixed = trunk_of(layer={"a": layer_of("reference"), "b": layer_of("sdpa")}, pattern=["a", "b", "a"])
    assert [layer.mixer.backend for layer in mixed.layers] == ["reference", "sdpa", "reference"]
    torch.testing.assert_close(mixed.compute(tokens_of(), None, ids), trunk.compute(tokens_of(), None, ids))


def test_mask_is_lowered_once_for_layers_that_want_it_alike(monkeypatch) -> None:
    from l3m_like.layers import masks

    calls, true = [], masks.lower
    monkeypatch.setattr(masks, "lower", lambda *args, **kind: calls.append(args) or true(*args, **kind))
    trunk_of().compute(tokens_of())
    assert len(calls) == 1
    near = partial(layer_of(), mixer=partial(layer_of().keywords["mixer"], window=2))
    mixed = trunk_of(layer={"near": near, "far": layer_of()}, pattern=["near", "far", "near"])
    out = mixed.compute(tokens_of())
    assert len(calls) == 3 and [call[0].window for call in calls[1:]] == [2, None]
    assert not torch.allclose(out, trunk_of().compute(tokens_of()))


def test_a_mixer_without_attention_gets_the_mask_description() -> None:
    class Shift(torch.nn.Module):
        """Adds the previous token of the same document."""

        def __init__(self, dim: int) -> None:
            super().__init__()

        def forward(self, x, rope, mask, cache):
            same = mask.document_ids[:, 1:] == mask.document_ids[:, :-1]
            return F.pad(x[:, :-1] * same.unsqueeze(-1), (0, 0, 1, 0))

    trunk = trunk_of(layer=partial(TransformerLayer, mixer=Shift, mlp=partial(SwiGLU, hidden_dim=FFN)), num_layers=1)
    x, ids = tokens_of(1, 4), torch.tensor([[0, 0, 1, 1]])
    changed = x.clone()
    changed[:, :2] += 1
    assert torch.equal(trunk.compute(x, None, ids)[:, 2:], trunk.compute(changed, None, ids)[:, 2:])
    assert not torch.equal(trunk.compute(x, None, ids)[:, :2], trunk.compute(changed, None, ids)[:, :2])


def test_prefix() -> None:
    trunk, x = trunk_of(mask="prefix"), tokens_of(1, 6)
    lengths = torch.tensor([3])
    changed = x.clone()
    changed[:, 2] += 1  # seen by the whole prefix, though it is its last token
    a, b = trunk.compute(x, prefix_lengths=lengths), trunk.compute(changed, prefix_lengths=lengths)
    assert not torch.isclose(a[:, 0], b[:, 0]).all()
    changed = x.clone()
    changed[:, 4] += 1
    b = trunk.compute(changed, prefix_lengths=lengths)
    assert torch.equal(a[:, :4], b[:, :4]) and not torch.equal(a[:, 4:], b[:, 4:])


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@torch.no_grad()
def test_generation_with_a_cache_equals_one_forward(backend: str) -> None:
    trunk, x = trunk_of(backend).double(), tokens_of(2, 9).double()
    whole = trunk.compute(x)
    cache = trunk.make_cache(2, 9, "cpu", torch.float64)
    steps = [trunk.compute(part, cache=cache) for part in x.split([4, 1, 1, 2, 1], dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    assert cache.length == 9 and cache.layers[0].k.shape == (2, 9, HKV, K)
    with pytest.raises(UserError, match="raise max_len"):
        trunk.compute(x[:, :1], cache=cache)
    with pytest.raises(UserError, match="made for 2 rows"):
        trunk.compute(x[:1, :1], cache=cache)


@torch.no_grad()
def test_a_cache_forgets() -> None:
    trunk, x = trunk_of().double(), tokens_of(2, 9).double()
    ids = torch.zeros(2, 9, dtype=torch.int32)
    cache = trunk.make_cache(2, 12)
    for wrong in (False, True, False):  # the tokens behind the first five are taken back twice
        start = cache.length
        part = x[:, start:] if not wrong else x[:, start:].flip(1)
        out = trunk.compute(part, document_ids=ids[:, start:], cache=cache)
        cache.truncate(5)
    torch.testing.assert_close(out, trunk.compute(x)[:, 5:])
    with pytest.raises(UserError, match="holds 5 tokens"):
        cache.truncate(6)


@torch.no_grad()
def test_rows_of_unequal_length_in_a_cache() -> None:
    """The shorter row is padded on the left; both rows come out as if alone."""
    trunk, x = trunk_of().double(), tokens_of(2, 7).double()
    ids = torch.zeros(2, 7, dtype=torch.int32)
    ids[1, :2] = -1
    positions = torch.stack((torch.arange(7), (torch.arange(7) - 2).clamp(min=0)))
    cache = trunk.make_cache(2, 7)
    out = [trunk.compute(x[:, at], positions[:, at], ids[:, at], cache=cache) for at in (slice(0, 5), slice(5, 6), slice(6, 7))]
    out = torch.cat(out, 1)
    torch.testing.assert_close(out[:1], trunk.compute(x[:1]))
    torch.testing.assert_close(out[1:, 2:], trunk.compute(x[1:, 2:]))
    cache = trunk.make_cache(2, 7)
    trunk.compute(x[:, :2], positions[:, :2], ids[:, :2], cache=cache)
    with pytest.raises(UserError, match="for all tokens"):
        trunk.compute(x[:, 2:3], cache=cache)


@pytest.mark.parametrize("window", [None, 2])
@torch.no_grad()
def test_packed_rows_in_a_cache(window: int | None) -> None:
    """Every document comes out as if alone, the last one of each row with the tokens that follow."""
    trunk, x = trunk_of().double(), tokens_of(2, 8).double()
    for layer in trunk.layers:
        layer.mixer.window = window
    lengths = ((3, 5), (2, 2, 4))
    ids = torch.tensor([[number for number, length in enumerate(row) for _ in range(length)] for row in lengths])
    positions = torch.tensor([[place for length in row for place in range(length)] for row in lengths])
    cache = trunk.make_cache(2, 8)
    parts = [(part, positions[:, at], ids[:, at]) for part, at in zip(x.split([6, 1, 1], 1), (slice(6), [6], [7]), strict=True)]
    out = torch.cat([trunk.compute(*part, cache=cache) for part in parts], 1)
    for row, sizes in enumerate(lengths):
        for found, alone in zip(out[row].split(sizes), x[row].split(sizes), strict=True):
            torch.testing.assert_close(found, trunk.compute(alone.unsqueeze(0))[0])


def test_a_cache_refuses_gradients() -> None:
    trunk = trunk_of()
    with pytest.raises(UserError, match="no_grad"):
        trunk.compute(tokens_of(), cache=trunk.make_cache(2, 6))


# ---- the language-model head ---------------------------------------------------------------------------------------


def test_language_model_head() -> None:
    head = LanguageModelHead(V, D, 1e-5, stream="text", writes=["logits", "nll"])
    hidden, targets = tokens_of(), torch.randint(0, V, (2, 6), generator=torch.Generator().manual_seed(0))
    targets[0, 2] = -100
    out = head({"text_hidden": hidden, "text_targets": targets})
    normal = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(out["text_logits"], normal @ head.proj.weight.T)
    expected = F.cross_entropy(out["text_logits"].mT, targets, reduction="none", ignore_index=-100)
    torch.testing.assert_close(out["text_nll"], expected)
    with pytest.raises(UserError, match="text_targets"):
        head({"text_hidden": hidden})
    half = head.bfloat16()({"text_hidden": hidden.bfloat16(), "text_targets": targets})
    assert half["text_logits"].dtype == torch.bfloat16 and half["text_nll"].dtype == torch.float32
    with pytest.raises(UserError, match="writes nothing"):
        LanguageModelHead(V, D)


# ---- FLOPs ---------------------------------------------------------------------------------------------------------


def counted(function, *args) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


def test_flops_of_the_transformer() -> None:
    trunk, x = trunk_of("reference", mask="full"), tokens_of(2, 6)
    assert trunk.flops(x) == counted(trunk.compute, x)
    causal = trunk_of("reference")
    per_pair = 3 * 4 * H * K
    assert counted(causal.compute, x) - causal.flops(x) == per_pair * (2 * 36 - 36)  # half of the square
    # documents of 4 and 2, and of 6 with no padding: pairs q >= k
    ids = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]])
    assert causal.flops(x.to("meta"), document_ids=ids) - causal.flops(x) == per_pair * (10 + 3 + 21 - 36)
    assert causal.flops(x.to("meta"), document_ids=ids.to("meta")) == causal.flops(x)


def test_flops_of_the_other_blocks() -> None:
    ids, x = torch.zeros(2, 6, dtype=torch.int64), tokens_of(2, 4)
    embed = TokenEmbed(V, D)
    assert embed.flops(ids) == counted(embed.compute, ids) == 0
    head = LanguageModelHead(V, D, writes=["nll"])
    with torch.no_grad():  # where gradients are wanted, they are computed at once
        assert head.flops(x) == counted(lambda: head.compute(x, torch.zeros(2, 4, dtype=torch.int64), outputs=("nll",)))
    patches, condition = PatchEmbed(8, 4, 1, D), TimeLabelEmbed(10, D)
    image, time, label, vector = torch.rand(2, 1, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.int64), torch.rand(2, D)
    assert patches.flops(image) == counted(patches.compute, image)
    assert condition.flops(time, label) == counted(condition.compute, time, label)
    layer = partial(DiTLayer, mixer=partial(Attention, num_heads=4, bias=True, backend="reference"), mlp=MLP)
    trunk, decode = DiT(D, 2, layer), PatchDecode(D, 8, 4, 1, writes={"image": "pred"})
    assert trunk.flops(x, vector) == counted(trunk.compute, x, vector)
    assert decode.flops(x, vector) == counted(decode.compute, x, vector)
    noise = FlowNoise(0)
    assert noise.flops(image=image, row=label) == 0


# ---- what every block promises -------------------------------------------------------------------------------------


def test_every_parameter_of_the_blocks_is_in_one_plan_and_one_init() -> None:
    for block in (
        TokenEmbed(V, D),
        TimeLabelEmbed(10, D),
        PatchEmbed(8, 4, 1, D),
        PatchDecode(D, 8, 4, 1),
        LanguageModelHead(V, D, writes=["nll"]),
    ):
        drawn, planned = [], set()
        for path, module in block.named_modules():
            prefix = f"{path}." if path else ""
            drawn += [prefix + name for name in getattr(module, "init_spec", dict)()]
            for name in getattr(module, "tp_plan", dict)():
                planned |= {f"{prefix}{name}.{n}" for n, _ in module.get_submodule(name).named_parameters()}
        names = {name for name, _ in block.named_parameters()}
        assert sorted(drawn) == sorted(names) and planned == names, type(block).__name__


def test_everything_runs_on_meta() -> None:
    """No block reads a value of a tensor, and no constant table is a buffer."""
    with torch.device("meta"):
        ids, row = torch.empty(2, 6, dtype=torch.int64), torch.empty(2, dtype=torch.int64)
        trunk = trunk_of()
        head = LanguageModelHead(V, D, writes=["nll"])
        hidden = trunk.compute(TokenEmbed(V, D).compute(ids), ids, ids)
        assert head.compute(hidden, ids, outputs=("nll",))["nll"].shape == (2, 6)
        noised, time, _, _ = FlowNoise(0).compute(torch.empty(2, 1, 8, 8), row)
        vector = TimeLabelEmbed(10, D).compute(time, DropLabel(0, 10, 0.1).compute(row, row))
        dit = DiT(D, 2, partial(DiTLayer, mixer=partial(Attention, num_heads=4), mlp=MLP))
        image = PatchDecode(D, 8, 4, 1).compute(dit.compute(PatchEmbed(8, 4, 1, D).compute(noised), vector), vector)
        assert image.shape == (2, 1, 8, 8) and image.is_meta
        for module in (trunk, head, dit):
            assert not list(module.buffers())


def test_bfloat16_weights_take_float32_inputs() -> None:
    dit = DiT(D, 1, partial(DiTLayer, mixer=partial(Attention, num_heads=4), mlp=MLP)).bfloat16()
    embed, decode = PatchEmbed(8, 4, 1, D).bfloat16(), PatchDecode(D, 8, 4, 1).bfloat16()
    vector = TimeLabelEmbed(10, D).bfloat16().compute(torch.rand(2), torch.zeros(2, dtype=torch.int64))
    tokens = embed.compute(torch.rand(2, 1, 8, 8))
    assert decode.compute(dit.compute(tokens, vector), vector).dtype == tokens.dtype == vector.dtype == torch.bfloat16
    assert trunk_of().bfloat16().compute(tokens_of().bfloat16()).dtype == torch.bfloat16
