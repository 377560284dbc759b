"""Qwen3 (arXiv:2505.09388): RMSNorm of queries and keys per head."""

from __future__ import annotations

from functools import partial

from l3m_like.pretrained import decoder
from l3m_like.pretrained.families import Family

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    names=decoder.NAMES,
    describe=partial(decoder.describe, qk_norm=True, qkv_bias=False),
    normal=decoder.unwindowed,
    knobs=decoder.KNOBS,
    ignored=decoder.IGNORED,
)
