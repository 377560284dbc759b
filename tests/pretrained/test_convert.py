"""run/convert.py: there and back gives the same files; what a run has learned loads in transformers."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import l3m_like
from l3m_like.pretrained.folder import INDEX
from l3m_like.training.checkpoint import WholeTensors
from l3m_like.training.export import export
from tests.distributed.pool import run as on_ranks
from tests.pretrained.tiny import LLM, config, publish

PROMPT = torch.arange(12).view(1, 12)
ROOT = Path(__file__).parents[2]


def convert(*words: Any) -> int:
    spec = importlib.util.spec_from_file_location("convert", ROOT / "run" / "convert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(word) for word in words])


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def start(family: str, folder: Path, where: Path) -> Path:
    """``from-hf`` with a config file of the tiny family."""
    tree = config(family, None).to_dict()
    (where / "tiny.yaml").write_text(yaml.safe_dump(tree))
    assert convert("from-hf", folder, "--config", where / "tiny.yaml", "--out", where / "start", "seed=3") == 0
    return where / "start"


@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.bfloat16), ("qwen2", torch.float32)], ids=["llama", "qwen2"])
def test_there_and_back_are_the_same_files(family, dtype, tmp_path, capsys) -> None:
    folder = publish(family, tmp_path / "published", dtype=dtype, shard="30KB")
    (folder / "tokenizer.json").write_text('{"of": "the folder"}')
    run = start(family, folder, tmp_path)
    assert l3m_like.load(run).step == 0
    assert convert("to-hf", "--run", run, "--step", 0, "--max-shard-size", "30KB", "--out", tmp_path / "back") == 0
    assert f"tensors, {sum(f.stat().st_size for f in folder.glob('*.safetensors')):,} bytes" in capsys.readouterr().out
    ours, theirs = ({path.name: path for path in f.iterdir()} for f in (tmp_path / "back", folder))
    assert set(ours) == set(theirs) and INDEX in ours and len(ours) > 5
    for name in theirs:
        if name.endswith(".json") and name != "tokenizer.json":
            assert json.loads(ours[name].read_text()) == json.loads(theirs[name].read_text()), name
        else:
            assert ours[name].read_bytes() == theirs[name].read_bytes(), name


def made(where: str, *overrides: str) -> None:
    """A run of llm.yaml's own model."""
    small = [
        "dim=32",
        "mlp_dim=48",
        "layers=2",
        "heads=4",
        "head_dim=8",
        "sequence=32",
        "batch.global=4",
        "evals=null",
        "steps=2",
    ]
    faster = [f"run.dir={where}", "checkpoint.every=null", "log.console=false", "+ema.decay=0.5", "schedule.warmup=0", "lr=0.1"]
    l3m_like.train(l3m_like.config.RunConfig.from_file(LLM, [*small, *faster, *overrides]))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on two ranks."""
    where = tmp_path_factory.mktemp("runs")
    on_ranks(2, made, str(where), "parallel.dp_shard=2")
    return where / "llm"


@pytest.mark.parametrize("ema", [False, True], ids=["weights", "average"])
def test_a_run_loads_in_transformers(run, ema, tmp_path, monkeypatch) -> None:
    """A model that never was a folder: the family and its config.json follow from the model alone."""
    read, asked = WholeTensors.read, []
    monkeypatch.setattr(WholeTensors, "read", lambda self, names: asked.append(list(names)) or read(self, asked[-1]))
    assert convert("to-hf", "--run", run, "--out", tmp_path / "out", *(["--ema"] if ema else [])) == 0
    assert all(len(names) == 1 for names in asked) and len({name for (name,) in asked}) == len(asked), "one at a time, each once"
    monkeypatch.undo()
    loaded = l3m_like.load(run, ema=ema)
    theirs, said = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(theirs).__name__ == "Qwen3ForCausalLM" and not any(said.values())
    assert theirs.config.max_position_embeddings == 32 and theirs.config.eos_token_id == 256
    wanted = theirs(input_ids=PROMPT).logits
    with torch.no_grad():
        found = loaded({"text_ids": PROMPT})["text_logits"]
        other = l3m_like.load(run, ema=not ema)({"text_ids": PROMPT})["text_logits"]
    bound = 1e-5 * float(wanted.detach().abs().max())
    assert float((found - wanted).abs().max()) <= bound < float((other - wanted).detach().abs().max())


def test_a_dtype_that_was_asked_for(run, tmp_path) -> None:
    assert convert("to-hf", "--run", run, "--out", tmp_path / "whole") == 0
    assert convert("to-hf", "--run", run, "--out", tmp_path / "half", "--dtype", "bf16") == 0
    whole, half = tensors(tmp_path / "whole"), tensors(tmp_path / "half")
    assert set(whole) == set(half) and "lm_head.weight" not in whole
    for name, value in whole.items():
        assert value.dtype == torch.float32 and half[name].dtype == torch.bfloat16
        assert torch.equal(half[name], value.bfloat16())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def changed(run: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a run whose config says something else."""
    shutil.copytree(run, to)
    tree = yaml.safe_load((to / "config.yaml").read_text())
    change(tree)
    (to / "config.yaml").write_text(yaml.safe_dump(tree))
    return to


def test_a_mask_that_the_family_has_not_is_said(run, tmp_path) -> None:
    def whole(tree: dict[str, Any]) -> None:
        tree["model"]["trunk"]["mask"] = "full"

    said = export(changed(run, tmp_path / "full", whole), tmp_path / "out")
    assert "its mask is full: read as Qwen3ForCausalLM it has causal attention, and is another model." in said
    assert not any("its mask" in line for line in export(run, tmp_path / "causal"))


def test_the_tokenizer_of_the_run_goes_along(run, tmp_path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {chr(97 + i): i for i in range(26)} | {"</s>": 26, "[UNK]": 27}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "letters.json"))
    process = {"tokenizer": str(tmp_path / "letters.json")}
    other = changed(run, tmp_path / "run", lambda tree: tree["data"]["train"]["process"].update(process))
    assert convert("to-hf", "--run", other, "--out", tmp_path / "out") == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("abc")["input_ids"] == [0, 1, 2] and theirs.eos_token_id == 26
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 26


def test_what_cannot_be_converted(run, tmp_path, capsys) -> None:
    def error(*words: Any) -> str:
        assert convert(*words, "--out", tmp_path / "x") == 1
        return capsys.readouterr().err

    of = ("to-hf", "--run")
    assert "write a number of bytes, e.g. 500M" in error(*of, run, "--max-shard-size", "many")
    assert "no family for model_type 'qwen4'" in error(*of, run, "--family", "qwen4")
    assert "its attention has a qk_norm; set qk_norm: false" in error(*of, run, "--family", "llama")
    assert "cannot be used: it does not exist. Whole ones: steps 2" in error(*of, run, "--step", 7)
    assert "is no run's directory" in error(*of, tmp_path)
    plain = changed(run, tmp_path / "plain", lambda tree: tree.update(ema=None))
    assert "kept no average" in error(*of, plain, "--ema")
    mlp = {"_target_": "l3m_like.layers.MLP"}
    other = changed(run, tmp_path / "mlp", lambda tree: tree["model"]["trunk"]["layer"]["mlp"].update(mlp))
    assert "it is none of those that are known:\n  llama: layer 0 is no" in error(*of, other)
    less = changed(run, tmp_path / "less", lambda tree: tree["model"]["trunk"].update(num_layers=1))
    assert "Qwen3ForCausalLM has no place for 'trunk.layers.1" in error(*of, less)
    assert not (tmp_path / "x").exists()
    more = changed(run, tmp_path / "more", lambda tree: tree["model"]["trunk"].update(num_layers=3))
    assert "holds no tensor 'model/trunk.layers.2" in error(*of, more)
    assert not (tmp_path / "x" / "config.json").exists(), "half a folder is none"
    assert "is there already. Give the name of a new folder" in error(*of, run)
