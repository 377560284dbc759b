"""Models of transformers as a block: the class's own numbers, packed = unpacked, refusals, FLOPs, and a mesh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from l3m_like.blocks import HFModel
from l3m_like.blocks.hf_model import positions_of
from l3m_like.core import MetaModel, UserError
from l3m_like.core.init import Zeros
from l3m_like.distributed.mesh import Mesh, build_mesh
from l3m_like.distributed.parallelize import parallelize
from l3m_like.generate import Autoregressive
from l3m_like.layers import LoRALinear
from l3m_like.training.init import init_specs, initialize, materialize
from tests.distributed.pool import run as on_ranks
from tests.distributed.recorder import whole
from tests.parity.rule import check_gradients, check_values, gradients

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GATED = EXPERTS | {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 4},
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 8, **EXPERTS},
}
LENGTHS = ((6, 10), (9, 5))  # of the documents of two rows; the second row is padded


def built(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> MetaModel:
    """As training does it: on the meta device, given memory, drawn by name. Norms and matrices are moved off their start."""
    with torch.device("meta"):
        model = MetaModel(head=HFModel(SIZES | CONFIGS[name], writes=["nll", "logits"], **settings), stream="text").to(dtype)
    specs = init_specs(model)
    materialize(model, torch.device("cpu"))
    initialize(model, 0, "", specs)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return model


def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(2))
    documents = torch.tensor(
        [[number for number, n in enumerate(row) for _ in range(n)] + [-1] * (16 - sum(row)) for row in LENGTHS]
    )
    targets = torch.where(documents == documents.roll(-1, 1), ids.roll(-1, 1), -100).masked_fill(documents < 0, -100)
    targets[:, -1] = -100
    data = {"ids": ids, "targets": targets, "document_ids": documents.to(torch.int32), "positions": positions_of(documents)}
    return {f"text_{name}": value for name, value in data.items()}


def run(model: MetaModel, data: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(data)["text_nll"].sum()
    loss.backward()
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients(model).items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_class_and_packed_equals_unpacked(name: str) -> None:
    from transformers import AutoModelForCausalLM

    model, data = built(name), batch()
    theirs = AutoModelForCausalLM.from_config(model.head.hf_config)
    state = {key.removeprefix("head.model."): p.detach() for key, p in model.named_parameters()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert (
        not unexpected and set(missing) <= {"lm_head.weight"} and ("lm_head.weight" in missing) == (name in ("qwen3", "gemma2"))
    )
    total, logits = torch.zeros(()), model(data)["text_logits"].detach()
    for row, lengths in enumerate(LENGTHS):  # every document alone, in a batch of one
        for document in range(len(lengths)):
            at = data["text_document_ids"][row] == document
            out = theirs(input_ids=data["text_ids"][row][at][None]).logits[0]
            check_values(logits[row][at], out.detach())
            total = total + F.cross_entropy(out, data["text_targets"][row][at], ignore_index=-100, reduction="sum")
    total.backward()
    loss, grads = run(model, data)
    check_values(loss, total.detach())
    expected = {f"head.model.{key}": p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    check_gradients(grads, expected)
    # without the borders another gradient comes out, by far
    with pytest.raises(AssertionError):
        check_gradients(run(built(name, packed=False), data)[1], expected)


def test_positions_follow_from_the_documents() -> None:
    model, data = built("mistral"), batch()
    expected = model(data)["text_logits"]
    at = data["text_document_ids"] >= 0
    assert torch.equal(model({k: v for k, v in data.items() if k != "text_positions"})["text_logits"][at], expected[at])


def test_the_loss_holds_no_logits_where_the_head_is_a_matrix() -> None:
    assert built("qwen3").head.plain_head and built("llama").head.plain_head
    assert not built("gemma2").head.plain_head  # its logits are capped


def gradients_of(model: MetaModel, mesh: Mesh | None = None, checkpointing: str = "none") -> dict[str, Tensor]:
    """Whole gradients of two rows, of which each rank of two has one."""
    specs = init_specs(model)
    if mesh is not None:
        parallelize(model, mesh, checkpointing=checkpointing)
    materialize(model, torch.device("cpu"))
    initialize(model, 0, "", specs)
    rows = slice(None) if mesh is None else slice(mesh.dp_rank, mesh.dp_rank + 1)
    model({name: value[rows] for name, value in batch().items()})["text_nll"].sum().backward()
    return {name: whole(p.grad) for name, p in model.named_parameters()}


def on_mesh(axes: dict[str, int], checkpointing: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = MetaModel(head=HFModel(SIZES | CONFIGS["qwen3"], writes=["nll"]), stream="text")
    return gradients_of(model, build_mesh(axes), checkpointing)


@pytest.mark.slow  # every rank imports transformers
def test_a_mesh_and_recomputation_change_nothing() -> None:
    with torch.device("meta"):
        model = MetaModel(head=HFModel(SIZES | CONFIGS["qwen3"], writes=["nll"]), stream="text")
    expected = gradients_of(model)
    for found in on_ranks(2, on_mesh, {"dp_shard": 2}, "full", timeout=110.0):
        check_gradients(found, expected)


def test_flops_are_those_of_our_own_trunk() -> None:
    from functools import partial

    from l3m_like.blocks import LanguageModelHead, TokenEmbed, Transformer
    from l3m_like.layers import Attention, Rope, SwiGLU, TransformerLayer

    mixer = partial(Attention, num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=True)
    layer = partial(TransformerLayer, mixer=mixer, mlp=partial(SwiGLU, hidden_dim=48))
    data = batch()
    ids, documents, hidden = data["text_ids"], data["text_document_ids"], torch.empty(2, 16, 32)
    targets, real = data["text_targets"], int((documents >= 0).sum())
    assert (targets != -100).sum() < real < 32  # neither ends of documents nor padding count alike
    ours = Transformer(32, 2, layer, Rope(8, 1e4)).flops(hidden, None, documents) + LanguageModelHead(
        61, 32, writes=["nll"]
    ).flops(hidden, targets)
    assert TokenEmbed(61, 32).flops(ids) == 0
    assert built("qwen3").head.flops(ids, None, documents, targets) == ours
    # of four experts two are at work
    dense, sparse = 3 * 32 * 48, 2 * 3 * 32 * 16 + 4 * 32
    difference = 2 * real * 2 * (sparse - dense)  # two layers
    assert built("qwen3_moe").head.flops(ids, None, documents, targets) == ours + difference


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GATED | {"model_type": "qwen3_next", "head_dim": 8, "num_hidden_layers": 4}, "see those before it.*packed: false"),
        ({"model_type": "mamba2", "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2}, "packed: false"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "longest row"),
        ({"model_type": "lama"}, "Did you mean 'llama'"),
        ({"model_type": "llama", "hiden_size": 32}, "Did you mean 'hidden_size'"),
    ],
)  # fmt: skip
def test_refusals(config: dict[str, Any], words: str) -> None:
    sizes = SIZES if config["model_type"] != "mamba2" else {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2}
    with torch.device("meta"), pytest.raises(UserError, match=words):
        HFModel(sizes | config, writes=["nll"])


def test_a_recurrent_class_takes_one_document_per_row() -> None:
    config = {"model_type": "mamba2", "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 8, "head_dim": 8,
              "state_size": 8, "n_groups": 2}  # fmt: skip
    model = HFModel(config, packed=False, writes=["nll"])
    data = batch()
    assert model.flops(data["text_ids"]) is None
    with torch.no_grad():
        out = model.compute(data["text_ids"], targets=data["text_targets"], outputs=("nll",))["nll"]
    assert out.shape == (2, 16) and float(out.sum()) > 0


def test_generation() -> None:
    """Prompts of unequal length, padded on the left, say what each says alone, and what the class itself says."""
    from transformers import AutoModelForCausalLM

    model = built("mistral")
    theirs = AutoModelForCausalLM.from_config(model.head.hf_config).eval()
    theirs.load_state_dict({key.removeprefix("head.model."): p.detach() for key, p in model.named_parameters()})
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]
    found = Autoregressive(prompts, 6, greedy=True, cache=False).run(model).tokens
    for prompt, tokens in zip(prompts, found, strict=True):
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert tokens == out[0, len(prompt) :].tolist()


def test_a_config_of_a_folder(tmp_path) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(**(SIZES | CONFIGS["llama"])).save_pretrained(tmp_path)
    assert HFModel(str(tmp_path), writes=["nll"]).hf_config.hidden_size == 32
    with pytest.raises(UserError, match="config = .*nothing"):
        HFModel(str(tmp_path / "nothing"), writes=["nll"])


def test_adapters_begin_at_the_base() -> None:
    """The block says how all parameters of its class are drawn, but those of adapters."""
    model = MetaModel(head=HFModel(SIZES | CONFIGS["llama"], writes=["nll"]), stream="text")
    attention = model.head.model.get_submodule("model.layers.0.self_attn")
    attention.q_proj = LoRALinear(attention.q_proj, rank=2, alpha=4.0)
    specs = init_specs(model)
    (name,) = (name for name in specs if name.endswith("lora_b"))
    assert isinstance(specs[name], Zeros)
