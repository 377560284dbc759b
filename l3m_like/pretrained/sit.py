"""Checkpoints of SiT (arXiv:2401.08740): a file of ``torch.save`` with an averaged and a trained state, or with one alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from l3m_like.blocks import DiT, PatchEmbed
from l3m_like.pretrained import decoder, dit, vit
from l3m_like.pretrained.families import Family
from l3m_like.pretrained.name_map import Source, Templates

#: layers, width, heads of the published sizes
SIZES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6)}


def sit_names(*, channels: int, patch: int) -> Templates:
    """Names in SiT's own checkpoints (``pos_embed`` there is a constant, computed here)."""
    ours, theirs = "trunk.layers.{i}", "blocks.{i}"
    return {
        "preprocessor.patches.projection.proj.weight": Source("x_embedder.proj.weight", shape=(-1, channels, patch, patch)),
        "preprocessor.patches.projection.proj.bias": "x_embedder.proj.bias",
        "preprocessor.condition.time.up.{leaf}": "t_embedder.mlp.0.{leaf}",
        "preprocessor.condition.time.down.{leaf}": "t_embedder.mlp.2.{leaf}",
        "preprocessor.condition.label.weight": "y_embedder.embedding_table.weight",
        **vit.fused(f"{ours}.mixer", f"{theirs}.attn.qkv"),
        f"{ours}.mixer.out_proj.{{leaf}}": f"{theirs}.attn.proj.{{leaf}}",
        f"{ours}.mlp.up.{{leaf}}": f"{theirs}.mlp.fc1.{{leaf}}",
        f"{ours}.mlp.down.{{leaf}}": f"{theirs}.mlp.fc2.{{leaf}}",
        f"{ours}.modulation.proj.{{leaf}}": f"{theirs}.adaLN_modulation.1.{{leaf}}",
        "head.proj.{leaf}": "final_layer.linear.{leaf}",
        "head.modulation.proj.{leaf}": "final_layer.adaLN_modulation.1.{leaf}",
    }


def describe(model: nn.Module) -> dict[str, Any]:
    """What such a file's arguments say of a model.

    Raises:
        UserError: the model is another.
    """
    fields = dit.describe(model)
    names = ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size", "sample_size", "num_embeds_ada_norm")
    return {name: fields[name] for name in names}


def normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """``describe`` of the arguments ``{model: SiT-XL/2, image_size: 256, num_classes: 1000}``; without them nothing."""
    size = re.fullmatch(r"SiT-(\w+)/(\d+)", str(config.get("model")))
    if size is None or size[1] not in SIZES:
        return {}
    layers, width, heads = SIZES[size[1]]
    return {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "patch_size": int(size[2]),
        "sample_size": config.get("image_size", 256) // 8,
        "num_embeds_ada_norm": config.get("num_classes", 1000),
    }


def templates(model: nn.Module) -> Templates:
    patches = decoder.the_block(model, PatchEmbed)
    decoder.the_block(model, DiT)
    return sit_names(channels=patches.shape[0], patch=patches.projection.patch)


def constants(model: nn.Module) -> dict[str, Tensor]:
    """The fixed positions."""
    patches = decoder.the_block(model, PatchEmbed)
    return {"pos_embed": vit.sinusoids(patches.side, patches.dim)}


FAMILY = Family(
    model_type="sit",
    architecture="SiT",
    names=templates,
    describe=describe,
    normal=normal,
    knobs=dit.KNOBS,
    layout="file",
    constants=constants,
)
