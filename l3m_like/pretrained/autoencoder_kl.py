"""The encoder of diffusers' ``AutoencoderKL``, as its folders hold it."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from l3m_like.blocks import AutoencoderKLEncoder
from l3m_like.blocks.preprocessors.autoencoder_kl import fields_of
from l3m_like.pretrained import decoder
from l3m_like.pretrained.families import Family
from l3m_like.pretrained.name_map import Templates


def describe(model: nn.Module) -> dict[str, Any]:
    """The fields of ``config.json`` that follow from such a model."""
    return decoder.the_block(model, AutoencoderKLEncoder).config


def templates(model: nn.Module) -> Templates:
    """The same names, below the block."""
    decoder.the_block(model, AutoencoderKLEncoder)
    found = ((name, re.search(r"(encoder|quant_conv)\.\w.*", name)) for name, _ in model.named_parameters())
    return {name: match[0] for name, match in found if match is not None}


FAMILY = Family(
    model_type="AutoencoderKL",
    architecture="AutoencoderKL",
    names=templates,
    describe=describe,
    normal=fields_of,
    ignored=(r"decoder\..*", r"post_quant_conv\..*"),
    spellings={  # of files from before 2023
        r"(.*\.attentions\.\d+)\.query\.(.*)": r"\1.to_q.\2",
        r"(.*\.attentions\.\d+)\.key\.(.*)": r"\1.to_k.\2",
        r"(.*\.attentions\.\d+)\.value\.(.*)": r"\1.to_v.\2",
        r"(.*\.attentions\.\d+)\.proj_attn\.(.*)": r"\1.to_out.0.\2",
    },
)
