"""Published parameter counts and FLOPs at full size, on the meta device."""

from __future__ import annotations

from functools import partial

import torch

from l3m_like.blocks import DiT, LanguageModelHead, PatchDecode, PatchEmbed, TimeLabelEmbed, TokenEmbed, Transformer
from l3m_like.core import MetaModel
from l3m_like.layers import MLP, Attention, DiTLayer, Rope, SwiGLU, TransformerLayer


def language_model(vocab, dim, layers, heads, kv_heads, head_dim, ffn, *, qk_norm: bool, tied: bool) -> MetaModel:
    mixer = partial(Attention, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, qk_norm=qk_norm)
    layer = partial(TransformerLayer, mixer=mixer, mlp=partial(SwiGLU, hidden_dim=ffn))
    with torch.device("meta"):
        return MetaModel(
            preprocessor=TokenEmbed(vocab, dim),
            trunk=Transformer(dim, layers, layer, Rope(head_dim, 1e6)),
            head=LanguageModelHead(vocab, dim, writes=["nll"]),
            tie={"head.proj.weight": "preprocessor.embed.weight"} if tied else None,
        )


def count(model: MetaModel) -> int:
    return sum(p.numel() for p in model.parameters())


def test_qwen3_0_6b() -> None:
    assert count(language_model(151936, 1024, 28, 16, 8, 128, 3072, qk_norm=True, tied=True)) == 596_049_920


def test_llama3_8b() -> None:
    assert count(language_model(128256, 4096, 32, 32, 8, 128, 14336, qk_norm=False, tied=False)) == 8_030_261_248


def test_sit_xl_2() -> None:
    with torch.device("meta"):
        layer = partial(DiTLayer, mixer=partial(Attention, num_heads=16, bias=True), mlp=partial(MLP, ratio=4.0))
        patches = PatchEmbed(32, 2, 4, 1152)
        condition = TimeLabelEmbed(1000, 1152)
        trunk = DiT(1152, 28, layer)
        head = PatchDecode(1152, 32, 2, 4, out_channels=8, writes={"image": "pred"})
        image, time, label = torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.int64)
        tokens, vector = patches.compute(image), condition.compute(time, label)
        hidden = trunk.compute(tokens, vector)
        assert head.compute(hidden, vector).shape == (1, 4, 32, 32)
    model = MetaModel(preprocessor={"patches": patches, "condition": condition}, trunk=trunk, head=head)
    assert count(model) == 674_834_720  # published: 674.8M trainable
    flops = patches.flops(image) + condition.flops(time, label) + trunk.flops(tokens, vector) + head.flops(hidden, vector)
    assert abs(flops / 2 / 118.6e9 - 1) < 0.01  # published as 119 G multiply-adds
