"""Adapters in the format of Hugging Face's PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from l3m_like.config.schema import Lora
from l3m_like.core.errors import UserError
from l3m_like.core.torchvision_ops import allow_torchvision
from l3m_like.pretrained.lora import export_peft, import_peft
from l3m_like.training.lora import add_adapters
from tests.distributed.recorder import experiment
from tests.parity.rule import check_values, perturb

IDS = torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(3))
SETTINGS = Lora(layers=["*.q_proj", "*.out_proj", "*.up"], rank=4, alpha=6.0)


def their_name(ours: str) -> str:
    for here, there in (
        ("preprocessor.embed", "model.embed_tokens"),
        ("trunk.layers", "model.layers"),
        ("head.norm", "model.norm"),
        ("mixer.out_proj", "self_attn.o_proj"),
        ("mixer", "self_attn"),
        ("norm_1", "input_layernorm"),
        ("norm_2", "post_attention_layernorm"),
        (".gate", ".gate_proj"),
        (".up", ".up_proj"),
        (".down", ".down_proj"),
    ):
        ours = ours.replace(here, there)
    return ours


def adapted() -> Any:
    cfg = experiment("llm")
    cfg.model["trunk"]["layer"]["mixer"]["bias"] = False
    model = cfg.instantiate("model").double()
    add_adapters(model, SETTINGS)
    perturb(model)
    return model.eval()


def base_of(state: dict[str, Tensor]) -> nn.Module:
    """The transformers model with the weights of ``state``, without adapters."""
    allow_torchvision()
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = Qwen3Config(
        **sizes, intermediate_size=24, vocab_size=258, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    weights = {their_name(n): t.float() for n, t in state.items() if "lora" not in n and n != "head.proj.weight"}
    assert model.load_state_dict(weights, strict=False).missing_keys == ["lm_head.weight"]
    return model


def paths_of(model: nn.Module) -> dict[str, str]:
    return {name: their_name(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model, folder = adapted(), tmp_path_factory.mktemp("peft")
    export_peft(folder, {n: t.float() for n, t in model.state_dict().items()}, paths_of(model), alpha=6.0, base="our/base")
    return model, folder


def expected(model: Any) -> Tensor:
    with torch.no_grad():
        return model({"text_ids": IDS}, model.inference())["text_logits"]


@torch.no_grad()
def test_the_files_say_what_the_adapters_do(exported: tuple[Any, Path]) -> None:
    """Read as PEFT documents it: W + alpha / r * B A at ``base_model.model.<path>``."""
    model, folder = exported
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 6.0)
    assert config["base_model_name_or_path"] == "our/base"
    theirs = base_of(model.state_dict())
    plain = theirs(IDS).logits
    assert len(config["target_modules"]) == 6 and len(tensors) == 12
    for path in config["target_modules"]:
        a, b = (tensors[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")
        theirs.get_submodule(path).weight += config["lora_alpha"] / config["r"] * b @ a
    check_values(theirs(IDS).logits, expected(model).float())
    assert (plain - expected(model)).abs().max() > 1e-2


def test_round_trip(exported: tuple[Any, Path]) -> None:
    model, folder = exported
    state, settings = import_peft(folder, paths_of(model))
    assert settings["rank"] == 4 and settings["alpha"] == 6.0 and not settings["rank_stabilized"]
    assert set(state) == {n for n in model.state_dict() if "lora" in n}
    assert settings["layers"] == sorted({n.rpartition(".")[0] for n in state})
    for name, tensor in state.items():
        assert torch.equal(tensor, model.state_dict()[name].float())


def test_errors(exported: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = exported
    with pytest.raises(UserError, match="there is no adapter_config.json"):
        import_peft(tmp_path, {})
    with pytest.raises(UserError, match="is no adapter of a matrix of this model"):
        import_peft(folder, {})
    with pytest.raises(UserError, match="its adapter has no place"):
        export_peft(tmp_path, model.state_dict(), {}, alpha=1.0)
    save_file({}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "use_dora": True}))
    with pytest.raises(UserError, match="use_dora"):
        import_peft(tmp_path, {})


@pytest.mark.slow
def test_peft_loads_it(exported: tuple[Any, Path]) -> None:
    model, folder = exported
    allow_torchvision()
    peft = pytest.importorskip("peft", reason="PEFT is not among the requirements")
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(base_of(model.state_dict()), str(folder)).eval()
        check_values(theirs(IDS).logits, expected(model).float())
