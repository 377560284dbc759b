"""What vision transformers have in common: names, and fields of ``config.json``."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from l3m_like.blocks import PatchEmbed, Transformer
from l3m_like.core.errors import UserError
from l3m_like.core.meta_model import walk
from l3m_like.layers import MLP, Attention, SwiGLU, TransformerLayer, sincos_positions
from l3m_like.layers.norm import AffineLayerNorm, RMSNorm
from l3m_like.layers.pooling import Pool
from l3m_like.pretrained import decoder
from l3m_like.pretrained.name_map import Source, Templates

Block = TypeVar("Block", bound=nn.Module)

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
#: as transformers calls them
ACTIVATION_NAMES = {"gelu_tanh": "gelu_pytorch_tanh"}
KNOBS = {
    "hidden_size": "dim",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_dim",
    "hidden_act": "activation",
    "layer_norm_eps": "norm_eps",
    "image_size": "image_size",
    "patch_size": "patch",
    "num_channels": "channels",
}


def placed(model: nn.Module, kind: type[Block], part: str) -> tuple[str, Block]:
    """``(path, block)`` of the one ``kind`` that ``part`` of ``model`` is or holds (frozen parts and towers are not looked into).

    Raises:
        UserError: there is none, or there are several.
    """
    found = [(path, block) for path, block in walk(model) if isinstance(block, kind) and f"{path}.".startswith(f"{part}.")]
    if len(found) != 1:
        raise UserError(f"its {part} has {len(found) or 'no'} {kind.__name__}{'s' if len(found) > 1 else ''}; one is needed.")
    return found[0]


def colours(model: nn.Module, part: str = "preprocessor") -> tuple[list[float], list[float]]:
    """Mean and deviation of the colours of a model's images in [0, 1], a number for each channel; see ``placed``."""
    return embed_colours(placed(model, PatchEmbed, part)[1])


def embed_colours(embed: PatchEmbed) -> tuple[list[float], list[float]]:
    """As ``colours``; images in [-1, 1] as they are have 0.5 and 0.5."""
    if embed.colours is None:
        return [0.5] * embed.shape[0], [0.5] * embed.shape[0]
    return list(embed.colours.mean), list(embed.colours.std)


def patch_names(ours: str, theirs: str, embed: PatchEmbed) -> Templates:
    """Names of the projection of patches, a convolution there."""
    return {
        f"{ours}.projection.proj.weight": Source(f"{theirs}.weight", shape=(-1, embed.shape[0], *[embed.projection.patch] * 2)),
        f"{ours}.projection.proj.bias": f"{theirs}.bias",
    }


def fused(ours: str, theirs: str, leaf: str = "{leaf}") -> Templates:
    """Names of queries, keys and values that are one matrix there."""
    return {f"{ours}.{letter}_proj.{leaf}": Source(f"{theirs}.{leaf}", part=part, parts=3) for part, letter in enumerate("qkv")}


def old_layers(ours: str, theirs: str) -> Templates:
    """Names of the layers ``ours``, which is a ``Transformer``, as the first ViTs of transformers have them."""
    ours, theirs = f"{ours}.layers.{{i}}", f"{theirs}.{{i}}"
    attention = dict(zip("qkv", ("query", "key", "value"), strict=True))
    return {
        f"{ours}.norm_1.{{leaf}}": f"{theirs}.layernorm_before.{{leaf}}",
        **{f"{ours}.mixer.{x}_proj.{{leaf}}": f"{theirs}.attention.attention.{name}.{{leaf}}" for x, name in attention.items()},
        f"{ours}.mixer.out_proj.{{leaf}}": f"{theirs}.attention.output.dense.{{leaf}}",
        f"{ours}.norm_2.{{leaf}}": f"{theirs}.layernorm_after.{{leaf}}",
        f"{ours}.mlp.up.{{leaf}}": f"{theirs}.intermediate.dense.{{leaf}}",
        f"{ours}.mlp.down.{{leaf}}": f"{theirs}.output.dense.{{leaf}}",
    }


def image_fields(
    embed: PatchEmbed,
    *,
    class_token: bool,
    positions: str,
    norm: str | None = None,
    final_norm: str | None = None,
    bias: bool = True,
) -> dict[str, Any]:
    """Of the images of a model.

    Raises:
        UserError: its patches become tokens in another way.
    """
    for knob, wanted, has in (
        ("class_token", class_token, embed.class_token is not None),
        ("positions", positions, embed.positions),
        ("norm", norm, norm_kind(embed.norm)),
        ("final_norm", final_norm, norm_kind(embed.final_norm)),
        ("bias", bias, embed.projection.proj.bias is not None),
    ):
        if wanted != has:
            raise UserError(f"its PatchEmbed has {knob}: {_yaml(has)}, where {_yaml(wanted)} is needed.")
    channels, size, _ = embed.shape
    return {"image_size": size, "patch_size": embed.projection.patch, "num_channels": channels}


def trunk_fields(
    trunk: Transformer, *, masks: tuple[str, ...] = ("full",), norm: str = "layer", bias: bool = True
) -> dict[str, Any]:
    """Of a trunk of equal layers of attention and ``MLP``, or of ``SwiGLU`` for norms of the kind "rms".

    Args:
        masks: that it may have.
        norm: kind of its norms.
        bias: of all linear maps, or of none.

    Raises:
        UserError: it is another.
    """
    if trunk.mask not in masks:
        raise UserError(f"its mask is {trunk.mask}, where {' or '.join(masks)} is needed.")
    if trunk.rope is not None:
        raise UserError("its trunk has rotary positions; remove rope.")
    layers: list[Any] = list(trunk.layers)
    fields = []
    for at, layer in enumerate(layers):
        known = isinstance(layer, TransformerLayer) and isinstance(layer.mixer, Attention)
        if not known or norm_kind(layer.norm_1) != norm or type(layer.mlp) is not (SwiGLU if norm == "rms" and not bias else MLP):
            raise UserError(f"layer {at} is no TransformerLayer of Attention and the MLP that is needed, with norms '{norm}'.")
        mixer = layer.mixer
        whole = mixer.num_kv_heads == mixer.num_heads and mixer.head_dim * mixer.num_heads == trunk.dim
        maps = (mixer.q_proj, mixer.out_proj, layer.mlp.up, layer.mlp.down)
        if not whole or mixer.q_norm is not None or mixer.window is not None or any((m.bias is not None) != bias for m in maps):
            needed = "biases everywhere" if bias else "no bias"
            raise UserError(f"the attention of layer {at} is another: {needed}, no qk_norm, kv_heads, head_dim or window.")
        fields.append(
            {
                "num_attention_heads": mixer.num_heads,
                "intermediate_size": layer.mlp.hidden_dim,
                "hidden_act": activation(layer.mlp),
            }
        )
    eps = decoder.the_eps(*(layer.norm_1.eps for layer in layers), *(layer.norm_2.eps for layer in layers))
    sizes = {"hidden_size": trunk.dim, "num_hidden_layers": len(layers), **decoder.common(fields, "layer")}
    return sizes | {"layer_norm_eps": eps}


def activation(mlp: nn.Module) -> str:
    """Of an ``MLP`` (or ``SwiGLU``), as transformers calls it."""
    if not isinstance(mlp, MLP):
        return "silu"
    return ACTIVATION_NAMES.get(mlp.activation, mlp.activation)


def check_pool(head: Any, kind: str) -> None:
    """Raises:
    UserError: ``head`` pools its features in another way.
    """
    has = head.pool.kind if isinstance(head.pool, Pool) else type(head.pool).__name__
    if has != kind:
        raise UserError(f"its {type(head).__name__} has pool: {has}, where {kind} is needed.")


def norm_kind(norm: nn.Module | None) -> str | None:
    """As ``make_norm`` calls it."""
    return {AffineLayerNorm: "layer", RMSNorm: "rms", type(None): None}[type(norm)]


def sinusoids(side: int, dim: int, *, class_token: bool = False) -> Tensor:
    """The fixed positions of published files [1, N, dim], with zeros for a class token [1, 1 + N, dim]."""
    places = sincos_positions(side, side, dim, torch.float64, torch.device("cpu"))
    return torch.cat((places.new_zeros(int(class_token), dim), places)).unsqueeze(0)


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower()
