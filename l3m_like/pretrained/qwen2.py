"""Qwen2 and Qwen2.5 (arXiv:2412.15115): biases of queries, keys and values."""

from __future__ import annotations

from functools import partial

from l3m_like.pretrained import decoder
from l3m_like.pretrained.families import Family

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    names=decoder.NAMES,
    describe=partial(decoder.describe, qk_norm=False, qkv_bias=True),
    normal=decoder.unwindowed,
    knobs=decoder.KNOBS,
    ignored=decoder.IGNORED,
)
