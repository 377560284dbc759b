"""LLaDA's published names: what they mean, there and back, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import Tensor

import l3m_like
from l3m_like.config import RunConfig
from l3m_like.core.errors import UserError
from l3m_like.pretrained import NameMap, export_state, family, import_state
from l3m_like.training.export import export, import_folder
from tests.parity.rule import check_gradients, check_values, perturb
from tests.pretrained.tiny import KNOBS, LLM

DLLM = LLM.with_name("dllm.yaml")
FIELDS = {
    "architectures": ["LLaDAModelLM"], "model_type": "llada", "activation_type": "silu", "block_type": "llama", "d_model": 32,
    "embedding_size": 258, "include_bias": False, "include_qkv_bias": False, "layer_norm_type": "rms", "mask_token_id": 257,
    "max_sequence_length": 64, "mlp_hidden_size": 48, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "rms_norm_eps": 1e-05,
    "rope": True, "rope_theta": 500000.0, "vocab_size": 258, "weight_tying": False, "dtype": "float32",
}  # fmt: skip


def config(*overrides: str) -> RunConfig:
    sizes = [*KNOBS, "head_dim=8", "norm_eps=1e-5", "rope_theta=5e5", "qk_norm=false", "tie=null", "sequence=32", "evals=null"]
    return RunConfig.from_file(DLLM, [*sizes, *overrides])


def llada(p: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits [B, S, V] by the published names: pre-norm layers whose attention hides nothing."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"model.transformer.{name}.weight"]

    def turned(x: Tensor) -> Tensor:
        angle = torch.arange(ids.shape[1], dtype=x.dtype)[:, None] * 5e5 ** (-torch.arange(4, dtype=x.dtype) / 4)
        a, b = x.chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    x = p["model.transformer.wte.weight"][ids]
    for n in range(2):
        at = f"blocks.{n}"

        def linear(y: Tensor, name: str, at: str = at) -> Tensor:
            return y @ p[f"model.transformer.{at}.{name}.weight"].T

        y = norm(x, f"{at}.attn_norm")
        q, k, v = (linear(y, name).unflatten(-1, (-1, 8)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
        k, v = (z.repeat_interleave(2, 1) for z in (turned(k), v))
        mixed = (turned(q) @ k.mT / 8**0.5).softmax(-1) @ v
        x = x + linear(mixed.transpose(1, 2).flatten(2), "attn_out")
        y = norm(x, f"{at}.ff_norm")
        x = x + linear(F.silu(linear(y, "ff_proj")) * linear(y, "up_proj"), "ff_out")
    return norm(x, "ln_f") @ p["model.transformer.ff_out.weight"].T


def test_logits_and_gradients_by_the_published_names() -> None:
    model = l3m_like.load(config(), dtype="float64").model
    perturb(model)
    names = NameMap.of(family("llada").names, model)
    state = export_state(names, dict(model.named_parameters()))
    theirs = {name: p.detach().clone().requires_grad_() for name, p in state.items()}
    assert len(theirs) == 3 + 2 * 9
    ids = torch.randint(0, 258, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = model({"text_noised": ids}, model.inference())["text_logits"]
    expected = llada(theirs, ids)
    check_values(logits.detach(), expected.detach())
    scale = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view(logits.shape)
    (logits * scale).sum().backward()
    (expected * scale).sum().backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    check_gradients(ours, import_state(names, {name: p.grad for name, p in theirs.items()}))
    gate, up = (f"model.transformer.blocks.1.{name}.weight" for name in ("ff_proj", "up_proj"))
    exchanged = theirs | {gate: theirs[up], up: theirs[gate]}
    with pytest.raises(AssertionError):
        check_values(llada(exchanged, ids).detach(), expected.detach())


def test_there_and_back_are_the_same_files(tmp_path: Path) -> None:
    model = l3m_like.load(config()).model
    names = NameMap.of(family("llada").names, model)
    folder = tmp_path / "published"
    folder.mkdir()
    state = export_state(names, {name: p.detach() for name, p in model.named_parameters()})
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(FIELDS))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config().to_dict()))
    import_folder(str(folder), tmp_path / "tiny.yaml", tmp_path / "start")
    export(tmp_path / "start", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == FIELDS
    with pytest.raises(UserError, match="mask_token_id is 257 there and 256 here; set mask_id: 257"):
        l3m_like.load(config(f"+init.from={folder}", "mask_id=256"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.trunk.mask=causal"], "sees the whole text"),
        (["head_dim=16"], "16 wide"),
        (["qk_norm=true"], "qk_norm"),
        (["model.trunk.kv_every=2"], "share keys and values"),
    ],
)
def test_what_is_no_llada(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        family("llada").describe(l3m_like.load(config(*overrides)).model)
