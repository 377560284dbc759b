"""A SiT or DiT as diffusers keeps it: the folder of a ``DiTTransformer2DModel``.

The class there differs from the published code in its time sinusoid (see ``diffusers_names``). Weights that were trained as a
DiT (arXiv:2212.09748) predict noise at whole times 0 .. 999, the last being noise: they fit a model here, but not its times.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from l3m_like.blocks import DiT, PatchDecode, PatchEmbed, TimeLabelEmbed
from l3m_like.core.errors import UserError
from l3m_like.layers import MLP, Attention, DiTLayer, LayerNorm
from l3m_like.pretrained import decoder
from l3m_like.pretrained.families import Family
from l3m_like.pretrained.name_map import Source, Templates

KNOBS = {
    "num_attention_heads": "heads",
    "attention_head_dim": "dim (it is dim / heads)",
    "in_channels": "channels",
    "out_channels": "out_channels",
    "num_layers": "layers",
    "sample_size": "image_size",
    "patch_size": "patch",
    "num_embeds_ada_norm": "classes",
}
#: of every such model
CONSTANT = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}


def diffusers_names(num_layers: int, *, channels: int, patch: int) -> Templates:
    """Names in ``DiTTransformer2DModel``, where every block holds a copy of the time and label embedding. Its time sinusoid
    divides by half - 1: set ``downscale_freq_shift = 0`` on every block's ``norm1.emb.time_proj`` for equal outputs."""

    def in_every_block(name: str) -> Source:
        first, *others = (f"transformer_blocks.{i}.norm1.emb.{name}" for i in range(num_layers))
        return Source(first, copies=tuple(others))

    ours, theirs = "trunk.layers.{i}", "transformer_blocks.{i}"
    return {
        "preprocessor.patches.projection.proj.weight": Source("pos_embed.proj.weight", shape=(-1, channels, patch, patch)),
        "preprocessor.patches.projection.proj.bias": "pos_embed.proj.bias",
        "preprocessor.condition.time.up.{leaf}": in_every_block("timestep_embedder.linear_1.{leaf}"),
        "preprocessor.condition.time.down.{leaf}": in_every_block("timestep_embedder.linear_2.{leaf}"),
        "preprocessor.condition.label.weight": in_every_block("class_embedder.embedding_table.weight"),
        f"{ours}.modulation.proj.{{leaf}}": f"{theirs}.norm1.linear.{{leaf}}",
        f"{ours}.mixer.q_proj.{{leaf}}": f"{theirs}.attn1.to_q.{{leaf}}",
        f"{ours}.mixer.k_proj.{{leaf}}": f"{theirs}.attn1.to_k.{{leaf}}",
        f"{ours}.mixer.v_proj.{{leaf}}": f"{theirs}.attn1.to_v.{{leaf}}",
        f"{ours}.mixer.out_proj.{{leaf}}": f"{theirs}.attn1.to_out.0.{{leaf}}",
        f"{ours}.mlp.up.{{leaf}}": f"{theirs}.ff.net.0.proj.{{leaf}}",
        f"{ours}.mlp.down.{{leaf}}": f"{theirs}.ff.net.2.{{leaf}}",
        "head.modulation.proj.{leaf}": "proj_out_1.{leaf}",
        "head.proj.{leaf}": "proj_out_2.{leaf}",
    }


def describe(model: nn.Module) -> dict[str, Any]:
    """The fields of ``config.json`` that follow from such a model.

    Raises:
        UserError: the model is another.
    """
    patches, trunk, head = (decoder.the_block(model, kind) for kind in (PatchEmbed, DiT, PatchDecode))
    label = decoder.the_block(model, TimeLabelEmbed).label
    layers: list[Any] = list(trunk.layers)
    for at, layer in enumerate(layers):
        known = isinstance(layer, DiTLayer) and isinstance(layer.norm_1, LayerNorm)
        known = known and isinstance(layer.mixer, Attention) and isinstance(layer.mlp, MLP)
        if not known or layer.mixer.q_proj.bias is None or layer.mixer.q_norm is not None or layer.mlp.up.bias is None:
            raise UserError(f"layer {at} is no DiTLayer of LayerNorm, Attention and MLP with biases and without qk_norm.")
        if layer.mlp.activation != "gelu_tanh" or layer.mlp.hidden_dim != 4 * patches.dim:
            raise UserError(f"the MLP of layer {at} is another; ratio: 4.0, activation: gelu_tanh.")
    heads = decoder.common([{"num_attention_heads": layer.mixer.num_heads} for layer in layers], "layer")
    channels, size, _ = patches.shape
    return {
        **heads,
        "attention_head_dim": patches.dim // heads["num_attention_heads"],
        "in_channels": channels,
        "out_channels": head.proj.out_features // head.patch**2,
        "num_layers": len(layers),
        "sample_size": size,
        "patch_size": head.patch,
        "num_embeds_ada_norm": label.num_embeddings - 1,
        "norm_eps": decoder.the_eps(head.norm.eps, *(norm.eps for layer in layers for norm in (layer.norm_1, layer.norm_2))),
        **CONSTANT,
    }


def normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """With what files leave out. Those that were made of published weights say 1e-5 of a norm that had 1e-6 when these were
    trained, here and in the published code."""
    eps = config.get("norm_eps", 1e-5)
    out_channels = config.get("out_channels") or config["in_channels"]
    return {**config, "out_channels": out_channels, "norm_eps": 1e-6 if eps == 1e-5 else eps}


def templates(model: nn.Module) -> Templates:
    patches, trunk = decoder.the_block(model, PatchEmbed), decoder.the_block(model, DiT)
    return diffusers_names(len(trunk.layers), channels=patches.shape[0], patch=patches.projection.patch)


FAMILY = Family(
    model_type="DiTTransformer2DModel",
    architecture="DiTTransformer2DModel",
    names=templates,
    describe=describe,
    normal=normal,
    knobs=KNOBS,
    ignored=(r"pos_embed\.pos_embed",),  # a constant, computed here
    layout="diffusers",
)
