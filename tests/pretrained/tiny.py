"""Tiny random models of transformers in folders of their own, and the overrides of llm.yaml that fit them."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from l3m_like.config import RunConfig

LLM = Path(__file__).parents[2] / "configs" / "experiment" / "llm.yaml"
SIZES = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
KNOBS = ["dim=32", "mlp_dim=48", "layers=2", "heads=4", "kv_heads=2"]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
STRETCHED = "rope_scaling={type:llama3,factor:8,low_freq_factor:1,high_freq_factor:4,original_max_position_embeddings:64}"

#: family -> (name of the classes, fields of its config, overrides of llm.yaml)
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": (
        "Llama",
        {"head_dim": 8, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        ["head_dim=8", "norm_eps=1e-5", "rope_theta=5e5", STRETCHED, "qk_norm=false", "tie=null"],
    ),
    "mistral": (
        "Mistral",
        {"head_dim": 8, "sliding_window": 5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        ["head_dim=8", "window=5", "qk_norm=false", "tie=null"],
    ),
    "qwen2": (
        "Qwen2",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        ["head_dim=8", "rope_theta=1e6", "qk_norm=false", "qkv_bias=true"],
    ),
    "qwen3": (
        "Qwen3",
        {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        ["head_dim=16", "rope_theta=1e6"],
    ),
}


def reference(family: str, **changes: Any) -> transformers.PreTrainedModel:
    """A model of transformers with random weights, the norms' and biases' too."""
    name, fields, _ = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **fields, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    perturb(model)
    return model


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_((0.1 * noise).to(parameter.dtype))


def publish(family: str, folder: Path, *, shard: str = "40KB", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """The reference as a folder, in several files."""
    reference(family, **changes).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


@cache
def _plain(family: str) -> list[str]:
    return [*KNOBS, *FAMILIES[family][2], "sequence=32", "batch.global=4", "log.console=false", "evals=null", "steps=2"]


def config(family: str, folder: Path | None, *overrides: str) -> RunConfig:
    """llm.yaml with the sizes of the family, starting from ``folder``."""
    start = [] if folder is None else [f"+init.from={folder}"]
    return RunConfig.from_file(LLM, [*_plain(family), *start, *overrides])


class ExactNorm(nn.Module):
    """RMSNorm without the reference's cast to float32."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt())


class ExactRotary(nn.Module):
    """Rotary tables in float64, with Llama 3.1's stretching written as its three cases."""

    def __init__(self, head_dim: int, rope: dict[str, Any]) -> None:
        super().__init__()
        frequencies = [rope["rope_theta"] ** (-2 * i / head_dim) for i in range(head_dim // 2)]
        if rope["rope_type"] == "llama3":
            frequencies = [self.stretched(f, rope) for f in frequencies]
        self.f = torch.tensor(frequencies + frequencies, dtype=torch.float64)

    @staticmethod
    def stretched(f: float, rope: dict[str, Any]) -> float:
        wavelength, original = 2 * math.pi / f, rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if wavelength > original / low:
            return f / rope["factor"]
        if wavelength < original / high:
            return f
        s = (original / wavelength - low) / (high - low)
        return (1 - s) * f / rope["factor"] + s * f

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids[..., None] * self.f
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def exact(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The reference in float64 all through: what it computes in float32 is replaced."""
    model = model.double()
    model.config._attn_implementation = "sdpa"
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(name, ExactNorm(module))
    fields = model.config
    head_dim = getattr(fields, "head_dim", None) or fields.hidden_size // fields.num_attention_heads
    model.model.rotary_emb = ExactRotary(head_dim, fields.rope_parameters)
    return model
