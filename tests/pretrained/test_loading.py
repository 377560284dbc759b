"""`init` and Hugging Face folders: each rank reads its shards and no more, parts have their own folders, errors name the fix."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import l3m_like
from l3m_like.config import RunConfig
from l3m_like.core.errors import UserError
from l3m_like.data.loader import Loader
from l3m_like.distributed.gradients import local
from l3m_like.distributed.mesh import build_mesh
from l3m_like.pretrained.folder import INDEX, Folder
from l3m_like.pretrained.name_map import Piece
from l3m_like.training import hugging_face
from l3m_like.training.check import examine
from tests.distributed.pool import run as on_ranks
from tests.pretrained.tiny import LLM, config, publish, reference

PROMPT = torch.arange(12).view(1, 12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {
        "qwen2": publish("qwen2", root / "qwen2"),
        "llama": publish("llama", root / "llama"),
        "bf16": publish("llama", root / "bf16", dtype=torch.bfloat16, shard="1GB"),
    }


# ---- who reads what ------------------------------------------------------------------------------------------------------


def read_on(folder: Path, family: str, axes: dict[str, int], fault: str = "") -> dict[str, Any]:
    """On a rank: load on a mesh of ``axes``, and compare with the weights of one process."""
    whole = dict(l3m_like.load(config(family, folder)).model.named_parameters())
    sizes: list[int] = []
    read, region, bounds = Folder.read, Piece.region, hugging_face.shard_bounds

    def counted(self: Folder, name: str, at: tuple[slice, ...]) -> torch.Tensor:
        found = read(self, name, at)
        sizes.append(found.numel())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "read", counted)
        patch.setattr(hugging_face, "BLOCK", 300)
        if fault == "whole tensors":
            patch.setattr(hugging_face, "_blocks", lambda b: [b[0]])
            patch.setattr(Piece, "region", lambda self, b: tuple(slice(0, n) for n in self.shape))
            patch.setattr(Piece, "turned", lambda self, t, b: t[region(self, b)])
        if fault == "first shard":
            patch.setattr(hugging_face, "shard_bounds", lambda tensor, at: bounds(tensor, [0] * len(at)))
        model = l3m_like.load(config(family, folder), mesh=build_mesh(axes)).model
    parameters = dict(model.named_parameters())
    full = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in parameters.items()}
    return {
        "read": sum(sizes),
        "largest": max(sizes),
        "held": sum(local(p).numel() for p in parameters.values()),
        "all": sum(p.numel() for p in whole.values()),
        "equal": set(full) == set(whole) and all(torch.equal(full[name], whole[name]) for name in whole),
    }


def check_reads(found: list[dict[str, Any]], shards: int) -> None:
    for rank in found:
        assert rank["equal"]
        assert rank["read"] == rank["held"] <= rank["all"] / shards * 1.1
        assert rank["largest"] <= 300


@pytest.mark.parametrize(("family", "axes"), [("qwen2", {"dp_shard": 2}), ("llama", {"tp": 2})], ids=str)
def test_two_ranks_read_their_shards(folders, family, axes) -> None:
    vocabulary = 2 if "dp_shard" in axes else 1  # whole on every tp rank: most of these tiny models
    check_reads(on_ranks(2, read_on, folders[family], family, axes), vocabulary)


@pytest.mark.parametrize("axes", [{"dp_replicate": 2, "dp_shard": 2}, {"dp_shard": 2, "tp": 2}], ids=str)
def test_four_ranks_read_their_shards(folders, axes) -> None:
    check_reads(on_ranks(4, read_on, folders["llama"], "llama", axes), 2)


@pytest.mark.parametrize("fault", ["whole tensors", "first shard"])
def test_a_planted_fault_is_found(folders, fault) -> None:
    with pytest.raises(AssertionError):
        check_reads(on_ranks(2, read_on, folders["llama"], "llama", {"dp_shard": 2}, fault), 2)


def test_dtypes_are_cast_where_they_are_read(folders) -> None:
    """From bf16 files into fp32 masters and bf16 copies: the same numbers."""
    theirs = reference("llama").bfloat16().state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        model = l3m_like.load(config("llama", folders["bf16"]), dtype=dtype).model
        weight = model.trunk.layers[1].mixer.k_proj.weight
        assert weight.dtype == dtype and torch.equal(weight, theirs["model.layers.1.self_attn.k_proj.weight"].to(dtype))


# ---- training ------------------------------------------------------------------------------------------------------------


def trained(folder: Path, where: str, *overrides: str) -> dict[str, float]:
    cfg = config("llama", folder, f"run.dir={where}", "checkpoint.every=null", "log.every=1", *overrides)
    return l3m_like.train(cfg)


def first_losses(folder: Path, where: str, *overrides: str) -> list[float]:
    trained(folder, where, *overrides)
    lines = (Path(where) / "llm" / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_finetuning_begins_at_the_reference_loss(folders, tmp_path) -> None:
    """One line, init.from: the first loss is the reference's, in one process and on two; then it falls."""
    cfg = config("llama", folders["llama"])
    loader = Loader(cfg.instantiate("data.train"), seed=cfg.seed, global_batch=4, micro_batch=4, prefetch=0)
    data = loader.next_step().micro[0]
    documents = data["text_document_ids"]
    length = documents.shape[1]
    seen = (documents[:, :, None] == documents[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min).unsqueeze(1)
    logits = reference("llama")(data["text_ids"], attention_mask=mask, position_ids=data["text_positions"]).logits
    wanted = F.cross_entropy(logits.flatten(0, 1), data["text_targets"].flatten(), ignore_index=-100).item()
    one = first_losses(folders["llama"], str(tmp_path / "one"))
    two = on_ranks(2, first_losses, folders["llama"], str(tmp_path / "two"), "parallel.dp_shard=2")
    assert one[0] == pytest.approx(wanted, rel=1e-5) and one[1] < one[0]
    for rank in two:
        assert rank == pytest.approx(one, rel=1e-5)
    rounded = (
        reference("llama").bfloat16().float()(data["text_ids"], attention_mask=mask, position_ids=data["text_positions"]).logits
    )
    other = F.cross_entropy(rounded.flatten(0, 1), data["text_targets"].flatten(), ignore_index=-100).item()
    assert one[0] != pytest.approx(other, rel=1e-5), "the bound tells even rounded weights apart"


# ---- parts ---------------------------------------------------------------------------------------------------------------


def with_teacher(where: Path, dtype: str | None = None, **init: Any) -> RunConfig:
    """A model of the family llama with a frozen one beside its embedding, which nothing else reads."""
    tree = config("llama", None, f"run.dir={where}", "run.name=student", "checkpoint.every=null").to_dict()
    model = tree["model"]
    teacher = {part: dict(model[part]) for part in ("preprocessor", "trunk", "head")}
    teacher["preprocessor"] |= {"writes": {"tokens": "teacher_tokens"}}
    teacher["trunk"] |= {"reads": {"tokens": "teacher_tokens"}, "writes": {"hidden": "teacher_hidden"}}
    teacher["head"] |= {"reads": {"hidden": "teacher_hidden"}, "writes": {"logits": "teacher_logits"}}
    frozen = {"_target_": "l3m_like.core.Frozen", "model": {"_target_": "l3m_like.core.MetaModel", "stream": "text", **teacher}}
    frozen["dtype"] = dtype
    model["preprocessor"] = {"embed": model["preprocessor"], "teacher": frozen}
    tree["keep"] = ["teacher_logits"]
    return RunConfig.from_dict(tree | {"init": init})


def test_parts_have_folders_of_their_own(folders, tmp_path) -> None:
    both = with_teacher(tmp_path, **{"from": str(folders["llama"]), "parts": {"preprocessor.teacher": str(folders["bf16"])}})
    model = l3m_like.load(both).model
    teacher = model.preprocessor["teacher"]
    assert teacher.loaded_from == str(folders["bf16"])
    theirs = reference("llama")
    assert torch.equal(model.preprocessor["embed"].embed.weight, theirs.model.embed_tokens.weight)
    data = model({"text_ids": PROMPT, "text_targets": PROMPT})
    wanted = theirs.bfloat16().float()(input_ids=PROMPT).logits
    assert float((data["teacher_logits"] - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_a_part_alone_and_a_run_as_its_source(folders, tmp_path) -> None:
    """The student is random; its teacher is a run that began from the folder."""
    trained(folders["llama"], str(tmp_path), "optim.lr=0")
    alone = with_teacher(tmp_path, "bfloat16", parts={"preprocessor.teacher": str(tmp_path / "llm")})
    model = l3m_like.load(alone).model
    theirs = reference("llama")
    assert torch.equal(model.preprocessor["teacher"].model.head.proj.weight, theirs.lm_head.weight.bfloat16())
    assert not torch.equal(model.head.proj.weight, theirs.lm_head.weight)
    l3m_like.train(alone)
    state = json.loads(next((tmp_path / "student" / "checkpoints").glob("step_*/state.json")).read_text())
    assert state["frozen"] == {"preprocessor.teacher": str(tmp_path / "llm")}


def test_a_forgotten_part_is_named(folders, tmp_path) -> None:
    whole = with_teacher(tmp_path, **{"from": str(folders["llama"])})
    with pytest.raises(UserError, match="if preprocessor.teacher has weights of its own, name them in init.parts"):
        l3m_like.load(whole)
    with pytest.raises(UserError, match="preprocessor.teacher is Frozen, but no weights were loaded into it"):
        l3m_like.load(with_teacher(tmp_path, **{"from": str(folders["llama"]), "strict": False}))
    wrong = with_teacher(tmp_path, parts={"preprocessor.techer": "x"})
    with pytest.raises(UserError, match="init.parts: 'preprocessor.techer'.*Did you mean 'preprocessor.teacher'"):
        l3m_like.load(wrong)


# ---- what is wrong, and what to do about it ------------------------------------------------------------------------------


def edited(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a folder in its files."""
    placed = json.loads((folder / INDEX).read_text())["weight_map"]
    tensors = {name: t for file in sorted(set(placed.values())) for name, t in load_file(folder / file).items()}
    change(tensors)
    for file in set(placed.values()):
        (folder / file).unlink()
    (folder / INDEX).unlink()
    save_file(tensors, folder / "model.safetensors")


def _no_shard(folder: Path) -> None:
    (folder / "model-00002-of-00004.safetensors").unlink()


def _cut_short(folder: Path) -> None:
    file = folder / "model-00002-of-00004.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def _no_header(folder: Path) -> None:
    (folder / "model-00002-of-00004.safetensors").write_bytes(b"\xff" * 64)


def _wrong_index(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00004.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def _no_weights(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


def _config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        old = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(old | fields))

    return change


def _renamed(folder: Path) -> None:
    edited(folder, lambda t: t.update({"model.norm.scale": t.pop("model.norm.weight")}))


def _narrow(folder: Path) -> None:
    edited(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:7]}))


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "no shard": (_no_shard, "model-00002-of-00004.safetensors is missing.*Download it again"),
    "cut short": (_cut_short, r"damaged: it has [\d,]+ bytes instead of [\d,]+"),
    "no header": (_no_header, "damaged: its header is longer than the file"),
    "wrong index": (_wrong_index, "says that 'model.norm.weight' is in model-00001"),
    "no weights": (_no_weights, "holds neither model.safetensors nor"),
    "config.json": (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
    "no type": (lambda folder: (folder / "config.json").write_text("{}"), "has no model_type"),
    "quantised": (_config(quantization_config={"bits": 4}), "holds quantised weights"),
    "other family": (_config(model_type="lama"), "no family for model_type 'lama'. Did you mean 'llama'"),
    "near family": (_config(model_type="qwen3"), "model_type is qwen3 there, but.*has no qk_norm; set qk_norm: true"),
    "sizes": (
        _config(hidden_size=64, num_hidden_layers=9),
        "hidden_size is 64 there and 32 here; set dim: 64.*num_hidden_layers is 9 there and 2 here; set layers: 9",
    ),
    "tied": (_config(tie_word_embeddings=True), r"tie_word_embeddings is True there and False here \(knob: tie\)"),
    "rope": (
        _config(rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        r"rope_parameters.rope_type is default there and llama3 here \(knob: rope_scaling\).*set rope_theta: 10000.0",
    ),
    "activation": (_config(hidden_act="gelu"), "hidden_act is gelu there and silu here"),
    "renamed": (
        _renamed,
        "holds no 'model.norm.weight', needed for 'head.norm.weight'. Did you mean 'model.norm.scale'.*"
        "holds 'model.norm.scale', for which the model has no place",
    ),
    "narrow": (_narrow, r"'model.norm.weight', needed for 'head.norm.weight', is \[7\] there and \[32\] here"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_folder(what: str, folders, tmp_path) -> None:
    change, message = WRONG[what]
    shutil.copytree(folders["llama"], tmp_path / "folder")
    change(tmp_path / "folder")
    with pytest.raises(UserError, match=re.compile(message, re.DOTALL)):
        l3m_like.load(config("llama", tmp_path / "folder"))


def test_check_says_the_same_before_training(folders, tmp_path) -> None:
    assert not examine(config("llama", folders["llama"])).missing
    with pytest.raises(UserError, match="hidden_size is 32 there and 48 here; set dim: 32"):
        examine(config("llama", folders["llama"], "dim=48"))
    absent = examine(config("llama", Path("owner/name")))
    assert absent.missing == {"init.from": "owner/name"} and absent.code == 2


def test_what_is_not_there(tmp_path) -> None:
    with pytest.raises(UserError, match="init.from = owner/name: no such folder here.*hf download owner/name"):
        l3m_like.load(config("llama", Path("owner/name")))
    with pytest.raises(UserError, match="no such folder"):
        l3m_like.load(config("llama", tmp_path / "nothing"))
    with pytest.raises(UserError, match="nothing is given to start from"):
        RunConfig.from_file(LLM, ["+init.strict=false"])


def test_not_strict_takes_what_fits_and_says_so(folders, tmp_path, caplog) -> None:
    shutil.copytree(folders["llama"], tmp_path / "folder")
    edited(tmp_path / "folder", lambda t: t.update({"head": t.pop("lm_head.weight"), "model.norm.weight": torch.ones(7)}))
    lenient = config("llama", tmp_path / "folder", "+init.strict=false")
    model, fresh = (l3m_like.load(cfg).model for cfg in (lenient, config("llama", None)))
    for said in ("it holds no 'lm_head.weight'", "'model.norm.weight', needed", "it holds 'head'"):
        assert said in caplog.text
    assert torch.equal(model.head.proj.weight, fresh.head.proj.weight)
    assert torch.equal(model.trunk.layers[0].norm_1.weight, reference("llama").model.layers[0].input_layernorm.weight)
    report = examine(lenient)
    assert any("lm_head.weight" in line for line in report.warnings)
    edited_again = load_file(tmp_path / "folder" / "model.safetensors")
    save_file({f"x.{name}": t for name, t in edited_again.items()}, tmp_path / "folder" / "model.safetensors")
    with pytest.raises(UserError, match="none of the model's parameters is there"):
        l3m_like.load(lenient)


def test_old_folders_are_read(folders, tmp_path) -> None:
    """Published before today's names: rope_theta and rope_scaling apart, no head_dim, a stored table of frequencies."""
    shutil.copytree(folders["llama"], tmp_path / "folder")
    path = tmp_path / "folder" / "config.json"
    old = json.loads(path.read_text())
    rope = old.pop("rope_parameters")
    old |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": rope.pop("rope_type"), **rope}}
    del old["head_dim"]
    path.write_text(json.dumps(old))
    edited(tmp_path / "folder", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    model = l3m_like.load(config("llama", tmp_path / "folder")).model
    assert torch.equal(model.head.norm.weight, reference("llama").model.norm.weight)


def test_a_tied_matrix_may_be_stored_twice(folders, tmp_path) -> None:
    shutil.copytree(folders["qwen2"], tmp_path / "folder")
    edited(tmp_path / "folder", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = l3m_like.load(config("qwen2", tmp_path / "folder")).model
    assert model.head.proj.weight is model.preprocessor.embed.weight
