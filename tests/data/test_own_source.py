"""docs/add_a_source.md, as it is written: its sources train, and resume exactly on another number of processes."""

from __future__ import annotations

import re
import sqlite3
import sys
from pathlib import Path

import pytest

from l3m_like.config.cli import main
from l3m_like.data import ConcatPack, Dataset, Loader, Tokenize

PAGE = (Path(__file__).parents[2] / "docs" / "add_a_source.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
YAML = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with sqlite3.connect(tmp_path / "notes.db") as database:
        database.execute("create table notes (text text)")
        database.executemany("insert into notes values (?)", [(f"note number {n} " * (n % 5 + 1),) for n in range(50)])
    (tmp_path / "my_source.py").write_text("\n\n".join(PYTHON))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.yaml").write_text(YAML[0])
    (tmp_path / "my.yaml").write_text("defaults: [llm]\ndim: 16\nlayers: 1\nsteps: 2\nbatch: {global: 4}\n")
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("".join(f"{name} line {n}\n" for n in range(9)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "my_source", raising=False)
    return tmp_path


def test_it_trains_from_the_users_folder(folder: Path) -> None:
    assert main(["--config", "my.yaml", "data=notes", "data.path=notes.db", "log.console=false"]) == 0


@pytest.mark.parametrize("kind", ["Table", "Lines"])
def test_it_resumes_exactly_on_other_processes(folder: Path, kind: str) -> None:
    import my_source  # type: ignore[import-not-found]

    def loaders(dp: int, **settings: object) -> list[Loader]:
        source = my_source.Table("notes.db") if kind == "Table" else my_source.Lines(["a.txt", "b.txt", "c.txt"])
        dataset = Dataset(source, Tokenize(vocab_size=257), ConcatPack(64))
        common = {"seed": 0, "global_batch": 4, "micro_batch": 1, "dp_size": dp, "prefetch": 0} | settings
        return [Loader(dataset, dp_rank=rank, **common) for rank in range(dp)]  # type: ignore[arg-type]

    def refs(made: list[Loader], steps: int) -> tuple[list[str], dict]:
        seen: list[str] = []
        state: dict = {}
        for _ in range(steps):
            for loader in made:
                step = loader.next_step()
                assert step is not None
                seen += step.refs
                state |= step.state
        return seen, state

    whole, _ = refs(loaders(1), 8)
    first, state = refs(loaders(2), 3)
    rest, _ = refs(loaders(4, workers=2, state=state, step=3), 5)
    assert first + rest == whole


def test_the_processor_is_a_function_of_the_visit(folder: Path) -> None:
    import my_source

    from l3m_like.data import FitPack, Visit

    made = my_source.Letters()
    dataset = Dataset(my_source.Table("notes.db"), made, FitPack(256))
    assert dataset.check()["text_ids"].shape == (1, 256)
    draws = {bytes(made({"text": "ab"}, Visit("x", epoch, 0))["ids"].astype("uint8")) for epoch in range(20)}
    once, again = (made({"text": "ab"}, Visit("x", 3, 0))["ids"].tolist() for _ in range(2))
    assert draws == {b"ab", b"AB"} and once == again
