"""Layers against torch's own operations and against their definitions."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from l3m_like.core.errors import UserError
from l3m_like.core.init import XavierUniform
from l3m_like.kernels.rope import apply_rope
from l3m_like.layers import (
    MLP,
    Attention,
    AttentionMask,
    DiTLayer,
    LayerNorm,
    Modulation,
    PatchProjection,
    RMSNorm,
    Rope,
    SwiGLU,
    TimeEmbed,
    TransformerLayer,
    lower,
    patchify,
    sincos_positions,
    unpatchify,
)
from l3m_like.layers.linear import joined_bias, joined_output, joint_linear


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    norm = RMSNorm(16, eps=1e-3).to(dtype)
    norm.weight.data = randn(16, dtype=dtype)
    x = randn(2, 3, 16, dtype=dtype)
    wide = x.to(torch.promote_types(dtype, torch.float32))
    normal = (wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt()).to(dtype)
    torch.testing.assert_close(norm(x), normal * norm.weight)
    assert norm(x).dtype == dtype


def test_norms_follow_the_weight_not_the_input() -> None:
    assert RMSNorm(16).bfloat16()(randn(2, 16, dtype=torch.float32)).dtype == torch.bfloat16
    x, zero = randn(2, 1, 16), torch.zeros(2, 1, 16)
    centred = x - x.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(LayerNorm(16).modulated(x, zero, zero), normal)


def test_rope_turns_pairs_by_their_angle() -> None:
    rope = Rope(8, 100.0)
    positions = torch.tensor([[0, 3, 50], [1, 2, 9]])
    cos, sin = rope(positions, torch.float64)
    x = randn(2, 3, 5, 8)
    out = apply_rope(x, cos, sin)
    for i in range(4):
        turn = torch.polar(torch.ones(()).double(), torch.tensor(1.0).double())  # e^(i) ...
        turn = turn ** (positions.double() * 100.0 ** (-2 * i / 8))  # ... to the power of the angle
        expected = torch.complex(x[..., i], x[..., i + 4]) * turn.unsqueeze(-1)
        torch.testing.assert_close(torch.complex(out[..., i], out[..., i + 4]), expected)
    assert torch.equal(out[0, 0], x[0, 0])
    cos, sin = rope(torch.arange(3), torch.bfloat16)
    assert cos.shape == (1, 3, 8) and cos.dtype == torch.float32
    assert apply_rope(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_rope_errors() -> None:
    good = {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
    Rope(8, 1e4, good)
    for scaling, message in [
        ({**good, "type": "dynamic"}, "llama3, yarn"),
        ({**good, "type": "yarn"}, "has no 'low_freq_factor'"),
        ({**good, "facter": 8}, "Did you mean 'factor'"),
        ({k: v for k, v in good.items() if k != "factor"}, "needs factor"),
    ]:
        with pytest.raises(UserError, match=message):
            Rope(8, 1e4, scaling)
    with pytest.raises(UserError, match="even"):
        Rope(7, 1e4)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_against_its_definition(kv_heads: int, backend: str) -> None:
    layer = Attention(24, num_heads=4, num_kv_heads=kv_heads, head_dim=8, bias=True, backend=backend).double()
    x, ids = randn(2, 5, 24), torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, -1, -1]])
    out = layer(x, mask=lower(AttentionMask("causal", ids), backend, 2, 5, 5, x.device))
    expected = torch.zeros(2, 5, 32, dtype=torch.float64)
    q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    for b in range(2):
        for h in range(4):
            g = h // (4 // kv_heads)
            for i in range(5):
                keys = [j for j in range(i + 1) if ids[b, j] == ids[b, i] >= 0]
                if keys:
                    scores = k[b, keys, g * 8 : g * 8 + 8] @ q[b, i, h * 8 : h * 8 + 8] / math.sqrt(8)
                    expected[b, i, h * 8 : h * 8 + 8] = scores.softmax(0) @ v[b, keys, g * 8 : g * 8 + 8]
    torch.testing.assert_close(out, layer.out_proj(expected))


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_that_see_nothing_are_zero_with_zero_gradients(backend: str, dtype: torch.dtype) -> None:
    layer = Attention(16, num_heads=2, backend=backend).to(dtype)
    x = randn(2, 4, 16, dtype=dtype).requires_grad_()
    ids = torch.tensor([[-1, -1, 0, 0], [-1, -1, -1, -1]])
    out = layer(x, mask=lower(AttentionMask("causal", ids), backend, 1, 4, 4, x.device))
    out.square().sum().backward()
    dead = ids < 0
    assert (out[dead] == 0).all() and (x.grad[dead] == 0).all() and (x.grad[~dead] != 0).any()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_attention_derives_heads_from_the_projections() -> None:
    """Under tensor parallelism a projection returns this rank's heads: half of them here."""
    layer = Attention(16, num_heads=4, num_kv_heads=2).double()
    x = randn(1, 3, 16)
    whole = layer(x)
    halves = 0
    for part in range(2):
        half = Attention(16, num_heads=4, num_kv_heads=2).double()
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(half, name).weight.data = getattr(layer, name).weight.chunk(2)[part]
        half.out_proj.weight.data = layer.out_proj.weight.chunk(2, dim=1)[part]
        halves = halves + half(x)
    torch.testing.assert_close(halves, whole)


def test_attention_errors() -> None:
    with pytest.raises(UserError, match="multiple of num_kv_heads"):
        Attention(16, num_heads=4, num_kv_heads=3)
    with pytest.raises(UserError, match="not a multiple of num_heads"):
        Attention(18, num_heads=4)
    with pytest.raises(UserError, match="Did you mean 'sdpa'"):
        Attention(16, num_heads=4, backend="spda")


def test_mlps() -> None:
    x = randn(2, 3, 8)
    swiglu, mlp = SwiGLU(8, hidden_dim=12).double(), MLP(8, ratio=2.0).double()
    gate, up, down = swiglu.gate.weight, swiglu.up.weight, swiglu.down.weight
    torch.testing.assert_close(swiglu(x), ((x @ gate.T) * torch.sigmoid(x @ gate.T) * (x @ up.T)) @ down.T)
    hidden = F.gelu(x @ mlp.up.weight.T + mlp.up.bias, approximate="tanh")
    torch.testing.assert_close(mlp(x), hidden @ mlp.down.weight.T + mlp.down.bias)
    assert mlp.hidden_dim == 16 and MLP(8, hidden_dim=5).hidden_dim == 5
    with pytest.raises(UserError, match="Did you mean 'gelu_tanh'"):
        MLP(8, activation="gelu_tan")


def test_patches_are_a_convolution() -> None:
    image, layer = randn(2, 3, 8, 12), PatchProjection(5, patch=4, channels=3).double()
    conv = F.conv2d(image, layer.proj.weight.view(5, 3, 4, 4), layer.proj.bias, stride=4)
    torch.testing.assert_close(layer(image), conv.flatten(2).mT)
    # the two layouts inside a patch: (C, p, p) going in, (p, p, C) coming out
    patches = patchify(image, 4).view(2, 6, 3, 4, 4).permute(0, 1, 3, 4, 2).flatten(2)
    assert torch.equal(unpatchify(patches, 4, 8, 12), image)


def test_sincos_positions() -> None:
    table = sincos_positions(2, 3, 8, torch.float64, torch.device("cpu"))
    for row in range(2):
        for column in range(3):
            expected = [f(place * w) for place in (column, row) for f in (math.sin, math.cos) for w in (1.0, 0.01)]
            torch.testing.assert_close(table[row * 3 + column], torch.tensor(expected, dtype=torch.float64))


def test_time_embedding() -> None:
    layer, time = TimeEmbed(8, frequencies=6).double(), torch.tensor([0.0, 0.3])
    f = [10000 ** (-i / 3) for i in range(3)]
    wave = torch.tensor(
        [[g(t * w) for g in (math.cos, math.sin) for w in f] for t in time.double().tolist()], dtype=torch.float64
    )
    hidden = wave @ layer.up.weight.T + layer.up.bias
    torch.testing.assert_close(layer(time), (hidden * hidden.sigmoid()) @ layer.down.weight.T + layer.down.bias)


def test_dit_layer_with_zero_modulation_is_the_identity() -> None:
    layer = DiTLayer(16, mixer=partial(Attention, num_heads=2, bias=True), mlp=MLP)
    torch.nn.init.zeros_(layer.modulation.proj.weight)
    torch.nn.init.zeros_(layer.modulation.proj.bias)
    x = randn(2, 3, 16, dtype=torch.float32)
    assert torch.equal(layer(x, randn(2, 16, dtype=torch.float32)), x)


def test_dit_layers_draw_xavier_and_the_fused_fans() -> None:
    layer = DiTLayer(16, mixer=partial(Attention, num_heads=2, bias=True), mlp=MLP)
    spec = layer.mixer.init_spec()
    assert spec["q_proj.weight"].bound((16, 16)) == math.sqrt(6 / (16 + 48)) and spec["out_proj.weight"] == XavierUniform()
    assert layer.mlp.init_spec()["up.weight"] == XavierUniform()
    assert Attention(16, num_heads=2).init_spec()["q_proj.weight"] != XavierUniform()


LAYERS = {
    "attention": Attention(16, num_heads=4, num_kv_heads=2, qk_norm=True, bias=True),
    "attention_plain": Attention(16, num_heads=4),
    "swiglu": SwiGLU(16, hidden_dim=8),
    "mlp": MLP(16),
    "mlp_plain": MLP(16, bias=False),
    "modulation": Modulation(16, 2),
    "time": TimeEmbed(16),
    "patches": PatchProjection(16, patch=2, channels=3),
    "transformer": TransformerLayer(16, mixer=partial(Attention, num_heads=4, qk_norm=True), mlp=partial(SwiGLU, hidden_dim=8)),
    "dit": DiTLayer(16, mixer=partial(Attention, num_heads=4, bias=True), mlp=MLP),
    "dit_rms": DiTLayer(16, mixer=partial(Attention, num_heads=4, bias=True), mlp=MLP, norm="rms"),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_every_parameter_is_in_one_plan_and_one_init(layer: torch.nn.Module) -> None:
    drawn, planned = [], set()
    for path, module in layer.named_modules():
        prefix = f"{path}." if path else ""
        drawn += [prefix + name for name in getattr(module, "init_spec", dict)()]
        for name, style in getattr(module, "tp_plan", dict)().items():
            assert style in ("colwise", "rowwise", "replicated", "summed", "vocab")
            owner, _, leaf = name.rpartition(".")
            target = getattr(module.get_submodule(owner), leaf)
            is_module = isinstance(target, torch.nn.Module)
            planned |= {f"{prefix}{name}.{n}" for n, _ in target.named_parameters()} if is_module else {prefix + name}
    names = {name for name, _ in layer.named_parameters()}
    assert sorted(drawn) == sorted(names) and planned == names


@pytest.mark.parametrize("bias", [False, True])
def test_layers_as_one_product(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, gradients and second gradients; and what is kept for the backward pass are the weights themselves."""
    monkeypatch.setattr("l3m_like.layers.linear._ROWS", 1)
    torch.manual_seed(0)
    layers = [torch.nn.Linear(3, width, bias=bias).double() for width in (2, 4)]
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    parameters = [p for layer in layers for p in layer.parameters()]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        ours = joint_linear(x, *layers)
    assert set(saved) == {x.data_ptr(), *(layer.weight.data_ptr() for layer in layers)}
    theirs = [layer(x) for layer in layers]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(sum(o.square().sum() for o in outs), [x, *parameters]) for outs in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradgradcheck(lambda x: torch.cat(joint_linear(x, *layers), -1).sin(), x)
    layers[0].weight.requires_grad_(False)
    joint_linear(x, *layers)[0].sum().backward()
    assert layers[0].weight.grad is None and layers[1].weight.grad is not None


@pytest.mark.parametrize("frozen", [(), (0,), (0, 1, 2)], ids=str)
def test_a_bias_whose_gradient_is_found_elsewhere(frozen: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """``joined_output`` adds it and gives it no gradient: who is given it as well (short attention) gives it all of it."""
    monkeypatch.setattr("l3m_like.layers.linear._ROWS", 1)
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, width).double() for width in (4, 2, 2)]
    for number in frozen:
        layers[number].requires_grad_(False)
    x = randn(3, 5, 6).requires_grad_()
    parameters = [p for layer in layers for p in layer.parameters()]

    def gradients(out: torch.Tensor) -> list[torch.Tensor | None]:
        trained = [x, *(p for p in parameters if p.requires_grad)]
        return list(torch.autograd.grad(out.sin().sum(), trained, allow_unused=True))

    wanted = gradients(joined_output(x, *layers))
    bias = joined_bias(*layers)
    assert bias is not None
    torch.testing.assert_close(joined_output(x, *layers, bias=bias), joined_output(x, *layers))
    found = gradients(joined_output(x, *layers, bias=bias))
    biases = [p.dim() == 1 for p in parameters if p.requires_grad]
    for a, b, is_bias in zip(found, wanted, [False, *biases], strict=True):
        assert (a is None) == is_bias
        if a is not None:
            torch.testing.assert_close(a, b)
    # the same product, and the bias's share from where it is said to come
    for a, b in zip(gradients(joined_output(x, *layers, bias=bias) + (bias - bias.detach())), wanted, strict=True):
        torch.testing.assert_close(a, b)
    without = [torch.nn.Linear(6, 4, bias=False), torch.nn.Linear(6, 2, bias=False)]
    assert joined_bias(*without) is None
