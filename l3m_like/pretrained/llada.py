"""LLaDA (arXiv:2502.09992): a Llama that sees in both directions, with names of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from l3m_like.blocks import MaskTokens, Transformer
from l3m_like.core.errors import UserError
from l3m_like.core.meta_model import walk
from l3m_like.pretrained import decoder
from l3m_like.pretrained.families import Family
from l3m_like.pretrained.name_map import Templates

_OURS, _THEIRS = "trunk.layers.{i}", "model.transformer.blocks.{i}"
NAMES: Templates = {
    "preprocessor.embed.weight": "model.transformer.wte.weight",
    f"{_OURS}.mixer.q_proj.weight": f"{_THEIRS}.q_proj.weight",
    f"{_OURS}.mixer.k_proj.weight": f"{_THEIRS}.k_proj.weight",
    f"{_OURS}.mixer.v_proj.weight": f"{_THEIRS}.v_proj.weight",
    f"{_OURS}.mixer.out_proj.weight": f"{_THEIRS}.attn_out.weight",
    f"{_OURS}.mlp.gate.weight": f"{_THEIRS}.ff_proj.weight",
    f"{_OURS}.mlp.up.weight": f"{_THEIRS}.up_proj.weight",
    f"{_OURS}.mlp.down.weight": f"{_THEIRS}.ff_out.weight",
    f"{_OURS}.norm_1.weight": f"{_THEIRS}.attn_norm.weight",
    f"{_OURS}.norm_2.weight": f"{_THEIRS}.ff_norm.weight",
    "head.norm.weight": "model.transformer.ln_f.weight",
    "head.proj.weight": "model.transformer.ff_out.weight",
}
#: their field -> ours of a Llama
_FIELDS = {
    "vocab_size": "vocab_size",
    "embedding_size": "vocab_size",
    "d_model": "hidden_size",
    "mlp_hidden_size": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "rms_norm_eps": "rms_norm_eps",
    "weight_tying": "tie_word_embeddings",
}


def describe(model: nn.Module) -> dict[str, Any]:
    """As ``Family.describe``."""
    llama = decoder.describe(model, qk_norm=False, qkv_bias=False)
    trunk = decoder.the_block(model, Transformer)
    if trunk.mask != "full":
        raise UserError(f"its attention is {trunk.mask}, and that of LLaDA sees the whole text; set model.trunk.mask: full.")
    if llama["head_dim"] * llama["num_attention_heads"] != llama["hidden_size"]:
        raise UserError(f"its heads are {llama['head_dim']} wide; LLaDA's are dim / heads.")
    if llama["rope_parameters"]["rope_type"] != "default":
        raise UserError("its rotary positions are scaled; set rope_scaling: null.")
    noise = [block.mask_id for _, block in walk(model) if isinstance(block, MaskTokens)]
    return {
        **{theirs: llama[ours] for theirs, ours in _FIELDS.items()},
        "rope_theta": llama["rope_parameters"]["rope_theta"],
        "include_bias": False,
        "include_qkv_bias": False,
        **({"mask_token_id": noise[0]} if noise else {}),
    }


def normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """As ``Family.normal``: what follows from other fields where it is absent."""
    fields = {"include_bias": False, "weight_tying": False, **config}
    for name, other in {"n_kv_heads": "n_heads", "embedding_size": "vocab_size", "include_qkv_bias": "include_bias"}.items():
        if fields.get(name) is None:
            fields[name] = fields.get(other)
    return fields


FAMILY = Family(
    model_type="llada",
    architecture="LLaDAModelLM",
    names=NAMES,
    describe=describe,
    normal=normal,
    knobs={theirs: decoder.KNOBS[ours] for theirs, ours in _FIELDS.items()}
    | {"rope_theta": "rope_theta", "mask_token_id": "mask_id"},
)
