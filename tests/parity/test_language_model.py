"""Our decoder against transformers: logits, loss and all gradients, in float32 and float64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from rule import check_gradients, check_values, gradients, perturb
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from l3m_like.blocks import LanguageModelHead, TokenEmbed, Transformer
from l3m_like.core import MetaModel
from l3m_like.layers import Attention, Rope, SwiGLU, TransformerLayer
from l3m_like.pretrained import NameMap, export_state, import_state
from l3m_like.pretrained.decoder import NAMES

V, D, LAYERS, H, HKV, FFN = 100, 64, 2, 4, 2, 96
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": H,
    "num_key_value_heads": HKV,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

#: family -> (config class, model class, head_dim, theta, scaling, qk_norm, qkv_bias, eps, tied)
FAMILIES = {
    "qwen3_tied": (Qwen3Config, Qwen3ForCausalLM, 32, 1e6, None, True, False, 1e-6, True),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, 32, 1e6, None, True, False, 1e-6, False),
    "llama3": (LlamaConfig, LlamaForCausalLM, 16, 5e5, LLAMA3, False, False, 1e-5, False),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, 16, 1e6, None, False, True, 1e-6, True),
}


def ours_of(family: str, backend: str = "auto", **changes: object) -> MetaModel:
    _, _, head_dim, theta, scaling, qk_norm, bias, eps, tied = FAMILIES[family]
    settings = {"theta": theta, "eps": eps, "scaling": scaling and {"type": "llama3", **scaling}} | changes
    mixer = partial(
        Attention, num_heads=H, num_kv_heads=HKV, head_dim=head_dim, qk_norm=qk_norm, bias=bias, out_bias=False,
        norm_eps=settings["eps"], backend=backend,
    )  # fmt: skip
    layer = partial(TransformerLayer, mixer=mixer, mlp=partial(SwiGLU, hidden_dim=FFN), norm_eps=settings["eps"])
    rope = Rope(head_dim, settings["theta"], settings["scaling"])
    return MetaModel(
        preprocessor=TokenEmbed(V, D),
        trunk=Transformer(D, LAYERS, layer, rope, mask=settings.get("mask", "causal")),
        head=LanguageModelHead(V, D, settings["eps"], writes=["logits", "nll"]),
        stream="text",
        tie={"head.proj.weight": "preprocessor.embed.weight"} if tied else None,
    )


class ExactNorm(nn.Module):
    """RMSNorm without the reference's cast to float32."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt())


class ExactRotary(nn.Module):
    """Rotary tables from the textbook formula in float64, with Llama 3.1's stretching written as its three cases."""

    def __init__(self, head_dim: int, theta: float, scaling: dict[str, float] | None) -> None:
        super().__init__()
        frequencies = []
        for i in range(head_dim // 2):
            f = theta ** (-2 * i / head_dim)
            if scaling is not None:
                wavelength, original = 2 * math.pi / f, scaling["original_max_position_embeddings"]
                low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
                if wavelength > original / low:
                    f = f / scaling["factor"]
                elif wavelength >= original / high:
                    s = (original / wavelength - low) / (high - low)
                    f = (1 - s) * f / scaling["factor"] + s * f
            frequencies.append(f)
        self.f = torch.tensor(frequencies + frequencies, dtype=torch.float64)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids[..., None] * self.f
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def reference_of(family: str, dtype: torch.dtype) -> PreTrainedModel:
    config_class, model_class, head_dim, theta, scaling, _, _, eps, tied = FAMILIES[family]
    rope = {"rope_type": "llama3" if scaling else "default", "rope_theta": theta, **(scaling or {})}
    config = config_class(
        **SIZES, head_dim=head_dim, max_position_embeddings=128, rms_norm_eps=eps, tie_word_embeddings=tied, rope_parameters=rope
    )
    # eager attention and the norms compute in float32 whatever the weights: replaced where more is asked for
    config._attn_implementation = "eager" if dtype == torch.float32 else "sdpa"
    model = model_class(config).eval().to(dtype)
    if dtype == torch.float64:
        for name, module in list(model.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):
                model.set_submodule(name, ExactNorm(module))
        model.model.rotary_emb = ExactRotary(head_dim, theta, scaling)
    return model


def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, V, (2, 12), generator=torch.Generator().manual_seed(1))
    targets = torch.cat((ids[:, 1:], torch.full((2, 1), -100)), dim=1)
    targets[0, 3] = -100
    return {"text_ids": ids, "text_targets": targets}


def run_ours(model: MetaModel) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    data = model(batch())
    loss = data["text_nll"].sum() / (data["text_targets"] != -100).sum()
    model.zero_grad()
    loss.backward()
    return data["text_logits"].detach(), loss.detach(), gradients(model)


def compare(family: str, dtype: torch.dtype, ours: MetaModel, weights: MetaModel) -> None:
    """``ours`` against the reference with the weights of ``weights`` (an intact model; faults are planted in ``ours``)."""
    names = NameMap.of(NAMES, weights)
    reference = reference_of(family, dtype)
    missing, unexpected = reference.load_state_dict(export_state(names, dict(weights.named_parameters())), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    logits, loss, grads = run_ours(ours)
    data = batch()
    theirs = reference(input_ids=data["text_ids"]).logits
    their_loss = F.cross_entropy(theirs.flatten(0, 1), data["text_targets"].flatten(), ignore_index=-100)
    their_loss.backward()
    check_values(logits, theirs.detach())
    check_values(loss, their_loss.detach())
    vanishing = {"k_proj.bias": "softmax ignores what all keys have in common; RoPE leaves a little of it"}
    check_gradients(grads, import_state(names, gradients(reference)), vanishing=vanishing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family: str, dtype: torch.dtype) -> None:
    model = ours_of(family).to(dtype)
    perturb(model)
    compare(family, dtype, model, model)


def test_reference_backend_equals_transformers() -> None:
    model = ours_of("qwen3", backend="reference").double()
    perturb(model)
    compare("qwen3", torch.float64, model, model)


def _skip_q_norm(model: MetaModel) -> None:
    for layer in model.trunk.layers:
        layer.mixer.q_norm = layer.mixer.k_norm = None


def _swap_kv_heads(model: MetaModel) -> None:
    for layer in model.trunk.layers:
        for proj in (layer.mixer.k_proj, layer.mixer.v_proj):
            proj.weight.data = proj.weight.data.view(HKV, -1, D).flip(0).reshape(proj.weight.shape)


def _halve_one_gradient(model: MetaModel) -> None:
    model.trunk.layers[1].mixer.k_norm.weight.register_hook(lambda grad: grad / 2)


def _attend_to_all(model: MetaModel) -> None:
    model.trunk.mask = "full"


@pytest.mark.parametrize("fault", [_skip_q_norm, _swap_kv_heads, _halve_one_gradient, _attend_to_all])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_planted_fault_is_found(fault, dtype: torch.dtype) -> None:
    intact, broken = ours_of("qwen3").to(dtype), ours_of("qwen3").to(dtype)
    perturb(intact)
    perturb(broken)
    fault(broken)
    with pytest.raises(AssertionError):
        compare("qwen3", dtype, broken, intact)


@pytest.mark.parametrize("change", [{"theta": 5e5}, {"eps": 1e-3}], ids=["theta", "eps"])
def test_wrong_number_is_found(change: dict[str, float]) -> None:
    intact, broken = ours_of("qwen3").double(), ours_of("qwen3", **change).double()
    perturb(intact)
    perturb(broken)
    with pytest.raises(AssertionError):
        compare("qwen3", torch.float64, broken, intact)


def test_missing_rope_scaling_is_found() -> None:
    intact, broken = ours_of("llama3").double(), ours_of("llama3", scaling=None).double()
    perturb(intact)
    perturb(broken)
    with pytest.raises(AssertionError):
        compare("llama3", torch.float64, broken, intact)


def test_names_go_there_and_back() -> None:
    model = ours_of("qwen3_tied")
    names = NameMap.of(NAMES, model)
    ours = dict(model.named_parameters())
    back = import_state(names, export_state(names, ours))
    assert set(back) == set(ours) and all(torch.equal(back[name], ours[name]) for name in ours)
