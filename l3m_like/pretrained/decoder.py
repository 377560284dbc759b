"""What the dense decoders have in common (Llama, Mistral, Qwen): names, and fields of ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from l3m_like.blocks import LanguageModelHead, TokenEmbed, Transformer
from l3m_like.core.errors import UserError
from l3m_like.core.meta_model import walk
from l3m_like.layers import Attention, Rope, SwiGLU, TransformerLayer
from l3m_like.pretrained.name_map import Templates

Block = TypeVar("Block", bound=nn.Module)

EMBED: Templates = {"preprocessor.embed.weight": "model.embed_tokens.weight"}
ATTENTION: Templates = {
    "trunk.layers.{i}.mixer.q_proj.{leaf}": "model.layers.{i}.self_attn.q_proj.{leaf}",
    "trunk.layers.{i}.mixer.k_proj.{leaf}": "model.layers.{i}.self_attn.k_proj.{leaf}",
    "trunk.layers.{i}.mixer.v_proj.{leaf}": "model.layers.{i}.self_attn.v_proj.{leaf}",
    "trunk.layers.{i}.mixer.out_proj.{leaf}": "model.layers.{i}.self_attn.o_proj.{leaf}",
}
QK_NORM: Templates = {
    "trunk.layers.{i}.mixer.q_norm.weight": "model.layers.{i}.self_attn.q_norm.weight",
    "trunk.layers.{i}.mixer.k_norm.weight": "model.layers.{i}.self_attn.k_norm.weight",
}
MLP: Templates = {
    "trunk.layers.{i}.mlp.gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "trunk.layers.{i}.mlp.up.weight": "model.layers.{i}.mlp.up_proj.weight",
    "trunk.layers.{i}.mlp.down.weight": "model.layers.{i}.mlp.down_proj.weight",
}
NORMS: Templates = {
    "trunk.layers.{i}.norm_1.weight": "model.layers.{i}.input_layernorm.weight",
    "trunk.layers.{i}.norm_2.weight": "model.layers.{i}.post_attention_layernorm.weight",
}
#: a tied head's matrix is the embedding's, and absent from most files
HEAD: Templates = {"head.norm.weight": "model.norm.weight", "head.proj.weight": "lm_head.weight"}

#: in the order of published files
NAMES: Templates = {**EMBED, **ATTENTION, **QK_NORM, **MLP, **NORMS, **HEAD}

#: computed here, stored by some old files
IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)

KNOBS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie",
    "sliding_window": "window",
    "rope_parameters.rope_theta": "rope_theta",
    "rope_parameters": "rope_scaling",
}


def describe(model: nn.Module, *, qk_norm: bool, qkv_bias: bool, windows: bool = False) -> dict[str, Any]:
    """The fields of ``config.json`` that follow from a decoder of equal dense layers.

    Args:
        qk_norm, qkv_bias: what the family's attention has.
        windows: whether it may have a sliding window.

    Raises:
        UserError: the model is another.
    """
    embed, trunk, head = (the_block(model, kind) for kind in (TokenEmbed, Transformer, LanguageModelHead))
    layers: list[Any] = list(trunk.layers)
    for at, layer in enumerate(layers):
        if not (isinstance(layer, TransformerLayer) and isinstance(layer.mixer, Attention) and type(layer.mlp) is SwiGLU):
            raise UserError(f"layer {at} is no TransformerLayer of Attention and SwiGLU.")
    mixer = layers[0].mixer
    for knob, wanted, has in (
        ("qk_norm", qk_norm, mixer.q_norm is not None),
        ("qkv_bias", qkv_bias, mixer.q_proj.bias is not None),
        ("out_bias", False, mixer.out_proj.bias is not None),
        ("interleaved", False, mixer.interleaved),
    ):
        if has != wanted:
            raise UserError(f"its attention has {'no' if wanted else 'a'} {knob}; set {knob}: {str(wanted).lower()}.")
    if mixer.window is not None and not windows:
        raise UserError(f"its attention has a window of {mixer.window}; set window: null.")
    return {
        "vocab_size": embed.embed.num_embeddings,
        "hidden_size": trunk.dim,
        "num_hidden_layers": len(layers),
        **common([layer_fields(layer) for layer in layers], "layer"),
        "hidden_act": "silu",
        "rms_norm_eps": eps_of(trunk, head),
        "tie_word_embeddings": head.proj.weight is embed.embed.weight,
        "rope_parameters": rope_parameters(trunk.rope),
    }


def layer_fields(layer: Any) -> dict[str, Any]:
    """Of one layer of ``Attention`` and ``SwiGLU``."""
    return {
        "intermediate_size": layer.mlp.hidden_dim,
        "num_attention_heads": layer.mixer.num_heads,
        "num_key_value_heads": layer.mixer.num_kv_heads,
        "head_dim": layer.mixer.head_dim,
        "sliding_window": layer.mixer.window,
    }


def common(fields: Sequence[Mapping[str, Any]], what: str) -> dict[str, Any]:
    """The fields that are the same in all of a model's ``what`` (layers ...), for which ``config.json`` has one number.

    Raises:
        UserError: they differ, or there is none.
    """
    if not fields:
        raise UserError(f"it has no {what}.")
    for at, other in enumerate(fields):
        for name, value in other.items():
            if value != fields[0][name]:
                raise UserError(f"its {what}s differ: {name} is {fields[0][name]} in number 0 and {value} in number {at}.")
    return dict(fields[0])


def the_block(model: nn.Module, kind: type[Block]) -> Block:
    """The one block of ``model`` that is a ``kind`` (frozen parts and towers are not looked into).

    Raises:
        UserError: there is none, or there are several; a trunk that no family describes.
    """
    found = [block for _, block in walk(model) if isinstance(block, kind)]
    if len(found) != 1:
        raise UserError(f"it has {len(found) or 'no'} {kind.__name__}{'s' if len(found) > 1 else ''}, where one is needed.")
    if isinstance(found[0], Transformer) and found[0].kv_every > 1:
        raise UserError(f"its layers share keys and values (kv_every: {found[0].kv_every}), and no config.json says so.")
    return found[0]


def eps_of(trunk: Transformer, head: LanguageModelHead) -> float:
    """Of all norms between layers; ``config.json`` has one.

    Raises:
        UserError: they differ.
    """
    layers: list[Any] = list(trunk.layers)
    return the_eps(head.norm.eps, *(layer.norm_1.eps for layer in layers), *(layer.norm_2.eps for layer in layers))


def the_eps(*all_of_them: float) -> float:
    """The eps that all norms share: ``config.json`` has one.

    Raises:
        UserError: they differ.
    """
    if len(set(all_of_them)) > 1:
        raise UserError(f"its norms have different eps: {sorted(set(all_of_them))}; set norm_eps for all of them.")
    return all_of_them[0]


def rope_parameters(rope: Rope | None) -> dict[str, Any]:
    """``rope_parameters`` of ``config.json``.

    Raises:
        UserError: no rotary positions.
    """
    if rope is None:
        raise UserError("it has no rotary positions (rope: null).")
    if rope.scaling is None:
        return {"rope_type": "default", "rope_theta": rope.theta}
    original = "original_max_position_embeddings"
    given = {name: value for name, value in rope.scaling.items() if value or not name.startswith("mscale")}
    scaling = {**given, original: int(rope.scaling[original])}
    return {"rope_type": rope.scaling_type, "rope_theta": rope.theta, **scaling}


def normal(config: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """A ``config.json`` of any age with today's names, and with what older ones leave out.

    Args:
        defaults: of the family, for fields that are absent.
    """
    fields = {"hidden_act": "silu", "tie_word_embeddings": False, "sliding_window": None, **defaults, **config}
    fields.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    if fields.get("head_dim") is None:
        fields["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    old = fields.pop("rope_scaling", None) or {}
    rope = {"rope_theta": fields.pop("rope_theta", 10000.0), **old, **(config.get("rope_parameters") or {})}
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    fields["rope_parameters"] = rope
    return fields


def unwindowed(config: Mapping[str, Any]) -> dict[str, Any]:
    """``normal`` for families whose ``sliding_window`` counts only with ``use_sliding_window``."""
    fields = normal(config)
    return fields if fields.get("use_sliding_window") else {**fields, "sliding_window": None}
