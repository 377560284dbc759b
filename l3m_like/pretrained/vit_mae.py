"""Masked autoencoders (arXiv:2111.06377) as transformers has them: ``ViTMAEForPreTraining``, and its encoder alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from l3m_like.blocks import Features, MaskPatches, PatchEmbed, PatchHead, RestorePatches, Transformer
from l3m_like.pretrained import decoder, vit
from l3m_like.pretrained.families import Family
from l3m_like.pretrained.name_map import Source, Templates

KNOBS = {
    **vit.KNOBS,
    "decoder_hidden_size": "decoder_dim",
    "decoder_num_hidden_layers": "decoder_layers",
    "decoder_num_attention_heads": "decoder_heads",
    "mask_ratio": "ratio",
}
#: what files leave out
_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
    "mask_ratio": 0.75,
    "norm_pix_loss": False,
    "decoder_hidden_size": 512,
    "decoder_num_hidden_layers": 8,
    "decoder_num_attention_heads": 16,
    "decoder_intermediate_size": 2048,
}
#: names within a layer, of transformers from 5.0 on
_LAYER = {
    **{rf"attention\.{new}_proj": f"attention.attention.{old}" for new, old in (("q", "query"), ("k", "key"), ("v", "value"))},
    r"attention\.o_proj": "attention.output.dense",
    r"mlp\.fc1": "intermediate.dense",
    r"mlp\.fc2": "output.dense",
}
SPELLINGS = {
    r"decoder\.decoder_encoder\.layer\.(.*)": r"decoder.decoder_layers.\1",
    r"vit\.layers\.(.*)": r"vit.encoder.layer.\1",
    **{rf"(.*layers?\.\d+)\.{new}\.(\w+)": rf"\1.{old}.\2" for new, old in _LAYER.items()},
}


def _encoder_names(model: nn.Module) -> Templates:
    patches, embed = vit.placed(model, PatchEmbed, "preprocessor")
    trunk, _ = vit.placed(model, Transformer, "trunk")
    features, _ = vit.placed(model, Features, "postprocessor")
    return {
        f"{patches}.class_token": Source("vit.embeddings.cls_token", ones=2),
        **vit.patch_names(patches, "vit.embeddings.patch_embeddings.projection", embed),
        **vit.old_layers(trunk, "vit.encoder.layer"),
        f"{features}.norm.{{leaf}}": "vit.layernorm.{leaf}",
    }


def names(model: nn.Module) -> Templates:
    """Names of a ``ViTMAEForPreTraining``, as it is published."""
    restore, _ = vit.placed(model, RestorePatches, "postprocessor")
    trunk, _ = vit.placed(model, Transformer, "postprocessor")
    head, _ = vit.placed(model, PatchHead, "head")
    return {
        **_encoder_names(model),
        f"{restore}.mask_token": Source("decoder.mask_token", ones=2),
        f"{restore}.proj.{{leaf}}": "decoder.decoder_embed.{leaf}",
        **vit.old_layers(trunk, "decoder.decoder_layers"),
        f"{head}.norm.{{leaf}}": "decoder.decoder_norm.{leaf}",
        f"{head}.proj.{{leaf}}": "decoder.decoder_pred.{leaf}",
    }


def _describe_encoder(model: nn.Module) -> dict[str, Any]:
    _, embed = vit.placed(model, PatchEmbed, "preprocessor")
    _, trunk = vit.placed(model, Transformer, "trunk")
    _, features = vit.placed(model, Features, "postprocessor")
    fields = vit.trunk_fields(trunk)
    decoder.the_eps(fields["layer_norm_eps"], features.norm.eps)
    return {**vit.image_fields(embed, class_token=True, positions="sincos"), **fields, "qkv_bias": True}


def describe(model: nn.Module) -> dict[str, Any]:
    """The fields of ``config.json`` that follow from a masked autoencoder.

    Raises:
        UserError: the model is another.
    """
    encoder = _describe_encoder(model)
    _, mask = vit.placed(model, MaskPatches, "preprocessor")
    _, trunk = vit.placed(model, Transformer, "postprocessor")
    _, head = vit.placed(model, PatchHead, "head")
    fields = vit.trunk_fields(trunk)
    decoder.the_eps(encoder["layer_norm_eps"], fields["layer_norm_eps"], head.norm.eps)
    decoder.common([{"hidden_act": part["hidden_act"]} for part in (encoder, fields)], "part")
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    made = {f"decoder_{name}": fields[name] for name in sizes}
    return {**encoder, **made, "mask_ratio": mask.ratio, "norm_pix_loss": True}  # see PatchRegression


def normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """With what files leave out."""
    return {**_DEFAULTS, **config}


def _encoder_places(model: nn.Module) -> dict[str, Tensor]:
    _, embed = vit.placed(model, PatchEmbed, "preprocessor")
    return {"vit.embeddings.position_embeddings": vit.sinusoids(embed.side, embed.dim, class_token=True)}


def constants(model: nn.Module) -> dict[str, Tensor]:
    """The fixed positions of encoder and decoder."""
    _, embed = vit.placed(model, PatchEmbed, "preprocessor")
    _, trunk = vit.placed(model, Transformer, "postprocessor")
    places = vit.sinusoids(embed.side, trunk.dim, class_token=True)
    return {**_encoder_places(model), "decoder.decoder_pos_embed": places}


FAMILY = Family(
    "vit_mae",
    "ViTMAEForPreTraining",
    names,
    describe,
    normal,
    KNOBS,
    spellings=SPELLINGS,
    constants=constants,
    free=("mask_ratio", "norm_pix_loss"),
    colours=vit.colours,
)
ENCODER = Family(
    "vit_mae_encoder",
    "ViTMAEModel",
    _encoder_names,
    _describe_encoder,
    normal,
    KNOBS,
    ignored=(r"decoder\..*",),
    spellings=SPELLINGS,
    constants=_encoder_places,
    reads=("vit_mae",),
    colours=vit.colours,
)
