"""docs/add_a_model.md: its map, its config and its test are what they say, and its test can fail."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import l3m_like
from l3m_like.config import RunConfig
from l3m_like.training.train import plan
from tests.pretrained.test_convert import convert

PAGE = (Path(__file__).parents[2] / "docs" / "add_a_model.md").read_text(encoding="utf-8")
FILE = re.compile(r"`([\w.]+\.(?:py|yaml))`[^\n]*:\n\n```(?:python|yaml)\n(.*?)```", re.DOTALL)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The files of the page in a folder, which is the working directory; the module of its test."""
    files = dict(FILE.findall(PAGE))
    assert set(files) == {"my_phi3.py", "phi3_mini.yaml", "test_phi3.py"}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_phi3", "test_phi3"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("test_phi3")


def test_the_page_is_right(page: Any, tmp_path: Path) -> None:
    folder, back = tmp_path / "folder", tmp_path / "back"
    page.test_equals_transformers(folder)
    run = plan(RunConfig.from_file("phi3_mini.yaml"), dp_size=1)
    assert sum(p.numel() for p in run.model.parameters()) == 3_821_079_552
    small = [
        *page.KNOBS,
        f"init.from={folder}",
        "parallel.precision=fp32",
        "parallel.compile=false",
        "text=shipped:shakespeare.jsonl",
    ]
    short = ["sequence=32", "batch={global: 2, micro: null}", "steps=1", "schedule.warmup=0", "optim.lr=0", "evals=null"]
    quiet = ["log.console=false", "parallel.checkpoint=none"]
    l3m_like.train(RunConfig.from_file("phi3_mini.yaml", [*small, *short, *quiet]))
    assert convert("to-hf", "--run", "runs/phi3_mini", "--out", back, "--max-shard-size", "40KB") == 0
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 1
    for name in files:
        ours, theirs = load_file(back / name), load_file(folder / name)
        assert set(ours) == set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_page_can_fail(page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = page.FAMILY.names
    key, value = ("trunk.layers.{i}.mlp.gate.weight", "trunk.layers.{i}.mlp.up.weight")
    swapped = {**names, key: names[value], value: names[key]}
    monkeypatch.setattr(sys.modules["my_phi3"], "FAMILY", type(page.FAMILY)(**{**vars(page.FAMILY), "names": swapped}))
    with pytest.raises(AssertionError):
        page.test_equals_transformers(tmp_path / "folder")
