"""Mistral (arXiv:2310.06825): Llama with a sliding window."""

from __future__ import annotations

from functools import partial

from l3m_like.pretrained import decoder
from l3m_like.pretrained.families import Family

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    names=decoder.NAMES,
    describe=partial(decoder.describe, qk_norm=False, qkv_bias=False, windows=True),
    normal=decoder.normal,
    knobs=decoder.KNOBS,
    ignored=decoder.IGNORED,
)
