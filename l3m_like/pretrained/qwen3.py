"""Weight names of dense decoders: Qwen2, Qwen2.5, Qwen3, Llama 3 (Hugging Face layout, linear weights [out, in])."""

from __future__ import annotations

from l3m_like.pretrained.name_map import Source

_LAYER = {
    "norm_1.weight": "input_layernorm.weight",
    "norm_2.weight": "post_attention_layernorm.weight",
    "mixer.q_proj.weight": "self_attn.q_proj.weight",
    "mixer.k_proj.weight": "self_attn.k_proj.weight",
    "mixer.v_proj.weight": "self_attn.v_proj.weight",
    "mixer.out_proj.weight": "self_attn.o_proj.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
_QK_NORM = {"mixer.q_norm.weight": "self_attn.q_norm.weight", "mixer.k_norm.weight": "self_attn.k_norm.weight"}
_QKV_BIAS = {f"mixer.{x}_proj.bias": f"self_attn.{x}_proj.bias" for x in "qkv"}


def name_map(num_layers: int, *, qk_norm: bool, qkv_bias: bool = False, tied: bool) -> dict[str, Source]:
    """``{our parameter: where it lies}``.

    Args:
        num_layers: of the trunk.
        qk_norm: True for Qwen3, False for Qwen2 and Llama.
        qkv_bias: True for Qwen2 and Qwen2.5.
        tied: the head's matrix is the embedding's (it is then absent from published files, and from this map).
    """
    layer = _LAYER | (_QK_NORM if qk_norm else {}) | (_QKV_BIAS if qkv_bias else {})
    names = {"preprocessor.embed.weight": "model.embed_tokens.weight", "head.norm.weight": "model.norm.weight"}
    if not tied:
        names["head.proj.weight"] = "lm_head.weight"
    for index in range(num_layers):
        names |= {f"trunk.layers.{index}.{ours}": f"model.layers.{index}.{theirs}" for ours, theirs in layer.items()}
    return {ours: Source(theirs) for ours, theirs in names.items()}
