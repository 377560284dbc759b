"""RAE's DiT^DH (arXiv:2510.11690): ``DiTwDDTHead`` in its published files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.blocks import DiTDH, NoiseLevelEmbed, PatchEmbed, TokenPatchDecode
from l3m_like.core.errors import UserError
from l3m_like.layers import Attention, DiTLayer, RMSNorm, SwiGLU
from l3m_like.pretrained import decoder, vit
from l3m_like.pretrained.families import Family
from l3m_like.pretrained.name_map import Source, Templates


def _parts(
    model: nn.Module,
) -> tuple[tuple[str, PatchEmbed], tuple[str, NoiseLevelEmbed], tuple[str, DiTDH], tuple[str, TokenPatchDecode]]:
    return (
        vit.placed(model, PatchEmbed, "preprocessor"),
        vit.placed(model, NoiseLevelEmbed, "preprocessor"),
        vit.placed(model, DiTDH, "trunk"),
        vit.placed(model, TokenPatchDecode, "head"),
    )


def names(model: nn.Module) -> Templates:
    """Names of the part ``generator`` of ``dit_dh.yaml``. Layers of trunk and head are one list there."""
    (patches, embed), (condition, _), (trunk, block), (head, _) = _parts(model)
    channels, wide = embed.shape[0], block.embed.patch
    table: dict[str, str | Source] = {
        **vit.patch_names(patches, "s_embedder.proj", embed),
        f"{trunk}.embed.proj.weight": Source("x_embedder.proj.weight", shape=(-1, channels, wide, wide)),
        f"{trunk}.embed.proj.bias": "x_embedder.proj.bias",
        f"{condition}.level.features.frequency": "t_embedder.W",
        f"{condition}.level.up.{{leaf}}": "t_embedder.mlp.0.{leaf}",
        f"{condition}.level.down.{{leaf}}": "t_embedder.mlp.2.{leaf}",
        f"{condition}.label.weight": "y_embedder.embedding_table.weight",
        f"{trunk}.project.{{leaf}}": "s_projector.{leaf}",
        f"{head}.norm.weight": "final_layer.norm_final.weight",
        f"{head}.proj.{{leaf}}": "final_layer.linear.{leaf}",
        f"{head}.modulation.proj.{{leaf}}": "final_layer.adaLN_modulation.1.{leaf}",
    }
    layers = [f"{trunk}.layers.{i}" for i in range(len(block.layers))]
    layers += [f"{trunk}.head_layers.{i}" for i in range(len(block.head_layers))]
    for place, ours in enumerate(layers):
        theirs = f"blocks.{place}"
        table |= {
            f"{ours}.norm_1.weight": f"{theirs}.norm1.weight",
            **vit.fused(f"{ours}.mixer", f"{theirs}.attn.qkv"),
            f"{ours}.mixer.out_proj.{{leaf}}": f"{theirs}.attn.proj.{{leaf}}",
            f"{ours}.norm_2.weight": f"{theirs}.norm2.weight",
            f"{ours}.mlp.gate.{{leaf}}": Source(f"{theirs}.mlp.w12.{{leaf}}", part=0, parts=2),
            f"{ours}.mlp.up.{{leaf}}": Source(f"{theirs}.mlp.w12.{{leaf}}", part=1, parts=2),
            f"{ours}.mlp.down.{{leaf}}": f"{theirs}.mlp.w3.{{leaf}}",
            f"{ours}.modulation.proj.{{leaf}}": f"{theirs}.adaLN_modulation.1.{{leaf}}",
        }
    return table


def describe(model: nn.Module) -> dict[str, Any]:
    """What a generator is; files say none of it.

    Raises:
        UserError: the model is another.
    """
    (_, embed), (_, condition), (_, trunk), _ = _parts(model)
    found: dict[str, list[Any]] = {}
    for part in ("layers", "head_layers"):
        fields = []
        for at, layer in enumerate(getattr(trunk, part)):
            known = isinstance(layer, DiTLayer) and isinstance(layer.norm_1, RMSNorm)
            known = known and isinstance(layer.mixer, Attention) and isinstance(layer.mlp, SwiGLU)
            if not known or not layer.mixer.interleaved or layer.mixer.q_norm is not None or layer.mixer.window is not None:
                raise UserError(
                    f"{part} {at} is no DiTLayer of RMSNorm, Attention (interleaved: true, no qk_norm, no window) and SwiGLU."
                )
            fields.append({"num_heads": layer.mixer.num_heads, "mlp_dim": layer.mlp.hidden_dim})
        found = {name: [*found.get(name, []), value] for name, value in decoder.common(fields, "layer").items()}
    return {
        "input_size": embed.shape[1],
        "in_channels": embed.shape[0],
        "hidden_size": [embed.dim, trunk.project.out_features],
        "depth": [len(trunk.layers), len(trunk.head_layers)],
        "num_classes": condition.label.num_embeddings - 1,
        **found,
    }


def normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing: files hold tensors alone."""
    return {}


def constants(model: nn.Module) -> dict[str, Tensor]:
    """The fixed positions, and the cosines and sines that queries and keys are turned by."""
    (_, embed), _, (_, trunk), _ = _parts(model)
    place = torch.arange(embed.side**2)
    places = torch.stack((place // embed.side, place % embed.side)).unsqueeze(1)
    tables = {"pos_embed": vit.sinusoids(embed.side, embed.dim)}
    for name, rope in zip(("enc", "dec"), trunk.ropes, strict=True):
        for kind, table in zip(("cos", "sin"), rope(places, torch.float64), strict=True):
            # there each number stands beside its copy, here in the other half
            half = table.squeeze(0)[:, : table.shape[-1] // 2]
            tables[f"{name}_feat_rope.freqs_{kind}"] = half.repeat_interleave(2, dim=-1)
    return tables


FAMILY = Family("dit_dh", "DiTwDDTHead", names, describe, normal, layout="file", constants=constants)
