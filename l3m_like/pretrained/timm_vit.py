"""Weight names of timm's vision transformers, as its hub publishes them: ``TimmViT`` has the same, but for the last norm's."""

from __future__ import annotations

from typing import Any

from torch import nn

from l3m_like.core.errors import UserError
from l3m_like.layers.timm_vit import TimmViT
from l3m_like.pretrained.families import Family

_WHOLE = (
    "cls_token", "reg_token", "pos_embed", "patch_embed.proj.{leaf}",
    *(f"blocks.{{i}}.{name}.{{leaf}}" for name in ("norm1", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.proj", "norm2")),
    *(f"blocks.{{i}}.mlp.{name}.{{leaf}}" for name in ("fc1", "fc2", "norm", "fc1_g", "fc1_x")),
    "blocks.{i}.ls1.gamma", "blocks.{i}.ls2.gamma",
)  # fmt: skip


def _describe(model: nn.Module) -> dict[str, Any]:
    found = [module for module in model.modules() if isinstance(module, TimmViT)]
    if len(found) != 1:
        raise UserError(f"it has {len(found)} TimmViT encoders; the folder holds one.")
    return {"architecture": found[0].name.partition(".")[0]}


FAMILY = Family(
    "timm",
    "VisionTransformer",
    # the encoder of ImageEncoder or ImageFeatures, alone in a Frozen
    {f"preprocessor.encoder.model.{name}": name for name in _WHOLE},
    _describe,
    ignored=(r"norm\..*", r"fc_norm\..*", r"head\..*", r"attn_pool\..*"),
)
