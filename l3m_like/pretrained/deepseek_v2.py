"""DeepSeek-V2 (arXiv:2405.04434): as V3, but for routers by softmax, without a bias, whose groups count by their best expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from l3m_like.blocks import Transformer
from l3m_like.core.errors import UserError
from l3m_like.layers import MoE
from l3m_like.pretrained import decoder, deepseek_v3
from l3m_like.pretrained.families import Family
from l3m_like.pretrained.name_map import Templates

NAMES: Templates = {ours: theirs for ours, theirs in deepseek_v3.NAMES.items() if ours not in deepseek_v3.BIAS}


def describe(model: nn.Module) -> dict[str, Any]:
    """The fields of ``config.json`` that follow from such a model.

    Raises:
        UserError: the model is another.
    """
    fields = deepseek_v3.describe_layers(model)
    for layer in decoder.the_block(model, Transformer).layers:
        if isinstance(layer.mlp, MoE):
            router = layer.mlp.router
            if router.score != "softmax" or router.bias is not None or router.normalize:
                raise UserError("its routers are others; set score: softmax, normalize: false and bias_rate: null.")
            if router.groups > 1 and router.group_top != 1:
                raise UserError("the groups of its routers count by several experts; set group_top: 1.")
    if not fields.pop("rope_interleave"):
        raise UserError("its rotary positions turn halves of a head; set interleaved: true.")
    return fields | {"topk_method": "greedy" if fields["n_group"] == 1 else "group_limited_greedy"}


def normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """As ``deepseek_v3.normal``; groups count only where the method is limited to them."""
    fields = deepseek_v3.normal({"topk_method": "greedy", **config})
    return fields if fields["topk_method"] != "greedy" else fields | {"n_group": 1, "topk_group": 1}


FAMILY = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    names=NAMES,
    describe=describe,
    normal=normal,
    knobs=deepseek_v3.KNOBS,
    ignored=decoder.IGNORED,
)
