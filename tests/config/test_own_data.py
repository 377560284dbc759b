"""Own data in one override, for every shipped preset."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import l3m_like
from l3m_like.config import RunConfig
from l3m_like.config.cli import main
from l3m_like.config.compose import shipped_configs
from l3m_like.core.errors import UserError

EXPERIMENTS = Path(__file__).parents[2] / "configs" / "experiment"


def lines(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def images(folder: Path) -> Path:
    for kind in ("cat", "dog"):
        (folder / kind).mkdir(parents=True)
        for number in range(20):
            pixels = np.random.default_rng(number).integers(0, 255, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{number}.png")
    return folder


def made(name: str, folder: Path) -> tuple[str, Path]:
    """The experiment, and data of this kind."""
    words = [{"text": "to be or not to be " * (1 + number % 3)} for number in range(60)]
    if name == "image_folder":
        return "sit", images(folder / "images")
    if name == "image_tar":
        return "sit", Path("shipped:fashion_mnist.tar.gz")
    if name == "text_jsonl":
        return "llm", lines(folder / "a.jsonl", words)
    if name == "chat_jsonl":
        turns = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A model."}]
        return "llm", lines(folder / "a.jsonl", [{"messages": turns}] * 60)
    if name == "megatron":
        from l3m_like.data import MegatronWriter

        with MegatronWriter(str(folder / "a"), vocab_size=257) as writer:
            for record in words:
                writer.add(np.frombuffer(record["text"].encode(), dtype=np.uint8))
        return "llm", folder / "a"
    import datasets

    dataset = datasets.Dataset.from_list(words)
    dataset.to_parquet(folder / "a.parquet")
    dataset.save_to_disk(folder / "saved")
    return "llm", folder / ("a.parquet" if name == "text_parquet" else "saved")


@pytest.mark.parametrize("name", sorted(file.stem for file in (shipped_configs() / "data").glob("*.yaml")))
def test_a_preset_trains(name: str, tmp_path: Path) -> None:
    experiment, path = made(name, tmp_path)
    small = ["dim=16", "layers=1", "heads=2", "steps=2", "batch.global=4", "log.console=false", f"run.dir={tmp_path}/runs"]
    small += ["head_dim=8", "mlp_dim=16", "sequence=128"] if experiment == "llm" else ["patch=14"]
    cfg = RunConfig.from_file(EXPERIMENTS / f"{experiment}.yaml", [f"data={name}", f"data.path={path}", *small])
    assert all(evaluation.data is None for evaluation in cfg.evals.values())
    assert str(path) in str(cfg.data.sets["train"]["source"]["path"])
    assert np.isfinite(l3m_like.train(cfg)["loss"])


def test_what_it_replaces_and_what_wins(tmp_path: Path) -> None:
    texts = lines(tmp_path / "a.jsonl", [{"text": "a", "kind": "b"}])
    llm = EXPERIMENTS / "llm.yaml"
    own = ["data=text_jsonl", f"data.path={texts}", f"data.heldout={texts}"]
    cfg = RunConfig.from_file(llm, ["data.train.source.where={kind: b}", *own])
    assert cfg.data.sets["train"]["source"]["where"] == {"kind": "b"}  # what the command line adds to it stays
    assert cfg.evals["heldout"].data["source"]["path"] == str(texts) and not cfg.evals["heldout"].data["source"]["where"]
    assert cfg.origins["data.train.source.path"] == "command line"
    cfg.save(tmp_path / "saved")
    assert RunConfig.from_file(tmp_path / "saved" / "config.yaml") == cfg
    with pytest.raises(UserError, match="data=text_json .*Did you mean 'text_jsonl'"):
        RunConfig.from_file(llm, ["data=text_json", "data.path=x"])
    with pytest.raises(UserError, match="data=text_jsonl reads no media by a path"):
        RunConfig.from_file(llm, [*own, "data.folder=/nope"])
    with pytest.raises(UserError, match="several values are a sweep: add -m"):
        RunConfig.from_file(llm, ["data=text_jsonl", "data.path=/a,/b"])
    with pytest.raises(UserError, match="it needs data.path"):
        RunConfig.from_file(llm, ["data=text_jsonl"])
    with pytest.raises(UserError, match="data.path"):
        RunConfig.from_file(llm, ["data.path=x"])


def test_a_preset_of_ones_own_and_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = lines(tmp_path / "a.jsonl", [{"words": "to be or not to be"}] * 60)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(
        "source: {_target_: l3m_like.data.JsonLines, path: '${data.path}'}\n"
        "process: {_target_: l3m_like.data.Tokenize, vocab_size: '${vocab_size}', field: words}\n"
    )
    (tmp_path / "my.yaml").write_text("defaults: [llm]\ndim: 16\nlayers: 1\nsteps: 2\nbatch: {global: 4}\nsequence: 32\n")
    monkeypatch.chdir(tmp_path)
    assert main(["--config", "my.yaml", "-m", "data=mine", f"data.path={texts}", "lr=1e-3,2e-3", "log.console=false"]) == 0
    assert len(list((tmp_path / "runs").glob("*/*/result.json"))) == 2
    (tmp_path / "data" / "grey.yaml").write_text(
        "source: {_target_: l3m_like.data.WebDataset, path: '${data.path}/a.tar'}\n"
        "process: {_target_: l3m_like.data.ClassImage, size: 28, channels: 1, flip: false}\n"
    )
    (tmp_path / "pictures.yaml").write_text("defaults: [sit]\n")
    train_on = RunConfig.from_file("pictures.yaml", ["data=grey", "data.path=2024"]).data.sets["train"]
    assert train_on["source"]["path"] == "2024/a.tar" and train_on["process"]["channels"] == 1
    (tmp_path / "data" / "mine.yaml").write_text("sauce: {}\n")
    with pytest.raises(UserError, match="'sauce' is not one of source, process, pack. Did you mean 'source'"):
        RunConfig.from_file("my.yaml", ["data=mine", "data.path=x"])
