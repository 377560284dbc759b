"""Weight names of RAE's decoders: the published files, and diffusers' ``AutoencoderRAE``."""

from __future__ import annotations

from l3m_like.pretrained.name_map import Templates

#: of a layer, {projection: name} in the published files, and in diffusers where that differs
_PUBLISHED = {
    "q_proj": "attention.attention.query",
    "k_proj": "attention.attention.key",
    "v_proj": "attention.attention.value",
    "out_proj": "attention.output.dense",
}
_DIFFUSERS = {
    "q_proj": "attention.to_q",
    "k_proj": "attention.to_k",
    "v_proj": "attention.to_v",
    "out_proj": "attention.to_out.0",
}


def decoder_names(*, diffusers: bool = False, prefix: str = "decoder.") -> Templates:
    """Names of a decoder that is the part ``LatentEmbed``, ``Transformer``, ``PatchPixels`` (as in ``rae.yaml``).

    Args:
        diffusers: those of ``AutoencoderRAE``, not those of the published files.
        prefix: of their names.
    """
    ours, theirs = "trunk.layers.{i}", f"{prefix}decoder_layers.{{i}}"
    attention = _DIFFUSERS if diffusers else _PUBLISHED
    return {
        "preprocessor.proj.{leaf}": f"{prefix}decoder_embed.{{leaf}}",
        "preprocessor.class_token": f"{prefix}trainable_cls_token",
        f"{ours}.norm_1.{{leaf}}": f"{theirs}.layernorm_before.{{leaf}}",
        **{f"{ours}.mixer.{name}.{{leaf}}": f"{theirs}.{there}.{{leaf}}" for name, there in attention.items()},
        f"{ours}.norm_2.{{leaf}}": f"{theirs}.layernorm_after.{{leaf}}",
        f"{ours}.mlp.up.{{leaf}}": f"{theirs}.intermediate.dense.{{leaf}}",
        f"{ours}.mlp.down.{{leaf}}": f"{theirs}.output.dense.{{leaf}}",
        "head.norm.{leaf}": f"{prefix}decoder_norm.{{leaf}}",
        "head.proj.{leaf}": f"{prefix}decoder_pred.{{leaf}}",
    }
