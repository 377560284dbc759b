"""Falcon 7B (arXiv:2311.16867): attention and MLP side by side after one LayerNorm, one key/value head, no biases (as PaLM)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from l3m_like.blocks import LanguageModelHead, TokenEmbed, Transformer
from l3m_like.core.errors import UserError
from l3m_like.layers import MLP, AffineLayerNorm, Attention, ParallelLayer
from l3m_like.pretrained import decoder
from l3m_like.pretrained.families import Family
from l3m_like.pretrained.name_map import Source, Templates

_QKV = "transformer.h.{i}.self_attention.query_key_value.weight"
NAMES: Templates = {
    "preprocessor.embed.weight": "transformer.word_embeddings.weight",
    "trunk.layers.{i}.mixer.q_proj.weight": Source(_QKV, part=0, parts=3),
    "trunk.layers.{i}.mixer.k_proj.weight": Source(_QKV, part=1, parts=3),
    "trunk.layers.{i}.mixer.v_proj.weight": Source(_QKV, part=2, parts=3),
    "trunk.layers.{i}.mixer.out_proj.weight": "transformer.h.{i}.self_attention.dense.weight",
    "trunk.layers.{i}.mlp.up.weight": "transformer.h.{i}.mlp.dense_h_to_4h.weight",
    "trunk.layers.{i}.mlp.down.weight": "transformer.h.{i}.mlp.dense_4h_to_h.weight",
    "trunk.layers.{i}.norm.{leaf}": "transformer.h.{i}.input_layernorm.{leaf}",
    "head.norm.{leaf}": "transformer.ln_f.{leaf}",
    "head.proj.weight": "lm_head.weight",
}
KNOBS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "ffn_hidden_size": "mlp_dim",
    "layer_norm_epsilon": "norm_eps",
    "rope_parameters.rope_theta": "rope_theta",
}


def describe(model: nn.Module) -> dict[str, Any]:
    """The fields of ``config.json`` that follow from such a model.

    Raises:
        UserError: the model is another.
    """
    embed, trunk, head = (decoder.the_block(model, kind) for kind in (TokenEmbed, Transformer, LanguageModelHead))
    layers: list[Any] = list(trunk.layers)
    for at, layer in enumerate(layers):
        known = isinstance(layer, ParallelLayer) and isinstance(layer.mixer, Attention) and isinstance(layer.mlp, MLP)
        if not (known and isinstance(layer.norm, AffineLayerNorm)):
            raise UserError(f"layer {at} is no ParallelLayer of LayerNorm, Attention and MLP.")
        mixer = layer.mixer
        if mixer.num_kv_heads != 1 or mixer.head_dim * mixer.num_heads != trunk.dim or mixer.q_norm is not None or mixer.window:
            raise UserError("its attention is another; set kv_heads: 1, qk_norm: false, window: null.")
        if mixer.q_proj.bias is not None or mixer.out_proj.bias is not None or layer.mlp.up.bias is not None:
            raise UserError("it has biases, which this family has not.")
        if layer.mlp.activation != "gelu":
            raise UserError("the activation of its MLP is another; set activation: gelu.")
    return {
        "vocab_size": embed.embed.num_embeddings,
        "hidden_size": trunk.dim,
        "num_hidden_layers": len(layers),
        **decoder.common(
            [{"num_attention_heads": layer.mixer.num_heads, "ffn_hidden_size": layer.mlp.hidden_dim} for layer in layers], "layer"
        ),
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": False,
        "alibi": False,
        "bias": False,
        "activation": "gelu",
        "layer_norm_epsilon": decoder.the_eps(head.norm.eps, *(layer.norm.eps for layer in layers)),
        "tie_word_embeddings": head.proj.weight is embed.embed.weight,
        "rope_parameters": decoder.rope_parameters(trunk.rope),
    }


def normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """As ``decoder.normal``, with what published files leave out."""
    fields = decoder.normal({"activation": "gelu", "tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, **config})
    return fields | {"ffn_hidden_size": config.get("ffn_hidden_size") or 4 * config["hidden_size"]}


FAMILY = Family(
    model_type="falcon",
    architecture="FalconForCausalLM",
    names=NAMES,
    describe=describe,
    normal=normal,
    knobs=KNOBS,
    ignored=decoder.IGNORED,
)
