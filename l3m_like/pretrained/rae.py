"""RAE's decoders (arXiv:2510.11690): the published files. Their layers are MAE's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from l3m_like.blocks import PatchEmbed, PatchPixels, Transformer
from l3m_like.pretrained import decoder, vit
from l3m_like.pretrained.families import Family
from l3m_like.pretrained.name_map import Source, Templates


def names(model: nn.Module) -> Templates:
    """Names in the published files of a decoder: the part ``decoder`` of ``rae.yaml``."""
    embed, _ = vit.placed(model, PatchEmbed, "preprocessor")
    trunk, _ = vit.placed(model, Transformer, "trunk")
    head, _ = vit.placed(model, PatchPixels, "head")
    return {
        f"{embed}.projection.proj.{{leaf}}": "decoder_embed.{leaf}",
        f"{embed}.class_token": Source("trainable_cls_token", ones=2),
        **vit.old_layers(trunk, "decoder_layers"),
        f"{head}.norm.{{leaf}}": "decoder_norm.{leaf}",
        f"{head}.proj.{{leaf}}": "decoder_pred.{leaf}",
    }


def describe(model: nn.Module) -> dict[str, Any]:
    """What a decoder is; files say none of it.

    Raises:
        UserError: the model is another.
    """
    _, embed = vit.placed(model, PatchEmbed, "preprocessor")
    _, trunk = vit.placed(model, Transformer, "trunk")
    _, head = vit.placed(model, PatchPixels, "head")
    image, fields = vit.image_fields(embed, class_token=True, positions="sincos"), vit.trunk_fields(trunk)
    decoder.the_eps(fields["layer_norm_eps"], head.norm.eps)
    return {**fields, "latent_channels": image["num_channels"], "image_size": head.image_size, "patch_size": head.patch}


def normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing: files hold tensors alone."""
    return {}


def constants(model: nn.Module) -> dict[str, Tensor]:
    """The fixed positions."""
    _, trunk = vit.placed(model, Transformer, "trunk")
    _, head = vit.placed(model, PatchPixels, "head")
    return {"decoder_pos_embed": vit.sinusoids(head.image_size // head.patch, trunk.dim, class_token=True)}


FAMILY = Family(
    "rae_decoder",
    "GeneralDecoder",
    names,
    describe,
    normal,
    ignored=(r"encoder\..*",),
    spellings={r"decoder\.(decoder_.*|trainable_cls_token)": r"\1"},  # of a whole autoencoder
    layout="file",
    constants=constants,
)
