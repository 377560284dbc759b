"""GPT-2 (Radford et al., 2019): learned positions, LayerNorms and biases; matrices are stored transposed, q, k and v as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from l3m_like.blocks import LanguageModelHead, PlacedTokenEmbed, Transformer
from l3m_like.core.errors import UserError
from l3m_like.layers import MLP, AffineLayerNorm, Attention, TransformerLayer
from l3m_like.pretrained import decoder
from l3m_like.pretrained.families import Family
from l3m_like.pretrained.name_map import Source, Templates


def _turned(ours: str, theirs: str) -> Templates:
    """A linear layer that is a ``Conv1D`` there."""
    return {f"{ours}.weight": Source(f"{theirs}.weight", transpose=True), f"{ours}.bias": f"{theirs}.bias"}


def _part(letter: str, part: int) -> Templates:
    ours, theirs = f"trunk.layers.{{i}}.mixer.{letter}_proj", "transformer.h.{i}.attn.c_attn"
    return {
        f"{ours}.weight": Source(f"{theirs}.weight", part=part, parts=3, transpose=True),
        f"{ours}.bias": Source(f"{theirs}.bias", part=part, parts=3),
    }


NAMES: Templates = {
    "preprocessor.embed.weight": "transformer.wte.weight",
    "preprocessor.place.weight": "transformer.wpe.weight",
    "trunk.layers.{i}.norm_1.{leaf}": "transformer.h.{i}.ln_1.{leaf}",
    **_part("q", 0),
    **_part("k", 1),
    **_part("v", 2),
    **_turned("trunk.layers.{i}.mixer.out_proj", "transformer.h.{i}.attn.c_proj"),
    "trunk.layers.{i}.norm_2.{leaf}": "transformer.h.{i}.ln_2.{leaf}",
    **_turned("trunk.layers.{i}.mlp.up", "transformer.h.{i}.mlp.c_fc"),
    **_turned("trunk.layers.{i}.mlp.down", "transformer.h.{i}.mlp.c_proj"),
    "head.norm.{leaf}": "transformer.ln_f.{leaf}",
    "head.proj.weight": "lm_head.weight",
}
KNOBS = {"vocab_size": "vocab_size", "n_embd": "dim", "n_layer": "layers", "n_head": "heads", "n_inner": "mlp_dim"}


def describe(model: nn.Module) -> dict[str, Any]:
    """The fields of ``config.json`` that follow from such a model.

    Raises:
        UserError: the model is another.
    """
    embed, trunk, head = (decoder.the_block(model, kind) for kind in (PlacedTokenEmbed, Transformer, LanguageModelHead))
    layers: list[Any] = list(trunk.layers)
    for at, layer in enumerate(layers):
        known = isinstance(layer, TransformerLayer) and isinstance(layer.mixer, Attention) and isinstance(layer.mlp, MLP)
        if not (known and isinstance(layer.norm_1, AffineLayerNorm)):
            raise UserError(f"layer {at} is no TransformerLayer of LayerNorm, Attention and MLP.")
        mixer = layer.mixer
        heads = mixer.num_kv_heads == mixer.num_heads and mixer.head_dim * mixer.num_heads == trunk.dim
        biases = mixer.q_proj.bias is not None and mixer.out_proj.bias is not None and layer.mlp.up.bias is not None
        if not (heads and biases) or mixer.q_norm is not None or mixer.window is not None or trunk.rope is not None:
            raise UserError("its attention is another; biases everywhere, no qk_norm, kv_heads, window or rope.")
        if layer.mlp.activation != "gelu_tanh":
            raise UserError("the activation of its MLP is another; set activation: gelu_tanh.")
    if embed.place is None:
        raise UserError("its positions are fixed sinusoids, not learned; set fixed: false.")
    return {
        "vocab_size": embed.embed.num_embeddings,
        "n_positions": embed.place.num_embeddings,
        "n_embd": trunk.dim,
        "n_layer": len(layers),
        **decoder.common([{"n_head": layer.mixer.num_heads, "n_inner": layer.mlp.hidden_dim} for layer in layers], "layer"),
        "activation_function": "gelu_new",
        "layer_norm_epsilon": decoder.eps_of(trunk, head),
        "tie_word_embeddings": head.proj.weight is embed.embed.weight,
    }


def normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """With what published files leave out."""
    defaults = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
    return {**defaults, **config, "n_inner": config.get("n_inner") or 4 * config["n_embd"]}


FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    names=NAMES,
    describe=describe,
    normal=normal,
    knobs=KNOBS,
    ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),  # causal masks of old files
)
