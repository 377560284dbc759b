"""The image towers of AIMv2 (arXiv:2411.14402), as transformers has them and in their own folders, and of AIM (arXiv:2401.08541).

Their decoders and heads are not published: ``init.random`` names them; an export leaves out what serves training alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from l3m_like.blocks import Features, PatchEmbed, Transformer
from l3m_like.pretrained import decoder, vit
from l3m_like.pretrained.families import Family
from l3m_like.pretrained.name_map import Source, Templates

KNOBS = {**vit.KNOBS, "rms_norm_eps": "norm_eps"}
#: what files leave out
_DEFAULTS = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "rms_norm_eps": 1e-5,
    "qkv_bias": False,
}


def _parts(model: nn.Module) -> tuple[tuple[str, PatchEmbed], tuple[str, Transformer], tuple[str, Features]]:
    return (
        vit.placed(model, PatchEmbed, "preprocessor"),
        vit.placed(model, Transformer, "trunk"),
        vit.placed(model, Features, "postprocessor"),
    )


def vision_names(model: nn.Module) -> Templates:
    """Names of transformers' ``Aimv2VisionModel``."""
    (patches, embed), (trunk, _), (features, _) = _parts(model)
    ours, theirs = f"{trunk}.layers.{{i}}", "encoder.layers.{i}"
    return {
        **vit.patch_names(patches, "embeddings.patch_embed", embed),
        f"{patches}.norm.weight": "embeddings.rms_norm.weight",
        f"{patches}.place": "embeddings.position_embedding.weight",
        f"{ours}.norm_1.weight": f"{theirs}.rms_norm1.weight",
        **{f"{ours}.mixer.{name}.weight": f"{theirs}.attention.{name}.weight" for name in vit.PROJECTIONS},
        f"{ours}.norm_2.weight": f"{theirs}.rms_norm2.weight",
        f"{ours}.mlp.gate.weight": f"{theirs}.ffn.gate_proj.weight",
        f"{ours}.mlp.up.weight": f"{theirs}.ffn.up_proj.weight",
        f"{ours}.mlp.down.weight": f"{theirs}.ffn.down_proj.weight",
        f"{features}.norm.weight": "rms_norm.weight",
    }


def own_names(model: nn.Module) -> Templates:
    """Names in AIM's and AIMv2's own files; the second has a matrix more in its MLPs, and learned positions."""
    (patches, embed), (trunk, _), (features, _) = _parts(model)
    ours, theirs = f"{trunk}.layers.{{i}}", "trunk.blocks.{i}"
    gated = hasattr(trunk_layer(model).mlp, "gate")
    mlp = {"gate": "fc1", "up": "fc3", "down": "fc2"} if gated else {"up": "fc1", "down": "fc2"}
    return {
        **vit.patch_names(patches, "preprocessor.patchifier.proj", embed),
        f"{patches}.norm.{{leaf}}": "preprocessor.patchifier.norm.{leaf}",
        f"{patches}.place": Source("preprocessor.pos_embed", ones=1),
        f"{ours}.norm_1.{{leaf}}": f"{theirs}.norm_1.{{leaf}}",
        **vit.fused(f"{ours}.mixer", f"{theirs}.attn.qkv", "weight"),
        f"{ours}.mixer.out_proj.weight": f"{theirs}.attn.proj.weight",
        f"{ours}.norm_2.{{leaf}}": f"{theirs}.norm_2.{{leaf}}",
        **{f"{ours}.mlp.{name}.weight": f"{theirs}.mlp.{there}.weight" for name, there in mlp.items()},
        f"{features}.norm.{{leaf}}": "trunk.post_trunk_norm.{leaf}",
    }


def trunk_layer(model: nn.Module) -> Any:
    """The first layer of its trunk."""
    return vit.placed(model, Transformer, "trunk")[1].layers[0]


def _describe(model: nn.Module, norm: str, positions: str) -> dict[str, Any]:
    (_, embed), (_, trunk), (_, features) = _parts(model)
    fields = vit.trunk_fields(trunk, masks=("prefix", "full"), norm=norm, bias=False)
    eps = decoder.the_eps(fields.pop("layer_norm_eps"), features.norm.eps, embed.norm.eps if embed.norm else 0.0)
    image = vit.image_fields(embed, class_token=False, positions=positions, norm=norm)
    return {**image, **fields, f"{norm}_norm_eps": eps, "qkv_bias": False}


def describe_vision(model: nn.Module) -> dict[str, Any]:
    """The fields of transformers' ``config.json`` that follow from a model with AIMv2's image tower.

    Raises:
        UserError: the model is another.
    """
    return {**_describe(model, "rms", "learned"), "mlp_bias": False, "is_native": False, "use_head": False}


def describe_own(model: nn.Module) -> dict[str, Any]:
    """Likewise of AIMv2's own ``config.json``."""
    fields = _describe(model, "rms", "learned")
    del fields["hidden_act"]
    return {**fields, "use_bias": False}


def describe_first(model: nn.Module) -> dict[str, Any]:
    """Likewise of an AIM, whose file says none of it."""
    return _describe(model, "layer", "sincos")


def normal_vision(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a tower's own ``config.json``, or of a whole ``Aimv2Model``'s, with what they leave out."""
    defaults = {**_DEFAULTS, "hidden_act": "silu", "mlp_bias": False, "is_native": False}
    return {**defaults, **config.get("vision_config", config)}


def normal_own(config: Mapping[str, Any]) -> dict[str, Any]:
    """With what files leave out."""
    return {**_DEFAULTS, "use_bias": False, **config} if config else {}


def normal_first(config: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing: files hold tensors alone."""
    return {}


AIMV2_VISION = Family(
    "aimv2_vision_model",
    "Aimv2VisionModel",
    vision_names,
    describe_vision,
    normal_vision,
    KNOBS,
    # the pooling that is trained against texts; the features come before it
    ignored=(r"head\..*", r"(text_model|text_projection|visual_projection)\..*", "logit_scale"),
    spellings={r"vision_model\.(.*)": r"\1"},
    reads=("aimv2",),
    free=("use_head",),
    colours=vit.colours,
)
AIMV2 = Family(
    "aimv2", "AIMv2Model", own_names, describe_own, normal_own, KNOBS, ignored=(r"head\..*",), colours=vit.colours
)
AIMV1 = Family(
    "aimv1", "AIM", own_names, describe_first, normal_first, KNOBS, ignored=(r"head\..*",), layout="file"
)  # its head: a probe
