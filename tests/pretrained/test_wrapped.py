"""Classes of transformers that begin with the weights of their own folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import Tensor

import l3m_like
from l3m_like.blocks import HFModel
from l3m_like.config import RunConfig
from l3m_like.core import MetaModel
from l3m_like.core.errors import UserError
from l3m_like.pretrained import NameMap
from l3m_like.pretrained.wrapped import wrapped_family
from l3m_like.training.export import export, import_folder
from tests.distributed.pool import run as on_ranks
from tests.pretrained.tiny import LLM, publish

HF = LLM.with_name("hf_model.yaml")
#: the whole of what such a run adds to hf_model.yaml
OF_A_FOLDER = ["+init.from={}", "model.postprocessor.config=${{init.from}}"]
SHORT = ["sequence=32", "batch.global=4", "log.console=false", "evals=null", "steps=2", "lr=0.01", "schedule.warmup=0"]


def config(folder: Path, *overrides: str) -> RunConfig:
    return RunConfig.from_file(HF, [*SHORT, *(line.format(folder) for line in OF_A_FOLDER), *overrides])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish("qwen3", tmp_path_factory.mktemp("published"), dtype=torch.float32, shard="30KB")


def losses(where: str, folder: Path, *overrides: str) -> list[float]:
    l3m_like.train(config(folder, f"run.dir={where}", *overrides))
    rows = map(json.loads, (Path(where) / "hf_model" / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def of_the_class(folder: Path, data: dict[str, Tensor]) -> float:
    """Nats per target of the published class, every document alone."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder)
    total, count = 0.0, 0
    for ids, targets, documents in zip(*(data[f"text_{name}"] for name in ("ids", "targets", "document_ids")), strict=True):
        for document in documents.unique():
            at = documents == document
            with torch.no_grad():
                logits = theirs(input_ids=ids[at][None]).logits[0]
            total += float(F.cross_entropy(logits, targets[at], ignore_index=-100, reduction="sum"))
            count += int((targets[at] != -100).sum())
    return total / count


def test_the_first_loss_is_that_of_the_class(folder: Path, tmp_path: Path) -> None:
    forward, seen = HFModel.forward, []

    def watched(self: HFModel, data: dict[str, Any], inference: bool = False) -> dict[str, Any]:
        seen.append(dict(data))
        return forward(self, data, inference)

    with mock.patch.object(HFModel, "forward", watched):
        first, second = losses(str(tmp_path), folder)
    real = next(data for data in seen if not data["text_ids"].is_meta)  # before: the trace of shapes
    assert first == pytest.approx(of_the_class(folder, real), rel=1e-5)
    assert second < first - 1e-3


@pytest.mark.slow  # every rank imports transformers
def test_shards_read_what_they_need(folder: Path, tmp_path: Path) -> None:
    expected = losses(str(tmp_path / "one"), folder)
    on_ranks(2, losses, str(tmp_path / "two"), folder, "parallel.dp_shard=2")
    rows = map(json.loads, (tmp_path / "two" / "hf_model" / "metrics.jsonl").read_text().splitlines())
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("family", "dtype"), [("qwen3", torch.float32), ("mistral", torch.bfloat16)], ids=["tied", "bf16"])
def test_back_are_the_same_files(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = publish(family, tmp_path / "published", dtype=dtype, shard="30KB")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config(folder).to_dict()))
    import_folder(str(folder), tmp_path / "tiny.yaml", tmp_path / "start")
    export(tmp_path / "start", tmp_path / "back", most=30_000)
    theirs = {path.name: path for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "back").iterdir()} == set(theirs) and len(theirs) > 5
    for name, path in theirs.items():
        ours = tmp_path / "back" / name
        if name.endswith(".json"):
            assert json.loads(ours.read_text()) == json.loads(path.read_text()), name
        else:
            assert ours.read_bytes() == path.read_bytes(), name


@pytest.mark.parametrize("kind", ["Qwen3Moe", "Mixtral"])
def test_experts_that_are_stored_one_by_one(kind: str, tmp_path: Path) -> None:
    """Stacked in the class, and in Mixtral under another name: read, and written as the same bytes; shards read their part."""
    import transformers

    sizes = {"num_experts_per_tok": 2, "intermediate_size": 24}
    sizes |= {"num_experts": 4, "moe_intermediate_size": 24} if kind == "Qwen3Moe" else {"num_local_experts": 4}
    common = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    made = getattr(transformers, f"{kind}Config")(**common, **sizes, head_dim=8, max_position_embeddings=128)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(made).eval()
    theirs.save_pretrained(tmp_path / "published")
    assert any(".experts.3." in name for name in load_file(tmp_path / "published" / "model.safetensors"))
    cfg = config(tmp_path / "published")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(cfg.to_dict()))
    import_folder(str(tmp_path / "published"), tmp_path / "tiny.yaml", tmp_path / "start")
    export(tmp_path / "start", tmp_path / "back")
    model = l3m_like.load(tmp_path / "start").model
    found = dict(model.postprocessor.model.named_parameters())
    assert all(torch.equal(p, found[name]) for name, p in theirs.named_parameters())
    ours, right = (load_file(tmp_path / name / "model.safetensors") for name in ("back", "published"))
    assert ours.keys() == right.keys() and all(torch.equal(ours[name], right[name]) for name in right)
    names = NameMap.of(wrapped_family(model).templates(model), model)
    name = next(name for name in names.pieces if name.endswith("layers.1.mlp.experts.gate_up_proj"))
    region = torch.full((2, 30, 10), torch.nan)  # across the border of the two that are joined
    for piece, inner, place in names.reads(name, [(1, 3), (10, 40), (5, 15)]):
        region[place] = right[piece.theirs][piece.region(inner)]
    assert torch.equal(region, found[name.removeprefix("postprocessor.model.")][1:3, 10:40, 5:15])


def test_what_differs_is_named_before_weights_are_read(folder: Path) -> None:
    with pytest.raises(UserError, match="model_type is qwen3 there, but the family is mistral"):
        l3m_like.load(RunConfig.from_file(HF, [*SHORT, f"+init.from={folder}"]))
    other = ["model.postprocessor.config.model_type=qwen3", "+model.postprocessor.config.head_dim=16", "dim=64", "mlp_dim=48"]
    with pytest.raises(UserError, match="hidden_size is 32 there and 64 here; set model.postprocessor.config.hidden_size: 32"):
        l3m_like.load(RunConfig.from_file(HF, [*SHORT, f"+init.from={folder}", *other]))


def test_renamings_with_escaped_dots() -> None:
    import transformers

    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    made = transformers.GraniteMoeConfig(**sizes, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    model = MetaModel(HFModel(made.to_dict(), packed=False, stream="text", writes=["nll"]), stream="text")
    names = NameMap.of(wrapped_family(model).templates(model), model)
    assert not names.left
    theirs = ("input_linear", "output_linear", "router.layer")
    assert {f"model.layers.0.block_sparse_moe.{name}.weight" for name in theirs} <= set(names.shapes)
