"""Data that is broken, in training on one and two processes: the run goes on within its budget, or all ranks end."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from l3m_like.config import RunConfig
from l3m_like.core.errors import UserError
from l3m_like.core.keys import Limit
from l3m_like.data import ClassImage, ConcatPack, Dataset, JsonLines, Loader, Stack, Tokenize, WebDataset
from l3m_like.data.loader import EvalLoader
from l3m_like.training.train import plan, train
from tests.distributed import pool
from tests.generate.tiny import CONFIGS, OVERRIDES

ROOT = Path(__file__).parents[2]
DATA = "l3m_like.data."
LLM = ["dim=16", "layers=1", "heads=2", "kv_heads=1", "head_dim=8", "mlp_dim=16", "sequence=32", "batch.global=4"]
SIT = ["dim=16", "layers=1", "heads=2", "patch=14", "batch.global=4", "ema_decay=0.9"]


def picture(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((28, 28), number, dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pictures(folder: Path) -> tuple[Path, set[str]]:
    """40 images, of which two are corrupt, one is an empty file and one has no class."""
    members = {}
    for number in range(40):
        members[f"{number:03d}.jpg"] = picture(number)
        members[f"{number:03d}.cls"] = b"1"
    members["007.jpg"] = members["007.jpg"][:200]
    members["019.jpg"] = b"no picture"
    members["023.jpg"] = b""
    del members["031.cls"]
    return tar_of(folder / "a.tar", members), {f"a.tar#{n:03d}" for n in (7, 19, 23, 31)}


def texts(folder: Path) -> tuple[Path, set[str]]:
    """40 lines, of which one is no JSON, one has a number for a text and one has another field."""
    lines = [json.dumps({"text": f"line {n} " * 4}) for n in range(40)]
    lines[4], lines[11], lines[29] = "{", '{"text": 5}', '{"txt": "a"}'
    (folder / "a.jsonl").write_text("\n".join(lines))
    return folder / "a.jsonl", {f"a.jsonl#{n}" for n in (5, 12, 30)}


def tree(kind: str, folder: Path, budget: int, steps: int = 12) -> tuple[dict[str, Any], set[str]]:
    path, bad = pictures(folder) if kind == "sit" else texts(folder)
    source = {"_target_": DATA + ("WebDataset" if kind == "sit" else "JsonLines"), "path": str(path)}
    quiet = ["~evals", "log.console=false", "log.every=3", f"run.dir={folder}", "checkpoint.every=4", "data.workers=2"]
    length = [f"steps={steps}", f"data.max_bad_samples={budget}"]
    cfg = RunConfig.from_file(ROOT / f"configs/experiment/{kind}.yaml", [*(SIT if kind == "sit" else LLM), *quiet, *length])
    config = cfg.to_dict()
    config["data"]["train"]["source"] = source
    return config, bad


def run(config: dict[str, Any]) -> str:
    try:
        train(RunConfig.from_dict(config))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("kind", ["llm", "sit"])
def test_within_the_budget_the_run_goes_on_and_the_ledger_is_exact(kind: str, ranks: int, tmp_path: Path) -> None:
    config, bad = tree(kind, tmp_path, budget=50)
    assert pool.run(ranks, run, config) == [""] * ranks
    entries = [json.loads(line) for line in (tmp_path / config["run"]["name"] / "ledger.jsonl").read_text().splitlines()]
    assert {entry["sample"] for entry in entries} <= bad and len(entries) >= len(bad)
    assert all(entry["error"] and not entry["dropped"] and 1 <= entry["step"] <= 12 for entry in entries)
    # the same as that of a loader that took as many steps, in one process
    dataset = RunConfig.from_dict(config).instantiate("data.train")
    loader = Loader(dataset, seed=0, global_batch=4, micro_batch=4, most_bad=50)
    expected = [(n + 1, entry["sample"]) for n in range(12) for entry in loader.next_step().left_out]  # type: ignore[union-attr]
    loader.close()
    assert sorted((entry["step"], entry["sample"]) for entry in entries) == sorted(expected)
    # stopped and continued: one history
    longer = config | {"steps": 14}
    assert pool.run(ranks, run, longer) == [""] * ranks
    again = [json.loads(line) for line in (tmp_path / config["run"]["name"] / "ledger.jsonl").read_text().splitlines()]
    assert again[: len(entries)] == entries and all(entry["step"] > 12 for entry in again[len(entries) :])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["llm", "sit"])
def test_beyond_the_budget_all_ranks_end_with_the_samples_name(kind: str, ranks: int, tmp_path: Path) -> None:
    config, bad = tree(kind, tmp_path, budget=2, steps=40)
    errors = pool.run(ranks, run, config)
    for error in errors:
        assert "samples could not be used, and data.max_bad_samples is 2. The last: " in error and "ledger.jsonl" in error
        assert any(name in error for name in bad)
    assert len(set(errors)) == 1


def test_without_a_budget_the_first_one_ends_the_run(tmp_path: Path) -> None:
    config, bad = tree("llm", tmp_path, budget=0, steps=40)
    (error,) = pool.run(1, run, config)
    assert any(error.startswith(name) for name in bad), error


def test_files_that_are_cut_or_empty(tmp_path: Path) -> None:
    whole = tar_of(tmp_path / "a.tar", {"0.jpg": picture(0), "0.cls": b"1"}).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:700])
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "empty.jsonl").write_text("")
    tars = [WebDataset(str(tmp_path / f"{name}.tar")) for name in ("cut", "empty")]
    for source in (*tars, JsonLines(str(tmp_path / "empty.jsonl"))):
        with pytest.raises(UserError, match=Path(source.path).name):
            Dataset(source, ClassImage(28, 1), Stack()).check()


def test_a_worker_that_dies_ends_the_run() -> None:
    class Dies(Tokenize):
        def __call__(self, sample: Any, visit: Any) -> Any:
            raise SystemExit("the worker is gone")

    dataset = Dataset(JsonLines("shipped:shakespeare.jsonl"), Dies(vocab_size=257), ConcatPack(32))
    loader = Loader(dataset, seed=0, global_batch=4, micro_batch=4, workers=2)
    with pytest.raises(SystemExit, match="the worker is gone"):
        loader.next_step()
    with pytest.raises((SystemExit, UserError)):
        loader.next_step()
    loader.close()


def test_a_tokenizer_that_is_not_there_is_no_samples_fault(tmp_path: Path) -> None:
    source = JsonLines("shipped:shakespeare.jsonl")
    for name, text in {"no.json": "is not there: no file at ", "bad.json": "is not a tokenizer.json"}.items():
        (tmp_path / "bad.json").write_text("{}")
        dataset = Dataset(source, Tokenize(str(tmp_path / name), vocab_size=9), ConcatPack(8))
        with pytest.raises(UserError, match=f"^tokenizer: .*{text}"):
            Loader(dataset, seed=0, global_batch=2, micro_batch=2, most_bad=5)
        with pytest.raises(UserError, match=f"^tokenizer: .*{text}"):
            next(iter(EvalLoader(dataset, batch=2)))


@pytest.mark.parametrize(
    ("kind", "overrides", "by"),
    [
        ("sit", ["classes=5"], r"preprocessor.drop \(DropLabel\) takes 0 .. 4"),
        ("vit", ["classes=5"], r"loss.classes \(Classification\) takes 0 .. 4"),
        ("llm", ["model.preprocessor.vocab_size=90", "model.head.vocab_size=90"], r"preprocessor \(TokenEmbed\) takes 0 .. 89"),
    ],
)
def test_a_number_that_the_model_does_not_have_is_named(kind: str, overrides: list[str], by: str) -> None:
    """Before it reaches an embedding or a loss, where it would be an index beyond the end."""
    run = plan(RunConfig.from_file(CONFIGS / f"{kind}.yaml", [*OVERRIDES[kind], *overrides]), 1)
    loader = Loader(run.dataset, seed=0, global_batch=32, micro_batch=32, prefetch=0)
    key = "text_ids" if kind == "llm" else "image_label"
    with pytest.raises(UserError, match=rf"^\S+#\S+.*: {key} is \d+, but {by}. Give the model \d+ of them or more"):
        loader.next_step()
    run.dataset.limits = {"row": Limit(9, "somewhere")}
    with pytest.raises(UserError, match="row is -1, but somewhere takes 0 .. 8. Correct the data"):
        run.dataset.collate([next(run.dataset.rows(run.dataset.items()))], -1)
