"""Llama 2, 3, 3.1, 3.2 (arXiv:2407.21783): dense decoders without QK-norm and biases."""

from __future__ import annotations

from functools import partial

from l3m_like.pretrained import decoder
from l3m_like.pretrained.families import Family

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    names=decoder.NAMES,
    describe=partial(decoder.describe, qk_norm=False, qkv_bias=False),
    normal=decoder.normal,
    knobs=decoder.KNOBS,
    ignored=decoder.IGNORED,
)
