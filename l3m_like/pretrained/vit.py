"""Weight names of vision transformers: timm's ViT, and MAE and AIMv2 on Hugging Face and in their own files."""

from __future__ import annotations

from l3m_like.pretrained.name_map import Source, Templates


def timm_vit_names(*, channels: int, patch: int) -> Templates:
    """Names of timm's ``VisionTransformer`` with a class token and learned positions."""
    ours, theirs = "trunk.layers.{i}", "blocks.{i}"
    return {
        "preprocessor.class_token": Source("cls_token", ones=2),
        "preprocessor.place": Source("pos_embed", ones=1),
        **_patches("preprocessor", "patch_embed.proj", channels, patch),
        f"{ours}.norm_1.{{leaf}}": f"{theirs}.norm1.{{leaf}}",
        **_fused(f"{ours}.mixer", f"{theirs}.attn.qkv"),
        f"{ours}.mixer.out_proj.{{leaf}}": f"{theirs}.attn.proj.{{leaf}}",
        f"{ours}.norm_2.{{leaf}}": f"{theirs}.norm2.{{leaf}}",
        f"{ours}.mlp.up.{{leaf}}": f"{theirs}.mlp.fc1.{{leaf}}",
        f"{ours}.mlp.down.{{leaf}}": f"{theirs}.mlp.fc2.{{leaf}}",
        "postprocessor.norm.{leaf}": "norm.{leaf}",
        "head.proj.{leaf}": "head.{leaf}",
    }


def mae_names(*, channels: int, patch: int) -> Templates:
    """Names of transformers' ``ViTMAEForPreTraining`` (its positions are constants, computed here)."""
    return {
        "preprocessor.patches.class_token": Source("vit.embeddings.cls_token", ones=2),
        **_patches("preprocessor.patches", "vit.embeddings.patch_embeddings.projection", channels, patch),
        **_mae_layers("trunk", "vit.layers"),
        "postprocessor.features.norm.{leaf}": "vit.layernorm.{leaf}",
        "postprocessor.restore.mask_token": Source("decoder.mask_token", ones=2),
        "postprocessor.restore.proj.{leaf}": "decoder.decoder_embed.{leaf}",
        **_mae_layers("postprocessor.decoder", "decoder.decoder_layers"),
        "head.norm.{leaf}": "decoder.decoder_norm.{leaf}",
        "head.proj.{leaf}": "decoder.decoder_pred.{leaf}",
    }


def aimv2_names(*, channels: int, patch: int) -> Templates:
    """Names of transformers' ``Aimv2VisionModel``: the image tower alone."""
    ours, theirs = "trunk.layers.{i}", "encoder.layers.{i}"
    return {
        **_patches("preprocessor.patches", "embeddings.patch_embed", channels, patch),
        "preprocessor.patches.norm.weight": "embeddings.rms_norm.weight",
        "preprocessor.patches.place": "embeddings.position_embedding.weight",
        f"{ours}.norm_1.weight": f"{theirs}.rms_norm1.weight",
        **{f"{ours}.mixer.{name}.weight": f"{theirs}.attention.{name}.weight" for name in _PROJECTIONS},
        f"{ours}.norm_2.weight": f"{theirs}.rms_norm2.weight",
        f"{ours}.mlp.gate.weight": f"{theirs}.ffn.gate_proj.weight",
        f"{ours}.mlp.up.weight": f"{theirs}.ffn.up_proj.weight",
        f"{ours}.mlp.down.weight": f"{theirs}.ffn.down_proj.weight",
        "postprocessor.features.norm.weight": "rms_norm.weight",
    }


def ml_aim_names(*, channels: int, patch: int) -> Templates:
    """Names in AIMv2's own files: the image tower alone."""
    ours, theirs = "trunk.layers.{i}", "trunk.blocks.{i}"
    return {
        **_patches("preprocessor.patches", "preprocessor.patchifier.proj", channels, patch),
        "preprocessor.patches.norm.weight": "preprocessor.patchifier.norm.weight",
        "preprocessor.patches.place": Source("preprocessor.pos_embed", ones=1),
        f"{ours}.norm_1.weight": f"{theirs}.norm_1.weight",
        **{
            f"{ours}.mixer.{letter}_proj.weight": Source(f"{theirs}.attn.qkv.weight", part=part, parts=3)
            for part, letter in enumerate("qkv")
        },
        f"{ours}.mixer.out_proj.weight": f"{theirs}.attn.proj.weight",
        f"{ours}.norm_2.weight": f"{theirs}.norm_2.weight",
        f"{ours}.mlp.gate.weight": f"{theirs}.mlp.fc1.weight",
        f"{ours}.mlp.up.weight": f"{theirs}.mlp.fc3.weight",
        f"{ours}.mlp.down.weight": f"{theirs}.mlp.fc2.weight",
        "postprocessor.features.norm.weight": "trunk.post_trunk_norm.weight",
    }


_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def _patches(ours: str, theirs: str, channels: int, patch: int) -> Templates:
    return {
        f"{ours}.projection.proj.weight": Source(f"{theirs}.weight", shape=(-1, channels, patch, patch)),
        f"{ours}.projection.proj.bias": f"{theirs}.bias",
    }


def _fused(ours: str, theirs: str) -> Templates:
    return {
        f"{ours}.{letter}_proj.{{leaf}}": Source(f"{theirs}.{{leaf}}", part=part, parts=3) for part, letter in enumerate("qkv")
    }


def _mae_layers(ours: str, theirs: str) -> Templates:
    ours, theirs = f"{ours}.layers.{{i}}", f"{theirs}.{{i}}"
    return {
        f"{ours}.norm_1.{{leaf}}": f"{theirs}.layernorm_before.{{leaf}}",
        **{f"{ours}.mixer.{letter}_proj.{{leaf}}": f"{theirs}.attention.{letter}_proj.{{leaf}}" for letter in "qkv"},
        f"{ours}.mixer.out_proj.{{leaf}}": f"{theirs}.attention.o_proj.{{leaf}}",
        f"{ours}.norm_2.{{leaf}}": f"{theirs}.layernorm_after.{{leaf}}",
        f"{ours}.mlp.up.{{leaf}}": f"{theirs}.mlp.fc1.{{leaf}}",
        f"{ours}.mlp.down.{{leaf}}": f"{theirs}.mlp.fc2.{{leaf}}",
    }
