"""timm's vision transformers, as its hub publishes them: read into blocks, or into ``TimmViT``, which has timm's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.blocks import ClassHead, Features, PatchEmbed, Transformer
from l3m_like.core.errors import UserError
from l3m_like.core.meta_model import walk
from l3m_like.layers.timm_vit import TimmViT, create
from l3m_like.pretrained import decoder, vit
from l3m_like.pretrained.families import Family
from l3m_like.pretrained.name_map import Source, Templates

#: of whose name and arguments an export makes its ``config.json``
_BASE = "vit_base_patch16_224"
#: of TimmViT, but for the last norm's
_WHOLE = (
    "cls_token", "reg_token", "pos_embed", "patch_embed.proj.{leaf}",
    *(f"blocks.{{i}}.{name}.{{leaf}}" for name in ("norm1", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.proj", "norm2")),
    *(f"blocks.{{i}}.mlp.{name}.{{leaf}}" for name in ("fc1", "fc2", "norm", "fc1_g", "fc1_x")),
    "blocks.{i}.ls1.gamma", "blocks.{i}.ls2.gamma",
)  # fmt: skip
KNOBS = {
    "num_classes": "classes",
    "num_features": "dim",
    "model_args.img_size": "image_size",
    "model_args.patch_size": "patch",
    "model_args.in_chans": "channels",
    "model_args.embed_dim": "dim",
    "model_args.depth": "layers",
    "model_args.num_heads": "heads",
}


def names(model: nn.Module) -> Templates:
    """Names of timm's ``VisionTransformer``."""
    patches, embed = vit.placed(model, PatchEmbed, "preprocessor")
    trunk, _ = vit.placed(model, Transformer, "trunk")
    features, _ = vit.placed(model, Features, "postprocessor")
    head, _ = vit.placed(model, ClassHead, "head")
    ours, theirs = f"{trunk}.layers.{{i}}", "blocks.{i}"
    return {
        f"{patches}.class_token": Source("cls_token", ones=2),
        f"{patches}.place": Source("pos_embed", ones=1),
        **vit.patch_names(patches, "patch_embed.proj", embed),
        f"{ours}.norm_1.{{leaf}}": f"{theirs}.norm1.{{leaf}}",
        **vit.fused(f"{ours}.mixer", f"{theirs}.attn.qkv"),
        f"{ours}.mixer.out_proj.{{leaf}}": f"{theirs}.attn.proj.{{leaf}}",
        f"{ours}.norm_2.{{leaf}}": f"{theirs}.norm2.{{leaf}}",
        f"{ours}.mlp.up.{{leaf}}": f"{theirs}.mlp.fc1.{{leaf}}",
        f"{ours}.mlp.down.{{leaf}}": f"{theirs}.mlp.fc2.{{leaf}}",
        f"{features}.norm.{{leaf}}": "norm.{leaf}",
        f"{head}.proj.{{leaf}}": "head.{leaf}",
    }


def describe(model: nn.Module) -> dict[str, Any]:
    """What ``config.json`` says of such a model, as a change of timm's base model.

    Raises:
        UserError: the model is another.
    """
    _, embed = vit.placed(model, PatchEmbed, "preprocessor")
    _, trunk = vit.placed(model, Transformer, "trunk")
    _, features = vit.placed(model, Features, "postprocessor")
    _, head = vit.placed(model, ClassHead, "head")
    vit.check_pool(head, "first")
    positions = "sincos" if embed.positions == "sincos" else "learned"
    image, fields = vit.image_fields(embed, class_token=True, positions=positions), vit.trunk_fields(trunk)
    if decoder.the_eps(fields["layer_norm_eps"], features.norm.eps) != 1e-6:
        raise UserError(
            f"the eps of its norms is {features.norm.eps}, for which timm's config.json has no place; norm_eps: 1e-6."
        )
    size, channels = image["image_size"], image["num_channels"]
    mean, std = vit.embed_colours(embed)
    return {
        "architecture": _BASE,
        "num_classes": head.proj.out_features,
        "num_features": embed.dim,
        "global_pool": "token",
        "model_args": {
            "img_size": size,
            "patch_size": image["patch_size"],
            "in_chans": channels,
            "embed_dim": embed.dim,
            "depth": fields["num_hidden_layers"],
            "num_heads": fields["num_attention_heads"],
            "mlp_ratio": fields["intermediate_size"] / embed.dim,
            "act_layer": fields["hidden_act"].replace("gelu_pytorch_tanh", "gelu_tanh"),
        },
        "pretrained_cfg": {
            "input_size": [channels, size, size],
            "fixed_input_size": True,
            "mean": mean,
            "std": std,
            "num_classes": head.proj.out_features,
            "classifier": "head",
            "first_conv": "patch_embed.proj",
            "custom_load": False,
        },
    }


def normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """As ``describe``: what timm makes of its ``config.json``.

    Raises:
        UserError: timm is not installed, or makes no VisionTransformer of it.
    """
    inner = config.get("pretrained_cfg", {})
    classes = config.get("num_classes", inner.get("num_classes", 1000))
    settings = {"num_classes": classes, **config.get("model_args", {})}
    if "global_pool" in config:
        settings["global_pool"] = config["global_pool"]
    with torch.device("meta"):
        made = create(config["architecture"], settings)
    block: Any = made.blocks[0]
    acts = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "GELU_": "gelu", "QuickGELU": "quick_gelu"}
    return {
        **config,
        "architecture": _BASE,
        "num_classes": made.num_classes,
        "num_features": made.embed_dim,
        "global_pool": made.global_pool,
        "model_args": {
            "img_size": made.patch_embed.img_size[0],
            "patch_size": made.patch_embed.patch_size[0],
            "in_chans": made.patch_embed.proj.in_channels,
            "embed_dim": made.embed_dim,
            "depth": len(made.blocks),
            "num_heads": block.attn.num_heads,
            "mlp_ratio": block.mlp.fc1.out_features / made.embed_dim,
            "act_layer": acts.get(type(block.mlp.act).__name__, type(block.mlp.act).__name__),
        },
    }


def constants(model: nn.Module) -> dict[str, Tensor]:
    """Fixed positions, where the model has these."""
    _, embed = vit.placed(model, PatchEmbed, "preprocessor")
    return {"pos_embed": vit.sinusoids(embed.side, embed.dim, class_token=True)} if embed.positions == "sincos" else {}


FAMILY = Family(
    "timm",
    "VisionTransformer",
    names,
    describe,
    normal,
    KNOBS,
    layout="timm",
    constants=constants,
    free=("pretrained_cfg",),
    colours=vit.colours,
    sized_by={"num_classes": "head", "global_pool": "head"},
)


def wrapped_timm(model: nn.Module) -> Family | None:
    """The family of the one ``TimmViT`` of a block of ``model``, with the names as they are; None: it has none."""
    found = [(path, block.encoder) for path, block in walk(model) if isinstance(getattr(block, "encoder", None), TimmViT)]
    if len(found) != 1:
        return None
    path, encoder = found[0]
    name = str(encoder.name).partition(".")[0]  # type: ignore[union-attr]
    return Family(
        "timm",
        "VisionTransformer",
        {f"{path}.encoder.model.{there}": there for there in _WHOLE},
        lambda model: {"architecture": name},
        ignored=(r"norm\..*", r"fc_norm\..*", r"head\..*", r"attn_pool\..*"),
    )
