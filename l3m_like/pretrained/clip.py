"""Weight names of CLIP and SigLIP on Hugging Face: ``CLIPModel`` and ``SiglipModel`` of transformers."""

from __future__ import annotations

from l3m_like.pretrained.name_map import Source, Templates


def clip_names(*, channels: int, patch: int) -> Templates:
    """Names of a ``CLIPModel``."""
    return {
        "contrast.head.log_scale": Source("logit_scale", ones=-1),
        "text.preprocessor.embed.weight": "text_model.embeddings.token_embedding.weight",
        "text.preprocessor.place.weight": "text_model.embeddings.position_embedding.weight",
        **_layers("text", "text_model"),
        "text.postprocessor.norm.{leaf}": "text_model.final_layer_norm.{leaf}",
        "text.head.proj.weight": "text_projection.weight",
        "image.preprocessor.class_token": "vision_model.embeddings.class_embedding",
        **_patches(channels, patch),
        "image.preprocessor.final_norm.{leaf}": "vision_model.pre_layrnorm.{leaf}",
        **_layers("image", "vision_model"),
        "image.postprocessor.norm.{leaf}": "vision_model.post_layernorm.{leaf}",
        "image.head.proj.weight": "visual_projection.weight",
    }


def siglip_names(*, channels: int, patch: int) -> Templates:
    """Names of a ``SiglipModel``."""
    pool, theirs = "image.head.pool", "vision_model.head"
    return {
        "contrast.head.log_scale": "logit_scale",
        "contrast.head.bias": "logit_bias",
        "text.preprocessor.embed.weight": "text_model.embeddings.token_embedding.weight",
        "text.preprocessor.place.weight": "text_model.embeddings.position_embedding.weight",
        **_layers("text", "text_model"),
        "text.postprocessor.norm.{leaf}": "text_model.final_layer_norm.{leaf}",
        "text.head.proj.{leaf}": "text_model.head.{leaf}",
        **_patches(channels, patch),
        **_layers("image", "vision_model"),
        "image.postprocessor.norm.{leaf}": "vision_model.post_layernorm.{leaf}",
        f"{pool}.query": Source(f"{theirs}.probe", ones=2),
        **{
            f"{pool}.{letter}_proj.{leaf}": Source(f"{theirs}.attention.in_proj_{leaf}", part=part, parts=3)
            for part, letter in enumerate("qkv")
            for leaf in ("weight", "bias")
        },
        f"{pool}.out_proj.{{leaf}}": f"{theirs}.attention.out_proj.{{leaf}}",
        f"{pool}.norm.{{leaf}}": f"{theirs}.layernorm.{{leaf}}",
        f"{pool}.mlp.up.{{leaf}}": f"{theirs}.mlp.fc1.{{leaf}}",
        f"{pool}.mlp.down.{{leaf}}": f"{theirs}.mlp.fc2.{{leaf}}",
    }


def _patches(channels: int, patch: int) -> Templates:
    ours, theirs = "image.preprocessor", "vision_model.embeddings"
    return {
        f"{ours}.projection.proj.weight": Source(f"{theirs}.patch_embedding.weight", shape=(-1, channels, patch, patch)),
        f"{ours}.projection.proj.bias": f"{theirs}.patch_embedding.bias",
        f"{ours}.place": f"{theirs}.position_embedding.weight",
    }


def _layers(ours: str, theirs: str) -> Templates:
    ours, theirs = f"{ours}.trunk.layers.{{i}}", f"{theirs}.encoder.layers.{{i}}"
    return {
        f"{ours}.norm_1.{{leaf}}": f"{theirs}.layer_norm1.{{leaf}}",
        **{f"{ours}.mixer.{name}.{{leaf}}": f"{theirs}.self_attn.{name}.{{leaf}}" for name in _PROJECTIONS},
        f"{ours}.norm_2.{{leaf}}": f"{theirs}.layer_norm2.{{leaf}}",
        f"{ours}.mlp.up.{{leaf}}": f"{theirs}.mlp.fc1.{{leaf}}",
        f"{ours}.mlp.down.{{leaf}}": f"{theirs}.mlp.fc2.{{leaf}}",
    }


_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
