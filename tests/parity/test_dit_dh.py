"""DiT^DH against a direct transcription of the published one: output and all gradients. No library has a class of it."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rule import check_gradients, check_values, gradients, perturb
from torch import Tensor, nn

from l3m_like import load
from l3m_like.blocks import DiTDH, NoiseLevelEmbed, PatchEmbed, TokenPatchDecode
from l3m_like.core import MetaModel
from l3m_like.core.errors import UserError
from l3m_like.layers import Attention, DiTLayer, SwiGLU, sincos_positions
from l3m_like.pretrained import NameMap, export_state, family, import_state
from l3m_like.training.export import export
from tests.generate.tiny import CONFIGS, save_run

CLASSES, CHANNELS, SIDE = 5, 12, 4
TRUNK, HEAD = (32, 2, 2, 40), (64, 2, 4, 56)  # width, layers, heads, hidden width of the MLP
VANISHING = {"k_proj.bias": "softmax ignores what all keys have in common"}


class Norm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.weight


def turned(x: Tensor, side: int) -> Tensor:
    """x [B, H, N, K]: neighbouring pairs of the first half of K turn with the row, of the second with the column."""
    width = x.shape[-1]
    out = torch.empty_like(x)
    for token in range(side * side):
        row, column = divmod(token, side)
        for pair in range(width // 2):
            axis, number = (row, pair) if pair < width // 4 else (column, pair - width // 4)
            angle = axis * 10000.0 ** (-2 * number / (width // 2))
            a, b = x[:, :, token, 2 * pair], x[:, :, token, 2 * pair + 1]
            out[:, :, token, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
            out[:, :, token, 2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
    return out


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = Norm(dim), Norm(dim)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"w12": nn.Linear(dim, 2 * hidden), "w3": nn.Linear(hidden, dim)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        c = self.adaLN_modulation(c if c.dim() == 3 else c[:, None])
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = c.chunk(6, -1)
        q, k, v = self.attn["qkv"](self.norm1(x) * (1 + scale) + shift).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = turned(q, SIDE), turned(k, SIDE)
        mixed = ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + gate * self.attn["proj"](mixed)
        first, second = self.mlp["w12"](self.norm2(x) * (1 + scale_mlp) + shift_mlp).chunk(2, -1)
        return x + gate_mlp * self.mlp["w3"](F.silu(first) * second)


class Published(nn.Module):
    """With the names of the published files; t counts from data (0) to noise (1)."""

    def __init__(self) -> None:
        super().__init__()
        width, wide = TRUNK[0], HEAD[0]
        self.s_embedder, self.x_embedder = (nn.ModuleDict({"proj": nn.Conv2d(CHANNELS, n, 1)}) for n in (width, wide))
        self.t_embedder = nn.Module()
        self.t_embedder.W = nn.Parameter(torch.empty(256), requires_grad=False)
        self.t_embedder.mlp = nn.Sequential(nn.Linear(512, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(CLASSES + 1, width)})
        self.s_projector = nn.Linear(width, wide)
        self.blocks = nn.ModuleList(Layer(d, heads, hidden) for d, n, heads, hidden in (TRUNK, HEAD) for _ in range(n))
        self.final_layer = nn.Module()
        self.final_layer.norm_final = Norm(wide)
        self.final_layer.linear = nn.Linear(wide, CHANNELS)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(wide, 2 * wide))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        angle = 2 * math.pi * t[:, None] * self.t_embedder.W
        level = self.t_embedder.mlp(torch.cat((angle.sin(), angle.cos()), -1))
        c = F.silu(level + self.y_embedder["embedding_table"](y))
        s = self.s_embedder["proj"](x).flatten(2).mT
        s = s + sincos_positions(SIDE, SIDE, TRUNK[0], s.dtype, s.device)
        for block in self.blocks[: TRUNK[1]]:
            s = block(s, c)
        s = self.s_projector(F.silu(level[:, None] + s))
        z = self.x_embedder["proj"](x).flatten(2).mT
        for block in self.blocks[TRUNK[1] :]:
            z = block(z, s)
        shift, scale = self.final_layer.adaLN_modulation(s).chunk(2, -1)
        out = self.final_layer.linear(self.final_layer.norm_final(z) * (1 + scale) + shift)
        return out.mT.unflatten(-1, (SIDE, SIDE))


def layer_of(heads: int, hidden: int) -> partial[DiTLayer]:
    mixer = partial(Attention, num_heads=heads, bias=True, interleaved=True)
    return partial(DiTLayer, norm="rms", mixer=mixer, mlp=partial(SwiGLU, hidden_dim=hidden, bias=True))


def ours_of() -> MetaModel:
    (dim, layers, heads, hidden), (wide, head_layers, head_heads, head_hidden) = TRUNK, HEAD
    model = MetaModel(
        preprocessor={
            "patches": PatchEmbed(SIDE, 1, CHANNELS, dim, reads={"image": "image_noised"}),
            "condition": NoiseLevelEmbed(CLASSES, dim),
        },
        trunk=DiTDH(dim, layers, layer_of(heads, hidden), wide, head_layers, layer_of(head_heads, head_hidden), CHANNELS),
        head=TokenPatchDecode(wide, SIDE, CHANNELS, writes={"image": "image_prediction"}),
        stream="image",
    ).double()
    perturb(model)
    return model


def names_of(model: MetaModel) -> NameMap:
    return NameMap.of(family("dit_dh").templates(model), model)


def compare(ours: MetaModel) -> None:
    names, reference = names_of(ours), Published().double()
    reference.load_state_dict(export_state(names, dict(ours.named_parameters())))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, CHANNELS, SIDE, SIDE, generator=generator, dtype=torch.float64)
    level, y = torch.rand(3, generator=generator, dtype=torch.float64), torch.tensor([1, CLASSES, 0])
    weight = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
    theirs = -reference(x, level, y)  # of noise - data
    (theirs * weight).square().sum().backward()
    out = ours({"image_noised": x, "image_time": 1 - level, "image_class_id": y})["image_prediction"]
    (out * weight).square().sum().backward()
    check_values(out.detach(), theirs.detach())
    theirs_of_ours = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in reference.named_parameters()}
    moved = import_state(names, theirs_of_ours)
    moved.pop("preprocessor.condition.level.features.frequency")
    check_gradients(gradients(ours), moved, vanishing=VANISHING)


def test_equals_a_transcription() -> None:
    compare(ours_of())


def _rotate_halves(model: MetaModel) -> None:
    model.trunk.layers[0].mixer.interleaved = False


def _shared_condition(model: MetaModel) -> None:
    layer = model.trunk.head_layers[1]
    forward = layer.forward
    layer.forward = lambda x, c, *more: forward(x, c.mean(1, keepdim=True).expand_as(c), *more)


def _positions_in_the_head(model: MetaModel) -> None:
    embed = model.trunk.embed
    forward = embed.forward
    embed.forward = lambda image: forward(image) + 1e-4


@pytest.mark.parametrize("fault", [_rotate_halves, _shared_condition, _positions_in_the_head])
def test_planted_fault_is_found(fault) -> None:
    model = ours_of()
    fault(model)
    with pytest.raises(AssertionError):
        compare(model)


SIZES = [
    *(f"latent_channels={CHANNELS}", f"latent_size={SIDE}", f"latent_elements={CHANNELS * SIDE**2}", f"classes={CLASSES}"),
    *(f"{knob}={size}" for knob, size in zip(("dim", "layers", "heads", "mlp_dim"), TRUNK, strict=True)),
    *(f"{knob}={size}" for knob, size in zip(("head_dim", "head_layers", "head_heads", "head_mlp_dim"), HEAD, strict=True)),
]


def test_file_there_and_back(tmp_path: Path) -> None:
    """A run's generator as a published file, tables of positions too; the class computes the same, and `init.parts` reads it."""
    run = save_run(tmp_path / "run", "dit_dh", *SIZES, "evals=null", "sample=null")
    with pytest.raises(UserError, match=r"DiTwDDTHead has no place for|none of those that are known"):
        export(run, tmp_path / "whole.pt")
    said = export(run, tmp_path / "generator.pt", part="generator")
    assert "DiTwDDTHead" in said[-1] and "'model' and 'ema'" in said[-1]
    state = torch.load(tmp_path / "generator.pt", weights_only=True)["ema"]
    reference = Published().double()
    tables = {name: state.pop(name) for name in list(state) if "rope" in name or name == "pos_embed"}
    reference.load_state_dict(state)
    for kind, (width, _, heads, _) in (("enc", TRUNK), ("dec", HEAD)):
        ones = torch.zeros(1, 1, SIDE**2, width // heads, dtype=torch.float64)
        ones[..., ::2] = 1  # turned, it is cos and sin by turns
        for first, table in enumerate(tables[f"{kind}_feat_rope.freqs_{name}"] for name in ("cos", "sin")):
            assert torch.equal(table[:, ::2], table[:, 1::2])
            check_values(table[:, ::2], turned(ones, SIDE)[0, 0, :, first::2])
    check_values(tables["pos_embed"][0], sincos_positions(SIDE, SIDE, TRUNK[0], torch.float64, torch.device("cpu")))
    x, level = torch.randn(2, CHANNELS, SIDE, SIDE, dtype=torch.float64), torch.tensor([0.2, 0.9], dtype=torch.float64)
    y, begin = torch.tensor([1, 3]), f"+init.parts.generator={tmp_path / 'generator.pt'}"
    generator = load(CONFIGS / "dit_dh.yaml", dtype="float64", overrides=[*SIZES, begin]).model["generator"]
    data = {"image_noised": x, "image_time": 1 - level, "image_class_id": y}
    check_values(generator(data, generator.inference())["image_prediction"].detach(), -reference(x, level, y).detach())
    other = state | {name: value * 0.9 if "rope" in name else value for name, value in tables.items()}
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(UserError, match="'enc_feat_rope.freqs_cos', which is computed here, is another there"):
        load(CONFIGS / "dit_dh.yaml", overrides=[*SIZES, f"+init.parts.generator={tmp_path / 'other.pt'}"])


def test_published_grid_of_times() -> None:
    """50 points: shift(1 - linspace(0, 0.999, 50)) of the noise level, seen from the other end."""
    from l3m_like.generate import FlowODE

    shift = math.sqrt(768 * 16**2 / 4096)
    level = 1 - torch.linspace(0, 0.999, 50, dtype=torch.float64)
    level = shift * level / (1 + (shift - 1) * level)
    sampler = FlowODE(shape=(768, 16, 16), classes=1000, shift=shift, last=0.999, steps=49)
    torch.testing.assert_close(torch.tensor(sampler.times(0.0, 1.0, 49), dtype=torch.float64), 1 - level)
