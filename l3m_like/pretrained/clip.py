"""CLIP (arXiv:2103.00020) and SigLIP (arXiv:2303.15343) as transformers has them, and the image tower of a CLIP alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from l3m_like.blocks import EmbeddingHead, Features, LogitScale, PatchEmbed, PlacedTokenEmbed, Transformer
from l3m_like.core.errors import UserError
from l3m_like.core.meta_model import MetaModel
from l3m_like.layers.pooling import AttentionPool
from l3m_like.pretrained import decoder, vit
from l3m_like.pretrained.families import Family
from l3m_like.pretrained.name_map import Source, Templates

#: what the older files of both leave out
_CLIP_TOWER = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 512}
_CLIP = {
    "text_config": {
        **_CLIP_TOWER,
        "vocab_size": 49408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
    },
    "vision_config": {
        **_CLIP_TOWER,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "num_channels": 3,
    },
    "projection_dim": 512,
}
_SIGLIP_TOWER = {
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
_SIGLIP = {
    "text_config": {**_SIGLIP_TOWER, "vocab_size": 32000, "max_position_embeddings": 64, "projection_size": 768},
    "vision_config": {**_SIGLIP_TOWER, "image_size": 224, "patch_size": 16, "num_channels": 3, "vision_use_head": True},
}
KNOBS = {
    **{f"vision_config.{field}": knob for field, knob in vit.KNOBS.items()},
    **{f"text_config.{field}": f"text_{knob}" for field, knob in vit.KNOBS.items() if knob in ("dim", "layers", "heads")},
    "text_config.vocab_size": "vocab_size",
    "text_config.max_position_embeddings": "max_tokens",
    "text_config.hidden_act": "activation",
    "text_config.layer_norm_eps": "norm_eps",
    "projection_dim": "embed_dim",
}


# ---- names -----------------------------------------------------------------------------------------------------------------


def clip_names(model: nn.Module) -> Templates:
    """Names of a ``CLIPModel``."""
    return {
        "contrast.head.log_scale": Source("logit_scale", ones=-1),
        **_text(),
        "text.head.proj.weight": "text_projection.weight",
        **_image(model, "image.", "vision_model."),
        "image.head.proj.weight": "visual_projection.weight",
    }


def siglip_names(model: nn.Module) -> Templates:
    """Names of a ``SiglipModel``."""
    pool, theirs = "image.head.pool", "vision_model.head"
    return {
        "contrast.head.log_scale": "logit_scale",
        "contrast.head.bias": "logit_bias",
        **_text(),
        "text.head.proj.{leaf}": "text_model.head.{leaf}",
        **_image(model, "image.", "vision_model."),
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


def _text() -> Templates:
    return {
        "text.preprocessor.embed.weight": "text_model.embeddings.token_embedding.weight",
        "text.preprocessor.place.weight": "text_model.embeddings.position_embedding.weight",
        **_layers("text.trunk", "text_model."),
        "text.postprocessor.norm.{leaf}": "text_model.final_layer_norm.{leaf}",
    }


def _image(model: nn.Module, ours: str, theirs: str) -> Templates:
    """Of an image tower up to its features; ``ours``, ``theirs``: prefixes."""
    patches, embed = vit.placed(model, PatchEmbed, f"{ours}preprocessor")
    trunk, _ = vit.placed(model, Transformer, f"{ours}trunk")
    features, _ = vit.placed(model, Features, f"{ours}postprocessor")
    return {
        f"{patches}.class_token": f"{theirs}embeddings.class_embedding",
        **vit.patch_names(patches, f"{theirs}embeddings.patch_embedding", embed),
        f"{patches}.place": f"{theirs}embeddings.position_embedding.weight",
        f"{patches}.final_norm.{{leaf}}": f"{theirs}pre_layrnorm.{{leaf}}",
        **_layers(trunk, theirs),
        f"{features}.norm.{{leaf}}": f"{theirs}post_layernorm.{{leaf}}",
    }


def _layers(ours: str, theirs: str) -> Templates:
    ours, theirs = f"{ours}.layers.{{i}}", f"{theirs}encoder.layers.{{i}}"
    return {
        f"{ours}.norm_1.{{leaf}}": f"{theirs}.layer_norm1.{{leaf}}",
        **{f"{ours}.mixer.{name}.{{leaf}}": f"{theirs}.self_attn.{name}.{{leaf}}" for name in vit.PROJECTIONS},
        f"{ours}.norm_2.{{leaf}}": f"{theirs}.layer_norm2.{{leaf}}",
        f"{ours}.mlp.up.{{leaf}}": f"{theirs}.mlp.fc1.{{leaf}}",
        f"{ours}.mlp.down.{{leaf}}": f"{theirs}.mlp.fc2.{{leaf}}",
    }


# ---- fields of config.json ---------------------------------------------------------------------------------------------------


def describe_clip(model: nn.Module) -> dict[str, Any]:
    """The fields of ``config.json`` that follow from a CLIP.

    Raises:
        UserError: the model is another.
    """
    text = _text_fields(model, "causal")
    vision = _image_fields(model, "image.", class_token=True, final_norm="layer", bias=False)
    heads = [vit.placed(model, EmbeddingHead, f"{part}.head")[1] for part in ("text", "image")]
    for head, kind in zip(heads, ("end", "first"), strict=True):
        vit.check_pool(head, kind)
        if head.proj is None or head.proj.bias is not None:
            raise UserError("its EmbeddingHeads have a bias or no projection; embed_dim: a number, bias: false.")
    _check_scale(model, bias=False)
    width = decoder.common([{"projection_dim": head.proj.out_features} for head in heads if head.proj is not None], "head")
    return {"text_config": {**text, **width}, "vision_config": {**vision, **width}, **width}


def describe_siglip(model: nn.Module) -> dict[str, Any]:
    """The fields of ``config.json`` that follow from a SigLIP.

    Raises:
        UserError: the model is another.
    """
    text, vision = _text_fields(model, "full"), _image_fields(model, "image.")
    head, pool = (vit.placed(model, EmbeddingHead, f"{part}.head")[1] for part in ("text", "image"))
    vit.check_pool(head, "last")
    vit.check_pool(pool, "AttentionPool")
    assert isinstance(pool.pool, AttentionPool)
    inner = {
        "num_attention_heads": pool.pool.num_heads,
        "intermediate_size": pool.pool.mlp.hidden_dim,
        "hidden_act": vit.activation(pool.pool.mlp),
        "layer_norm_eps": pool.pool.norm.eps,
    }
    decoder.common([inner, {name: vision[name] for name in inner}], "pooling")
    if head.proj is None or head.proj.bias is None or pool.proj is not None:
        raise UserError("its EmbeddingHeads are others: with a projection and a bias of the text, without one of the image.")
    _check_scale(model, bias=True)
    return {
        "text_config": {**text, "projection_size": head.proj.out_features},
        "vision_config": {**vision, "vision_use_head": True},
    }


def describe_image_tower(model: nn.Module) -> dict[str, Any]:
    """The fields of ``config.json`` that follow from a CLIP's image tower, as the encoder of another model.

    Raises:
        UserError: the model is another.
    """
    return _image_fields(model, "", class_token=True, final_norm="layer", bias=False)


def _text_fields(model: nn.Module, mask: str) -> dict[str, Any]:
    if not isinstance(model, nn.ModuleDict) or not isinstance(dict(model.items()).get("text"), MetaModel):
        raise UserError("it is no named dict of the MetaModels image, text and contrast.")
    _, embed = vit.placed(model, PlacedTokenEmbed, "text.preprocessor")
    _, trunk = vit.placed(model, Transformer, "text.trunk")
    _, features = vit.placed(model, Features, "text.postprocessor")
    fields = vit.trunk_fields(trunk, masks=(mask,))
    decoder.the_eps(fields["layer_norm_eps"], features.norm.eps)
    if embed.place is None:
        raise UserError("the positions of its text are fixed sinusoids, not learned; set fixed: false.")
    sizes = {"vocab_size": embed.embed.num_embeddings, "max_position_embeddings": embed.place.num_embeddings}
    return {**sizes, **fields}


def _image_fields(
    model: nn.Module, ours: str, *, class_token: bool = False, final_norm: str | None = None, bias: bool = True
) -> dict[str, Any]:
    _, embed = vit.placed(model, PatchEmbed, f"{ours}preprocessor")
    _, trunk = vit.placed(model, Transformer, f"{ours}trunk")
    _, features = vit.placed(model, Features, f"{ours}postprocessor")
    image = vit.image_fields(embed, class_token=class_token, positions="learned", final_norm=final_norm, bias=bias)
    fields = vit.trunk_fields(trunk)
    decoder.the_eps(fields["layer_norm_eps"], features.norm.eps, *([embed.final_norm.eps] if embed.final_norm else []))
    return {**image, **fields}


def _check_scale(model: nn.Module, *, bias: bool) -> None:
    _, scale = vit.placed(model, LogitScale, "contrast.head")
    if (scale.bias is not None) != bias:
        raise UserError(f"its LogitScale has {'no' if bias else 'a'} bias.")


def _normal(defaults: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``defaults`` as ``config`` has them, those of nested ones likewise."""
    return {
        name: _normal(value, config.get(name) or {}) if isinstance(value, Mapping) else config.get(name, value)
        for name, value in defaults.items()
    }


def normal_clip(config: Mapping[str, Any]) -> dict[str, Any]:
    """With what older files leave out. The width of the embeddings counts once: in the towers of published files it is often
    another, and nobody reads it there."""
    fields = _normal(_CLIP, config)
    width = {"projection_dim": fields["projection_dim"]}
    return {**fields, "text_config": {**fields["text_config"], **width}, "vision_config": {**fields["vision_config"], **width}}


def normal_siglip(config: Mapping[str, Any]) -> dict[str, Any]:
    """With what older files leave out."""
    fields = _normal(_SIGLIP, config)
    text = fields["text_config"]
    text["projection_size"] = (config.get("text_config") or {}).get("projection_size", text["hidden_size"])
    return fields


def normal_image_tower(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a tower's own ``config.json``, or of a whole CLIP's."""
    return _normal(_CLIP, {"vision_config": config.get("vision_config", config)})["vision_config"]


def _colours(model: nn.Module) -> tuple[list[float], list[float]]:
    return vit.colours(model, "image.preprocessor")


_IGNORED = (r".*\.position_ids",)
CLIP = Family("clip", "CLIPModel", clip_names, describe_clip, normal_clip, KNOBS, ignored=_IGNORED, colours=_colours)
SIGLIP = Family(
    "siglip", "SiglipModel", siglip_names, describe_siglip, normal_siglip, KNOBS, ignored=_IGNORED, colours=_colours
)
CLIP_VISION = Family(
    "clip_vision_model",
    "CLIPVisionModel",
    lambda model: _image(model, "", ""),
    describe_image_tower,
    normal_image_tower,
    vit.KNOBS,
    ignored=(r".*\.position_ids", r"(text_model|text_projection|visual_projection)\..*", "logit_scale"),
    spellings={r"vision_model\.(.*)": r"\1"},
    reads=("clip",),
    colours=vit.colours,
)
