"""Decoders with experts against transformers: logits, loss, balance loss, choices and all gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from rule import check_gradients, check_values, gradients, perturb
from test_language_model import ExactNorm, batch
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from l3m_like.blocks import LanguageModelHead, TokenEmbed, Transformer
from l3m_like.config import RunConfig
from l3m_like.config.schema import Init
from l3m_like.core import MetaModel, UserError
from l3m_like.core.meta_model import as_model
from l3m_like.layers import Attention, LatentAttention, MoE, Rope, Router, SwiGLU, TransformerLayer
from l3m_like.losses import LoadBalance
from l3m_like.pretrained import NameMap, export_state, family, family_of, import_state
from l3m_like.training.init import materialize
from l3m_like.training.start_from import load_weights

V, D, LAYERS = 100, 64, 3
YARN = {
    "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.7,
    "mscale_all_dim": 1.0,
}  # fmt: skip
BASE = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "max_position_embeddings": 64}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "n_shared_experts": 2, "n_routed_experts": 8, "routed_scaling_factor": 2.5, "num_experts_per_tok": 3, "n_group": 4,
    "topk_group": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 24, "intermediate_size": 96,
}  # fmt: skip


def qwen3_moe() -> tuple[PreTrainedModel, Any, Rope]:
    theirs = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **BASE, num_key_value_heads=2, head_dim=32, intermediate_size=96, moe_intermediate_size=24, num_experts=8,
            num_experts_per_tok=2, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[1],
            rope_parameters={"rope_type": "default", "rope_theta": 1e6}, output_router_logits=True,
        )
    )  # fmt: skip
    mixer = partial(Attention, num_heads=4, num_kv_heads=2, head_dim=32, qk_norm=True)
    return theirs, layers(mixer, partial(MoE, hidden_dim=24, experts=8, top_k=2), "experts dense experts"), Rope(32, 1e6)


def deepseek_v3(q_rank: int | None = 24) -> tuple[PreTrainedModel, Any, Rope]:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, **YARN}
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**BASE, **LATENT, q_lora_rank=q_rank, rope_parameters=yarn))
    router = partial(Router, score="sigmoid", groups=4, kept_groups=2, scale=2.5, bias_rate=1e-3)
    return theirs, latent_layers(router, q_rank), Rope(8, 1e4, {"type": "yarn", **YARN})


def deepseek_v2() -> tuple[PreTrainedModel, Any, Rope]:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, **YARN}
    config = DeepseekV2Config(**BASE, **LATENT, q_lora_rank=24, rope_parameters=yarn, topk_method="group_limited_greedy")
    router = partial(Router, normalize=False, groups=4, kept_groups=2, group_top=1, scale=2.5)
    return DeepseekV2ForCausalLM(config), latent_layers(router, 24), Rope(8, 1e4, {"type": "yarn", **YARN})


def latent_layers(router: Any, q_rank: int | None) -> Any:
    mixer = partial(
        LatentAttention, num_heads=4, kv_rank=16, nope_dim=16, rope_dim=8, v_dim=16, q_rank=q_rank,
        rope_scaling={"type": "yarn", **YARN},
    )  # fmt: skip
    moe = partial(MoE, hidden_dim=24, experts=8, top_k=3, router=router, shared_hidden_dim=48)
    return layers(mixer, moe, "dense experts experts")


def layers(mixer: Any, moe: Any, pattern: str) -> Any:
    kinds = {"dense": partial(SwiGLU, hidden_dim=96), "experts": moe}
    made = {kind: partial(TransformerLayer, mixer=mixer, mlp=mlp) for kind, mlp in kinds.items()}
    return partial(Transformer, D, LAYERS, made, pattern=pattern.split(), writes=["router_load", "router_probability"])


FAMILIES = {"qwen3_moe": qwen3_moe, "deepseek_v3": deepseek_v3, "deepseek_v2": deepseek_v2}


def both(name: str, dtype: torch.dtype) -> tuple[MetaModel, PreTrainedModel]:
    """Ours and theirs with the same random weights and biases."""
    theirs, trunk, rope = FAMILIES[name]()
    ours = MetaModel(
        preprocessor=TokenEmbed(V, D),
        trunk=trunk(rope=rope),
        head=LanguageModelHead(V, D, writes=["logits", "nll"]),
        stream="text",
    ).to(dtype)
    perturb(ours)
    for buffer in ours.buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(5)) * 0.2)
    names = NameMap.of(family(name).names, ours)
    theirs.config._attn_implementation = theirs.config._experts_implementation = "eager"
    theirs = theirs.eval().to(dtype)
    state = export_state(names, dict(ours.named_parameters()) | dict(ours.named_buffers()))
    theirs.load_state_dict(fused(state, theirs.state_dict()))
    if dtype == torch.float64:
        for path, module in list(theirs.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):
                theirs.set_submodule(path, ExactNorm(module))
        theirs.model.rotary_emb = ExactTables(rope)
    return ours, theirs


def fused(state: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference classes hold experts in stacks, gate and up in one; published files, each apart."""
    out = {}
    for name in like:
        if not name.endswith(("gate_up_proj", "down_proj")) or "experts" not in name or "shared" in name:
            out[name] = state[name]
            continue
        path, kind = name.rsplit(".", 1)
        parts = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else ["down_proj"]
        out[name] = torch.stack([torch.cat([state[f"{path}.{e}.{p}.weight"] for p in parts]) for e in range(8)])
    return out


def unfused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, value in state.items():
        if name.endswith(".experts.gate_up_proj"):
            for e, expert in enumerate(value):
                path = f"{name.removesuffix('gate_up_proj')}{e}"
                out[f"{path}.gate_proj.weight"], out[f"{path}.up_proj.weight"] = expert.chunk(2)
        elif name.endswith(".experts.down_proj"):
            out |= {f"{name.removesuffix('down_proj')}{e}.down_proj.weight": expert for e, expert in enumerate(value)}
        else:
            out[name] = value
    return out


class ExactTables(nn.Module):
    """Cosines and sines in float64; the frequencies themselves are compared in another test."""

    def __init__(self, rope: Rope) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.rope(position_ids, x.dtype)


@contextmanager
def no_casts_to_float32() -> Iterator[None]:
    """The reference's softmax and routers compute in float32 whatever the weights are."""
    softmax, to_float = F.softmax, Tensor.float

    def exact(x: Tensor, dim: int = -1, dtype: Any = None, **rest: Any) -> Tensor:
        return softmax(x, dim=dim)

    with (
        mock.patch.object(F, "softmax", exact),
        mock.patch.object(Tensor, "type", lambda self, dtype: self),
        mock.patch.object(Tensor, "float", lambda self: self if self.is_floating_point() else to_float(self)),
    ):
        yield


def compare(name: str, dtype: torch.dtype, broken: Any = None) -> None:
    ours, theirs = both(name, dtype)
    if broken is not None:
        broken(ours)
    chosen: list[Tensor] = []
    for module in theirs.modules():
        if type(module).__name__.endswith("TopkRouter") or type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(lambda m, i, out: chosen.append(out[2]))
    data = ours(batch())
    loss = data["text_nll"].sum() / (data["text_targets"] != -100).sum()
    balance = LoadBalance(stream="text")
    aux = balance.compute(data["text_router_load"], data["text_router_probability"]) / batch()["text_ids"].numel()
    with no_casts_to_float32():
        out = theirs(input_ids=batch()["text_ids"])
        their_loss = F.cross_entropy(out.logits.flatten(0, 1), batch()["text_targets"].flatten(), ignore_index=-100)
        check_values(data["text_logits"].detach(), out.logits.detach())
        check_values(loss.detach(), their_loss.detach())
        loads = torch.stack([F.one_hot(e, 8).sum((0, 1)) for e in chosen])
        assert torch.equal(data["text_router_load"].sum(1), loads.to(dtype))
        if name == "qwen3_moe":
            torch.testing.assert_close(aux, out.aux_loss.to(dtype), rtol=1e-6, atol=0)
            if dtype == torch.float32:  # in which they sum it
                loss, their_loss = loss + aux, their_loss + out.aux_loss
        loss.backward()
        their_loss.backward()
    trained = NameMap(family(name).names, dict(ours.named_parameters()))  # without the biases
    check_gradients(gradients(ours), import_state(trained, unfused(gradients(theirs))))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("qwen3_moe", torch.float64),
        ("deepseek_v3", torch.float64),
        ("qwen3_moe", torch.float32),
        ("deepseek_v3", torch.float32),
        ("deepseek_v2", torch.float32),
    ],
)
def test_equals_transformers(name: str, dtype: torch.dtype) -> None:
    compare(name, dtype)


def _no_groups(model: MetaModel) -> None:
    for router in (m for m in model.modules() if isinstance(m, Router)):
        router.groups = 1


def _halves_rotated(model: MetaModel) -> None:
    for layer in model.trunk.layers:
        layer.mixer.interleaved = False


def _no_magnitude(model: MetaModel) -> None:
    for layer in model.trunk.layers:
        layer.mixer.score_factor = 1.0


def _shared_left_out(model: MetaModel) -> None:
    model.trunk.layers[2].mlp.shared = None


def _one_gradient_halved(model: MetaModel) -> None:
    model.trunk.layers[1].mlp.experts.down.register_hook(lambda grad: grad / 2)


FAULTS = [_no_groups, _halves_rotated, _no_magnitude, _shared_left_out, _one_gradient_halved]


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(fault: Any) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        compare("deepseek_v3", torch.float64, fault)


def test_frequencies_and_magnitude_of_yarn() -> None:
    for changes in ({}, {"mscale": 0.0}, {"original_max_position_embeddings": 4096.0, "factor": 40.0}):
        config = DeepseekV3Config(
            **BASE, **LATENT, q_lora_rank=24, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, **YARN, **changes}
        )
        theirs = DeepseekV3ForCausalLM(config).model.rotary_emb
        rope = Rope(8, 1e4, {"type": "yarn", **YARN, **changes})
        torch.testing.assert_close(rope.frequencies(torch.float32, torch.device("cpu")), theirs.inv_freq, rtol=1e-6, atol=0)
        assert abs(rope.magnitude - theirs.attention_scaling) < 1e-12


@pytest.mark.parametrize("name", FAMILIES)
def test_describes_its_config(name: str) -> None:
    """What follows from our model is what their config says, and no other family takes it."""
    ours, theirs = both(name, torch.float32)
    fields, config = family(name).describe(ours), theirs.config.to_dict()
    normal = family(name).normal(config)
    for field, value in fields.items():
        found = normal[field]
        assert {k: found[k] for k in value} == value if isinstance(value, dict) else found == value, field
    assert family_of(ours).model_type == name


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2"])
def test_scores_are_scaled_as_the_rotary_positions_say(name: str) -> None:
    """``config.json`` says both in one place: a model whose attention was not told is no model of the family."""
    ours, _ = both(name, torch.float32)
    ours.trunk.layers[1].mixer.score_factor = 1.0  # as without rope_scaling
    with pytest.raises(UserError, match=r"layer 1 multiplies its scores by 1,(.|\n)* say 1\.29"):
        family(name).describe(ours)


def test_a_hub_file_has_each_expert_apart(tmp_path: Path) -> None:
    from safetensors import safe_open

    ours, theirs = both("qwen3_moe", torch.float32)
    theirs.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes == NameMap.of(family("qwen3_moe").names, ours).shapes


@pytest.mark.parametrize("name", ["moe", "deepseek"])
def test_a_folder_fills_the_shipped_experiment(name: str, tmp_path: Path) -> None:
    """``init.from`` of a folder that their class saved: fields and names fit, and the logits are theirs."""
    sizes = {
        "vocab_size": 257, "hidden_size": 128, "num_attention_heads": 4, "tie_word_embeddings": name == "moe",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }  # fmt: skip
    if name == "moe":
        config = Qwen3MoeConfig(
            **sizes, num_hidden_layers=2, num_key_value_heads=2, head_dim=32, moe_intermediate_size=192, num_experts=8,
            num_experts_per_tok=2, norm_topk_prob=True,
        )  # fmt: skip
        theirs: Any = Qwen3MoeForCausalLM(config)
    else:
        config = DeepseekV3Config(
            **sizes, **LATENT | {
                "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32,
                "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "intermediate_size": 384,
            },
            num_hidden_layers=3, q_lora_rank=64,
        )  # fmt: skip
        theirs = DeepseekV3ForCausalLM(config)
    for tensor in (*theirs.parameters(), *(b for n, b in theirs.named_buffers() if n.endswith("correction_bias"))):
        torch.nn.init.normal_(tensor, std=0.1)
    theirs.save_pretrained(tmp_path)
    without = [] if name == "moe" else ["~model.postprocessor", "~loss.ahead", "tie=null"]
    cfg = RunConfig.from_file(Path(__file__).parents[2] / f"configs/experiment/{name}.yaml", without)
    with torch.device("meta"):
        model = as_model(cfg.instantiate("model"))
    materialize(model, torch.device("cpu"))
    load_weights(model, Init(from_=str(tmp_path)))
    ids = torch.randint(0, 257, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        check_values(model({"text_ids": ids}, model.inference())["text_logits"], theirs.eval()(input_ids=ids).logits)
