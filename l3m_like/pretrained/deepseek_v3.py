"""DeepSeek-V3 (arXiv:2412.19437), and Moonlight, which has its form: latent attention, then experts with a shared one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from l3m_like.blocks import LanguageModelHead, TokenEmbed, Transformer
from l3m_like.core.errors import UserError
from l3m_like.layers import LatentAttention, MoE, Rope, SwiGLU, TransformerLayer
from l3m_like.layers.rope import yarn_magnitude
from l3m_like.pretrained import decoder
from l3m_like.pretrained.families import Family
from l3m_like.pretrained.name_map import Source, Templates
from l3m_like.pretrained.qwen3_moe import EXPERTS

ATTENTION: Templates = {
    "trunk.layers.{i}.mixer.q_proj.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "trunk.layers.{i}.mixer.q_down.weight": "model.layers.{i}.self_attn.q_a_proj.weight",
    "trunk.layers.{i}.mixer.q_norm.weight": "model.layers.{i}.self_attn.q_a_layernorm.weight",
    "trunk.layers.{i}.mixer.q_up.weight": "model.layers.{i}.self_attn.q_b_proj.weight",
    "trunk.layers.{i}.mixer.kv_down.weight": "model.layers.{i}.self_attn.kv_a_proj_with_mqa.weight",
    "trunk.layers.{i}.mixer.kv_norm.weight": "model.layers.{i}.self_attn.kv_a_layernorm.weight",
    "trunk.layers.{i}.mixer.kv_up.weight": "model.layers.{i}.self_attn.kv_b_proj.weight",
    "trunk.layers.{i}.mixer.out_proj.weight": "model.layers.{i}.self_attn.o_proj.weight",
}
SHARED: Templates = {
    "trunk.layers.{i}.mlp.shared.gate.weight": "model.layers.{i}.mlp.shared_experts.gate_proj.weight",
    "trunk.layers.{i}.mlp.shared.up.weight": "model.layers.{i}.mlp.shared_experts.up_proj.weight",
    "trunk.layers.{i}.mlp.shared.down.weight": "model.layers.{i}.mlp.shared_experts.down_proj.weight",
}
BIAS: Templates = {"trunk.layers.{i}.mlp.router.bias": "model.layers.{i}.mlp.gate.e_score_correction_bias"}
LAYERS: Templates = {**ATTENTION, **decoder.MLP, **EXPERTS, **BIAS, **SHARED, **decoder.NORMS}


def _of_the_last(source: str | Source) -> str | Source:
    if isinstance(source, str):
        return source.replace("{i}", "61")
    return replace(source, name=source.name.replace("{i}", "61"))


#: the layer of multi-token prediction stands behind the 61 of the trunk; the reference class ignores it, by this number
AHEAD: Templates = {
    **{ours.replace("trunk.layers.{i}", "postprocessor.layer"): _of_the_last(theirs) for ours, theirs in LAYERS.items()},
    "postprocessor.token_norm.weight": "model.layers.61.enorm.weight",
    "postprocessor.hidden_norm.weight": "model.layers.61.hnorm.weight",
    "postprocessor.proj.weight": "model.layers.61.eh_proj.weight",
    "postprocessor.norm.weight": "model.layers.61.shared_head.norm.weight",
    # tied to the head's, and named so by a model that has both
    "postprocessor.final_norm.weight": "model.norm.weight",
    "postprocessor.head.weight": "lm_head.weight",
}
NAMES: Templates = {**decoder.EMBED, **LAYERS, **AHEAD, **decoder.HEAD}
KNOBS = {
    **decoder.KNOBS,
    "intermediate_size": "dense_mlp_dim",
    "moe_intermediate_size": "mlp_dim",
    "n_routed_experts": "experts",
    "n_shared_experts": "shared_mlp_dim",
    "num_experts_per_tok": "top_k",
    "first_k_dense_replace": "dense_layers",
    "q_lora_rank": "q_rank",
    "kv_lora_rank": "kv_rank",
    "qk_nope_head_dim": "nope_dim",
    "qk_rope_head_dim": "rope_dim",
    "v_head_dim": "v_dim",
}


def describe(model: nn.Module) -> dict[str, Any]:
    """The fields of ``config.json`` that follow from such a model.

    Raises:
        UserError: the model is another.
    """
    fields = describe_layers(model)
    routers = [layer.mlp.router for layer in decoder.the_block(model, Transformer).layers if isinstance(layer.mlp, MoE)]
    for router in routers:
        if router.score != "sigmoid" or router.bias is None or (router.groups > 1 and router.group_top != 2):
            raise UserError("its routers are others; set score: sigmoid, bias_rate: 0.001 and group_top: 2.")
    return fields | decoder.common([{"norm_topk_prob": router.normalize} for router in routers], "router")


def describe_layers(model: nn.Module) -> dict[str, Any]:
    """What DeepSeek-V2 and V3 have in common."""
    embed, trunk, head = (decoder.the_block(model, kind) for kind in (TokenEmbed, Transformer, LanguageModelHead))
    layers: list[Any] = list(trunk.layers)
    for at, layer in enumerate(layers):
        known = isinstance(layer, TransformerLayer) and isinstance(layer.mixer, LatentAttention)
        if not (known and isinstance(layer.mlp, (MoE, SwiGLU))):
            raise UserError(f"layer {at} is no TransformerLayer of LatentAttention and MoE or SwiGLU.")
        if abs(layer.mixer.score_factor - (wanted := score_factor(trunk.rope))) > 1e-9:
            raise UserError(
                f"the attention of layer {at} multiplies its scores by {layer.mixer.score_factor:g}, and its rotary positions "
                f"(mscale_all_dim of their scaling) say {wanted:g}; give LatentAttention the rope_scaling of the trunk's rope."
            )
    first = next((at for at, layer in enumerate(layers) if isinstance(layer.mlp, MoE)), len(layers))
    if any(isinstance(layer.mlp, SwiGLU) for layer in layers[first:]):
        raise UserError("a dense layer follows one with experts; only the first layers may be dense.")
    return {
        "vocab_size": embed.embed.num_embeddings,
        "hidden_size": trunk.dim,
        "num_hidden_layers": len(layers),
        **decoder.common([_attention(layer.mixer) for layer in layers], "attention"),
        **decoder.common([_experts(layer.mlp) for layer in layers[first:]], "mixture of experts"),
        **decoder.common([{"intermediate_size": layer.mlp.hidden_dim} for layer in layers[:first]] or [{}], "dense MLP"),
        "first_k_dense_replace": first,
        "hidden_act": "silu",
        "rms_norm_eps": decoder.eps_of(trunk, head),
        "tie_word_embeddings": head.proj.weight is embed.embed.weight,
        "rope_parameters": decoder.rope_parameters(trunk.rope),
    }


def score_factor(rope: Rope | None) -> float:
    """What the attention of such a model multiplies scores by, on top of 1 / sqrt(head_dim)."""
    if rope is None or rope.scaling is None or rope.scaling_type != "yarn":
        return 1.0
    return yarn_magnitude(rope.scaling) ** 2


def _attention(mixer: LatentAttention) -> dict[str, Any]:
    if mixer.norm_eps != 1e-6:
        raise UserError(f"the norms of its latents have eps {mixer.norm_eps}; this family has 1e-6 there, whatever norm_eps is.")
    return {
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_heads,
        "q_lora_rank": mixer.q_rank,
        "kv_lora_rank": mixer.kv_rank,
        "qk_nope_head_dim": mixer.nope_dim,
        "qk_rope_head_dim": mixer.rope_dim,
        "v_head_dim": mixer.v_dim,
        "rope_interleave": mixer.interleaved,
    }


def _experts(moe: MoE) -> dict[str, Any]:
    width = moe.experts.gate.shape[1]
    shared = 0 if moe.shared is None else moe.shared.hidden_dim
    if not shared or shared % width:
        raise UserError(f"its shared expert is {shared} wide, which is no multiple of the others' width {width}.")
    return {
        "n_routed_experts": moe.router.experts,
        "n_shared_experts": shared // width,
        "num_experts_per_tok": moe.router.top_k,
        "moe_intermediate_size": width,
        "n_group": moe.router.groups,
        "topk_group": moe.router.kept_groups,
        "routed_scaling_factor": moe.router.scale,
    }


def normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """As ``decoder.normal``; of earlier spellings, and what is always so."""
    fields = decoder.normal({"rope_interleave": True, "q_lora_rank": None, **config})
    experts = fields.get("n_routed_experts", fields.get("num_local_experts", fields.get("num_experts")))
    groups = {name: fields.get(name) or 1 for name in ("n_group", "topk_group")}
    return fields | groups | {"n_routed_experts": experts, "num_key_value_heads": fields["num_attention_heads"]}


#: of the layer of multi-token prediction: all of it where the model has none, else its copies of embedding and head
IGNORED = (*decoder.IGNORED, r"model\.layers\.61\..*")

FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    names=NAMES,
    describe=describe,
    normal=normal,
    knobs=KNOBS,
    ignored=IGNORED,
)
