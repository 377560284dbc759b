"""Other forms of decoders against transformers: GPT-2, Falcon (attention beside the MLP), Mistral (a sliding window)."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule import check_gradients, check_values, gradients, perturb
from test_experts import ExactTables
from test_language_model import ExactNorm, batch
from transformers import FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from l3m_like.blocks import LanguageModelHead, PlacedTokenEmbed, TokenEmbed, Transformer
from l3m_like.core import MetaModel
from l3m_like.layers import MLP, Attention, ParallelLayer, Rope, SwiGLU, TransformerLayer
from l3m_like.pretrained import NameMap, export_state, family, family_of, import_state

V, D, LAYERS, H = 100, 64, 2, 4


def model_of(embed: Any, layer: Any, rope: Rope | None, eps: float, norm: str, *, tied: bool) -> MetaModel:
    return MetaModel(
        preprocessor=embed,
        trunk=Transformer(D, LAYERS, partial(layer, norm_eps=eps, norm=norm), rope),
        head=LanguageModelHead(V, D, eps, norm, writes=["logits", "nll"]),
        stream="text",
        tie={"head.proj.weight": "preprocessor.embed.weight"} if tied else None,
    )


def gpt2() -> tuple[Any, MetaModel]:
    config = GPT2Config(vocab_size=V, n_positions=16, n_embd=D, n_layer=LAYERS, n_head=H, n_inner=80)
    layer = partial(TransformerLayer, mixer=partial(Attention, num_heads=H, bias=True), mlp=partial(MLP, hidden_dim=80))
    return GPT2LMHeadModel(config), model_of(PlacedTokenEmbed(V, D, 16), layer, None, 1e-5, "layer", tied=True)


def falcon() -> tuple[Any, MetaModel]:
    config = FalconConfig(vocab_size=V, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=H, hidden_dropout=0.0)
    mlp = partial(MLP, hidden_dim=4 * D, activation="gelu", bias=False)
    layer = partial(ParallelLayer, mixer=partial(Attention, num_heads=H, num_kv_heads=1), mlp=mlp)
    return FalconForCausalLM(config), model_of(TokenEmbed(V, D), layer, Rope(16, 1e4), 1e-5, "layer", tied=True)


def mistral(window: int = 5) -> tuple[Any, MetaModel]:
    """12 tokens, of which a query sees 5."""
    config = MistralConfig(
        vocab_size=V, hidden_size=D, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=H, num_key_value_heads=2,
        head_dim=16, sliding_window=5, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    mixer = partial(Attention, num_heads=H, num_kv_heads=2, window=window)
    layer = partial(TransformerLayer, mixer=mixer, mlp=partial(SwiGLU, hidden_dim=96))
    return MistralForCausalLM(config), model_of(TokenEmbed(V, D), layer, Rope(16, 1e4), 1e-5, "rms", tied=False)


FAMILIES = {"gpt2": gpt2, "falcon": falcon, "mistral": mistral}


def compare(name: str, dtype: torch.dtype, **changes: Any) -> None:
    theirs, ours = FAMILIES[name](**changes)
    ours, theirs = ours.to(dtype), theirs.eval().to(dtype)
    perturb(ours)
    names = NameMap.of(family(name).names, ours)
    missing, unexpected = theirs.load_state_dict(export_state(names, dict(ours.named_parameters())), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    if dtype == torch.float64:
        for path, module in list(theirs.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):
                theirs.set_submodule(path, ExactNorm(module))
            elif path.endswith("rotary_emb"):
                theirs.set_submodule(path, ExactTables(ours.trunk.rope))
    theirs.config._attn_implementation = "sdpa"
    data = ours(batch())
    loss = data["text_nll"].sum() / (data["text_targets"] != -100).sum()
    loss.backward()
    logits = theirs(input_ids=batch()["text_ids"]).logits
    their_loss = F.cross_entropy(logits.flatten(0, 1), batch()["text_targets"].flatten(), ignore_index=-100)
    their_loss.backward()
    check_values(data["text_logits"].detach(), logits.detach())
    check_values(loss.detach(), their_loss.detach())
    vanishing = {"k_proj.bias": "softmax ignores what all keys have in common"}
    check_gradients(gradients(ours), import_state(names, gradients(theirs)), vanishing=vanishing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_transformers(name: str, dtype: torch.dtype) -> None:
    compare(name, dtype)


def test_another_window_is_found() -> None:
    with pytest.raises(AssertionError):
        compare("mistral", torch.float64, window=6)


@pytest.mark.parametrize("name", FAMILIES)
def test_describes_its_config(name: str) -> None:
    theirs, ours = FAMILIES[name]()
    fields, normal = family(name).describe(ours), family(name).normal(theirs.config.to_dict())
    for field, value in fields.items():
        found = normal[field]
        assert {k: found[k] for k in value} == value if isinstance(value, dict) else found == value, field
    assert family_of(ours).model_type == name
