"""Generation beside ``transformers.generate``: the same sizes, weights, prompts and number of tokens, in turn, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from l3m_like.benchmarks.peers import Decoder, sizes_of, transformers_family
from l3m_like.config import RunConfig
from l3m_like.core.errors import UserError
from l3m_like.generate.autoregressive import Autoregressive
from l3m_like.pretrained.decoder import NAMES
from l3m_like.pretrained.name_map import NameMap, export_state
from l3m_like.training.load import load
from l3m_like.training.train import plan

#: ``generate(new tokens)`` -> the tokens [batch][new]
Generate = Callable[[int], list[list[int]]]


@dataclass(frozen=True)
class Rates:
    """Of one side: seconds of the prompts with one token, and tokens per second of all that follow, each of the best round."""

    prompt_seconds: float
    tokens_per_second: float
    tokens: list[list[int]]


def bench_generate(
    cfg: RunConfig, *, batch: int, prompt: int, new: int, rounds: int = 3, dtype: str = "bfloat16", compiled: bool = True
) -> dict[str, Any]:
    """Greedy generation of ``new`` tokens behind ``prompt`` random ones in ``batch`` rows, by both sides.

    Args:
        compiled: ours with ``compile``, theirs with a static cache (which transformers compiles on a GPU). False: both eager.

    Returns:
        Sizes, and for "ours" and "transformers" prompt_seconds and tokens_per_second; their ratio; ``agreeing``: the share of
        tokens that are the same (in bf16 two likely tokens may change places, and the rows then go apart).
    """
    if new < 2:
        raise UserError(f"new is {new}; the first token is that of the prompt, so at least 2 are generated.")
    sizes = sizes_of(cfg, plan(cfg, 1))
    if not isinstance(sizes, Decoder):
        raise UserError("generation is compared for decoders of llm.yaml's family.")
    loaded = load(cfg, dtype=dtype)
    device = next(loaded.model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, sizes.vocab_size, (batch, prompt), generator=generator)
    sides = {
        "ours": _ours(loaded.model, prompts.tolist(), compiled),
        "transformers": _theirs(loaded.model, sizes, prompts.to(device), compiled),
    }
    found = _measure(sides, new, rounds, device)
    ours, theirs = found["ours"], found["transformers"]
    same = [a == b for one, other in zip(ours.tokens, theirs.tokens, strict=True) for a, b in zip(one, other, strict=True)]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "batch": batch,
        "prompt": prompt,
        "new": new,
        "dtype": dtype,
        "compiled": compiled,
        **{
            name: {"prompt_seconds": side.prompt_seconds, "tokens_per_second": side.tokens_per_second}
            for name, side in found.items()
        },
        "ratio": ours.tokens_per_second / theirs.tokens_per_second,
        "agreeing": sum(same) / len(same),
    }


def _ours(model: nn.Module, prompts: list[list[int]], compiled: bool) -> Generate:
    samplers: dict[int, Autoregressive] = {}

    def generate(new: int) -> list[list[int]]:
        if new not in samplers:
            samplers[new] = Autoregressive(prompts, new, greedy=True, end=False, batch=len(prompts), compile=compiled)
        return samplers[new].run(model).tokens

    return generate


def _theirs(ours: nn.Module, sizes: Decoder, prompts: torch.Tensor, compiled: bool) -> Generate:
    _, prefix, modeling, config = transformers_family(sizes)
    weight = next(ours.parameters())
    with torch.device(weight.device):
        model = getattr(modeling, f"{prefix}ForCausalLM")(config).to(weight.dtype).eval()
    model.load_state_dict(export_state(NameMap.of(NAMES, ours), dict(ours.named_parameters())), strict=False)
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if compiled:
        settings["cache_implementation"] = "static"
    seen = torch.ones_like(prompts)

    def generate(new: int) -> list[list[int]]:
        out = model.generate(prompts, attention_mask=seen, max_new_tokens=new, **settings)
        return out[:, prompts.shape[1] :].tolist()

    return generate


def _measure(sides: Mapping[str, Generate], new: int, rounds: int, device: torch.device) -> dict[str, Rates]:
    """Every side warmed up, then in turn; the list of tokens at the end of a call waits for the device."""
    tokens = {name: [generate(1), generate(new)][1] for name, generate in sides.items()}
    seconds: dict[tuple[str, int], float] = {}
    for _ in range(rounds):
        for name, generate in sides.items():
            for length in (1, new):
                began = time.perf_counter()
                generate(length)
                took = time.perf_counter() - began
                seconds[name, length] = min(took, seconds.get((name, length), took))
    rows = len(next(iter(tokens.values())))
    return {
        name: Rates(seconds[name, 1], rows * (new - 1) / (seconds[name, new] - seconds[name, 1]), tokens[name]) for name in sides
    }
