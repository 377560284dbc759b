"""Qwen3-MoE (arXiv:2505.09388): Qwen3 whose MLPs are mixtures of experts, in all layers or some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from l3m_like.blocks import LanguageModelHead, TokenEmbed, Transformer
from l3m_like.core.errors import UserError
from l3m_like.layers import Attention, MoE, SwiGLU, TransformerLayer
from l3m_like.pretrained import decoder
from l3m_like.pretrained.families import Family
from l3m_like.pretrained.name_map import Source, Templates

EXPERTS: Templates = {
    "trunk.layers.{i}.mlp.router.weight": "model.layers.{i}.mlp.gate.weight",
    "trunk.layers.{i}.mlp.experts.gate": Source("model.layers.{i}.mlp.experts.{e}.gate_proj.weight", stack="e"),
    "trunk.layers.{i}.mlp.experts.up": Source("model.layers.{i}.mlp.experts.{e}.up_proj.weight", stack="e"),
    "trunk.layers.{i}.mlp.experts.down": Source("model.layers.{i}.mlp.experts.{e}.down_proj.weight", stack="e"),
}
NAMES: Templates = {
    **decoder.EMBED,
    **decoder.ATTENTION,
    **decoder.QK_NORM,
    **decoder.MLP,
    **EXPERTS,
    **decoder.NORMS,
    **decoder.HEAD,
}
KNOBS = {
    **decoder.KNOBS,
    "moe_intermediate_size": "mlp_dim",
    "intermediate_size": "dense_mlp_dim",
    "num_experts": "experts",
    "num_experts_per_tok": "top_k",
}


def describe(model: nn.Module) -> dict[str, Any]:
    """The fields of ``config.json`` that follow from a decoder whose MLPs are ``MoE`` or ``SwiGLU``, layer by layer.

    Raises:
        UserError: the model is another.
    """
    embed, trunk, head = (decoder.the_block(model, kind) for kind in (TokenEmbed, Transformer, LanguageModelHead))
    layers: list[Any] = list(trunk.layers)
    for at, layer in enumerate(layers):
        known = isinstance(layer, TransformerLayer) and isinstance(layer.mixer, Attention)
        if not (known and isinstance(layer.mlp, (MoE, SwiGLU))):
            raise UserError(f"layer {at} is no TransformerLayer of Attention and MoE or SwiGLU.")
        if layer.mixer.q_norm is None or layer.mixer.q_proj.bias is not None or layer.mixer.out_proj.bias is not None:
            raise UserError("its attention has a bias, or no qk_norm; set qk_norm: true and no bias.")
    dense = [at for at, layer in enumerate(layers) if isinstance(layer.mlp, SwiGLU)]
    return {
        "vocab_size": embed.embed.num_embeddings,
        "hidden_size": trunk.dim,
        "num_hidden_layers": len(layers),
        **decoder.common([_attention(layer.mixer) for layer in layers], "attention"),
        **decoder.common([_experts(layer.mlp) for layer in layers if isinstance(layer.mlp, MoE)], "mixture of experts"),
        **decoder.common([{"intermediate_size": layers[at].mlp.hidden_dim} for at in dense] or [{}], "dense MLP"),
        "mlp_only_layers": dense,
        "decoder_sparse_step": 1,
        "hidden_act": "silu",
        "rms_norm_eps": decoder.eps_of(trunk, head),
        "tie_word_embeddings": head.proj.weight is embed.embed.weight,
        "rope_parameters": decoder.rope_parameters(trunk.rope),
    }


def _attention(mixer: Attention) -> dict[str, Any]:
    return {
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim,
        "sliding_window": mixer.window,
    }


def _experts(moe: MoE) -> dict[str, Any]:
    router = moe.router
    if (router.score, router.scale, router.groups) != ("softmax", 1.0, 1) or router.bias is not None or moe.shared is not None:
        raise UserError("its experts are routed otherwise: set router: null and shared_hidden_dim: null.")
    return {
        "num_experts": router.experts,
        "num_experts_per_tok": router.top_k,
        "norm_topk_prob": router.normalize,
        "moe_intermediate_size": moe.experts.gate.shape[1],
    }


def normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """As ``decoder.unwindowed``, with the dense layers listed one by one."""
    fields = decoder.unwindowed({"norm_topk_prob": False, **config})
    step, only = fields.get("decoder_sparse_step") or 1, fields.get("mlp_only_layers") or []
    dense = [at for at in range(fields["num_hidden_layers"]) if at in only or (at + 1) % step]
    experts = fields.get("num_experts", fields.get("num_local_experts"))
    return fields | {"num_experts": experts, "mlp_only_layers": dense, "decoder_sparse_step": 1}


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    names=NAMES,
    describe=describe,
    normal=normal,
    knobs=KNOBS,
    ignored=decoder.IGNORED,
)
