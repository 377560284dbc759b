"""Conversion: what comes out is what went in, whoever makes it and however often it is ended."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from l3m_like.core.errors import UserError
from l3m_like.data import (
    ClassImage,
    Dataset,
    HFDataset,
    ImageFolder,
    JsonLines,
    Megatron,
    MegatronWriter,
    Stack,
    Tokenize,
    WebDataset,
)
from l3m_like.data.convert import Conversion, Input, ToMegatron, ToWebDataset, form_of, parse_bytes, parse_settings

ROOT = Path(__file__).resolve().parents[2]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def shards(given: Input, folder: Path, samples: int = 16, workers: int = 1, max_bad: int = 0) -> dict[str, Any]:
    return Conversion(given, ToWebDataset(given.source, samples), folder, max_bad=max_bad).run(workers)


def tokens(given: Input, folder: Path, workers: int = 1) -> dict[str, Any]:
    return Conversion(given, ToMegatron("bytes", 257), folder).run(workers)


def command(*arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "run" / "convert_data.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=110, **more)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 shipped images as a folder of classes."""
    root = tmp_path_factory.mktemp("images")
    source = WebDataset("shipped:fashion_mnist.tar.gz", {"split": "heldout"})
    for index in range(40):
        sample = source.read(index)
        folder = root / f"class_{int(sample['cls'])}"
        folder.mkdir(exist_ok=True)
        (folder / f"{index:03d}.png").write_bytes(sample["png"])
    return root


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """100 documents of Shakespeare, the first words of each."""
    source = JsonLines("shipped:shakespeare.jsonl")
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": source.read(i)["text"][: 50 + i], "n": i}) + "\n" for i in range(100)))
    return path


# ---- round trips -----------------------------------------------------------------------------------------------------


def test_image_folder_to_webdataset(images: Path, tmp_path: Path) -> None:
    manifest = shards(Input.of(str(images)), tmp_path / "out")
    assert list(manifest["files"]) == [f"shard-{n:06d}.tar" for n in range(3)]
    before = Dataset(ImageFolder(str(images)), ClassImage(28, channels=1), Stack())
    after = Dataset(WebDataset(f"{tmp_path}/out/shard-{{000000..000002}}.tar"), ClassImage(28, channels=1), Stack())
    assert len(before) == len(after) == manifest["samples"] == 40
    for index in range(40):
        for key, value in before.item(index).data.items():
            np.testing.assert_array_equal(after.item(index).data[key], value)
    assert after.source.read(7)["class_name"] == before.source.read(7)["class_name"]
    assert not (tmp_path / "out" / ".parts").exists()


def test_json_lines_to_megatron(lines: Path, tmp_path: Path) -> None:
    assert tokens(Input.of(str(lines)), tmp_path / "out")["samples"] == 100
    made, tokenize, source = Megatron(f"{tmp_path}/out/tokens"), Tokenize(vocab_size=257), JsonLines(str(lines))
    assert len(made) == 100
    for index in range(100):
        np.testing.assert_array_equal(made.read(index)["ids"], tokenize(source.read(index), None)["ids"])  # type: ignore[arg-type]


def test_megatron_by_parts_is_megatron_at_once(lines: Path, tmp_path: Path) -> None:
    tokens(Input.of(str(lines)), tmp_path / "out", workers=3)
    tokenize, source = Tokenize(vocab_size=257), JsonLines(str(lines))
    with MegatronWriter(f"{tmp_path}/whole", 257) as out:
        for index in range(100):
            out.add(tokenize(source.read(index), None)["ids"])  # type: ignore[arg-type]
    for ending in ("bin", "idx"):
        assert (tmp_path / "out" / f"tokens.{ending}").read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()


def test_megatron_to_megatron(lines: Path, tmp_path: Path) -> None:
    tokens(Input.of(str(lines)), tmp_path / "a")
    given = Input.of(f"{tmp_path}/a/tokens.bin")
    Conversion(given, ToMegatron("ids", 257), tmp_path / "b").run()
    assert (tmp_path / "a" / "tokens.bin").read_bytes() == (tmp_path / "b" / "tokens.bin").read_bytes()


def test_members_of_records(tmp_path: Path) -> None:
    """Media, texts and numbers get their members, other fields go into json; so from CSV, and from parquet."""
    picture = io.BytesIO()
    Image.new("L", (4, 4), 77).save(picture, "png")
    (tmp_path / "a.png").write_bytes(picture.getvalue())
    (tmp_path / "pairs.csv").write_text("file,title,kind,year\na.png,Käse,3,1999\n")
    columns = {"media": "file", "txt": "title", "cls": "kind", "year": "year"}
    given = Input.of(f"{tmp_path}/pairs.csv", settings={"columns": columns, "data_folder": str(tmp_path)})
    shards(given, tmp_path / "csv")
    sample = WebDataset(f"{tmp_path}/csv/shard-000000.tar").read(0)
    assert sample == {"png": picture.getvalue(), "txt": "Käse".encode(), "cls": b"3", "json": b'{"year": "1999"}'}

    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"image": [{"bytes": picture.getvalue(), "path": None}], "label": [3], "tags": [["a", "b"]]})
    pq.write_table(table, tmp_path / "t.parquet")
    given = Input.of(f"{tmp_path}/t.parquet", settings={"columns": {"png": "image", "cls": "label", "tags": "tags"}})
    assert isinstance(given.source, HFDataset)
    shards(given, tmp_path / "hf")
    sample = WebDataset(f"{tmp_path}/hf/shard-000000.tar").read(0)
    assert sample == {"png": picture.getvalue(), "cls": b"3", "json": b'{"tags": ["a", "b"]}'}
    with pytest.raises(UserError, match="field 'image' holds bytes. Name their extension, and other fields: columns.png=image"):
        shards(Input.of(f"{tmp_path}/t.parquet"), tmp_path / "unnamed")


def test_shards_are_plain_and_without_a_date(lines: Path, tmp_path: Path) -> None:
    shards(Input.of(str(lines)), tmp_path / "out", samples=60)
    with tarfile.open(tmp_path / "out" / "shard-000001.tar", "r:") as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == [f"{n:09d}.json" for n in range(60, 100)]
    assert {(member.mtime, member.uid, member.uname) for member in members} == {(0, 0, "")}


def test_shard_size(images: Path, tmp_path: Path) -> None:
    given = Input.of(str(images))
    Conversion(given, ToWebDataset(given.source, size=20_000), tmp_path / "out").run()
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert len(sizes) > 3
    assert all(10_000 < size < 40_000 for size in sizes[:-1])


# ---- the same bytes, whatever happens --------------------------------------------------------------------------------


def test_workers_do_not_matter(images: Path, lines: Path, tmp_path: Path) -> None:
    for made, given in ((shards, Input.of(str(images))), (tokens, Input.of(str(lines)))):
        made(given, tmp_path / f"{made.__name__}1", workers=1)  # type: ignore[operator]
        made(given, tmp_path / f"{made.__name__}3", workers=3)  # type: ignore[operator]
        assert files(tmp_path / f"{made.__name__}1") == files(tmp_path / f"{made.__name__}3")


def test_libraries_in_several_processes(lines: Path, tmp_path: Path) -> None:
    """Rows of parquet, tokenized by a tokenizer.json, both opened before the processes are forked."""
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    import tokenizers

    texts = [json.loads(line)["text"] for line in lines.read_text().splitlines()]
    pq.write_table(pa.table({"text": texts}), tmp_path / "t.parquet")
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    words.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"]))
    words.save(str(tmp_path / "tokenizer.json"))
    given = Input.of(f"{tmp_path}/t.parquet")
    for workers in (1, 3):
        target = ToMegatron(f"{tmp_path}/tokenizer.json", 400)
        Conversion(given, target, tmp_path / f"{workers}").run(workers)
    assert files(tmp_path / "1") == files(tmp_path / "3")
    made = Megatron(f"{tmp_path}/3/tokens")
    assert made.read(99)["ids"].tolist() == [*words.encode(texts[99]).ids, 0]
    words.save(str(tmp_path / "tokenizer.json"), pretty=False)  # another file of the same name
    with pytest.raises(UserError, match="output.tokenizer_digest"):
        Conversion(given, ToMegatron(f"{tmp_path}/tokenizer.json", 400), tmp_path / "3")


class Deadly(Tokenize):
    """Its process is killed by the system at one document."""

    def __call__(self, sample: Any, visit: Any) -> dict[str, np.ndarray]:
        if sample["n"] == 60:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(sample, visit)


def test_a_worker_that_is_killed_is_reported(lines: Path, tmp_path: Path) -> None:
    given, target = Input.of(str(lines)), ToMegatron("bytes", 257)
    target.process = Deadly(vocab_size=257)
    with pytest.raises(UserError, match="a process of the conversion was killed .* The same command goes on"):
        Conversion(given, target, tmp_path / "out").run(2)
    tokens(given, tmp_path / "out")
    tokens(given, tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


SLOW = """
import sys, time
from l3m_like.data.sources.json_lines import JsonLines
read = JsonLines.read
JsonLines.read = lambda self, index: (time.sleep(0.03), read(self, index))[1]
sys.path.insert(0, "run")
import convert_data
sys.exit(convert_data.main(sys.argv[1:]))
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("to", "workers"),
    [
        ("webdataset", 2),
        pytest.param("webdataset", 1, marks=pytest.mark.slow),
        pytest.param("megatron", 1, marks=pytest.mark.slow),
        pytest.param("megatron", 2, marks=pytest.mark.slow),
    ],
)
def test_killed_and_gone_on_with(to: str, workers: int, lines: Path, tmp_path: Path) -> None:
    given = Input.of(str(lines))
    (tokens(given, tmp_path / "whole") if to == "megatron" else shards(given, tmp_path / "whole", samples=7))
    out = tmp_path / "out"
    line = [sys.executable, "-c", SLOW, str(lines), str(out), "--to", to, "--workers", str(workers)]
    line += ["--samples-per-shard", "7"] if to == "webdataset" else []
    seen = 0
    for stop in (3, 8):
        running = subprocess.Popen(line, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
        until = time.monotonic() + 130
        while len(list(out.glob(".parts/*.json"))) < stop and running.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.005)
        os.kill(running.pid, signal.SIGKILL)  # only the first process: the others have to end by themselves
        running.wait()
        until = time.monotonic() + 10
        while _alive(running.pid):
            assert time.monotonic() < until, "a worker outlived its parent"
            time.sleep(0.02)
        done = len(list(out.glob(".parts/*.json")))
        assert seen < done and not (out / "ledger.jsonl").exists()
        seen = done
    done_again = Conversion(given, _target(to, given), out)
    assert len(done_again.records) == seen  # none of these is made again
    done_again.run(workers)
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("to", "after"),
    [
        *(("webdataset", True), ("megatron", False)),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in (("webdataset", False), ("megatron", True))),
    ],
)
def test_killed_at_any_rename(to: str, after: bool, lines: Path, tmp_path: Path) -> None:
    """A process that ends just before or after its n-th rename, for every n: the next ones complete it, byte by byte."""
    count = 16 if to == "webdataset" else 3  # three parts, or four
    lines.write_text("".join(lines.read_text().splitlines(keepends=True)[:count]) + "{broken")
    given = Input.of(str(lines))

    def convert(out: Path) -> None:
        Conversion(given, _target(to, given), out, max_bad=1).run()

    convert(tmp_path / "whole")
    whole = files(tmp_path / "whole")
    assert "ledger.jsonl" in whole
    for stop in itertools.count(1):
        out = tmp_path / f"out{stop}"
        status = _in_child(lambda out=out, stop=stop: (_end_at_rename(stop, after), convert(out)))  # type: ignore[misc]
        convert(out)
        assert files(out) == whole, f"rename {stop}"
        if status == 0:
            assert stop > 6
            return


def _in_child(work: Any) -> int:
    """The exit status of a forked process that does ``work``."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status


def _end_at_rename(stop: int, after: bool) -> None:
    """In this process, for good: end it at the ``stop``-th rename of a file."""
    renames, replace = itertools.count(1), Path.replace

    def replace_or_end(path: Path, target: Path) -> Path:
        last = next(renames) == stop
        if last and not after:
            os._exit(9)
        made = replace(path, target)
        if last:
            os._exit(9)
        return made

    Path.replace = replace_or_end  # type: ignore[method-assign]


def _target(to: str, given: Input) -> Any:
    return ToMegatron("bytes", 257) if to == "megatron" else ToWebDataset(given.source, 7)


def _alive(session: int) -> bool:
    """Whether a process of this group runs."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            return True
    return False


@pytest.mark.parametrize("to", ["webdataset", "megatron"])
def test_damaged_output_is_made_again(to: str, lines: Path, tmp_path: Path) -> None:
    given, out = Input.of(str(lines)), tmp_path / "out"
    Conversion(given, _target(to, given), out).run()
    whole = files(out)
    name = "tokens.bin" if to == "megatron" else "shard-000003.tar"
    size = len(whole[name])
    with (out / name).open("r+b") as stream:
        stream.truncate(size - 100)
    again = Conversion(given, _target(to, given), out)
    assert not again.complete and again.damaged == {name: (size - 100, size)}
    assert len(again.records) == (0 if to == "megatron" else 14)  # of 15 shards
    again.run()
    assert files(out) == whole
    (out / name).unlink()
    assert Conversion(given, _target(to, given), out).damaged == {name: (-1, size)}


def test_part_that_was_cut_off_is_made_again(lines: Path, tmp_path: Path) -> None:
    given, out = Input.of(str(lines)), tmp_path / "out"
    shards(given, tmp_path / "whole", samples=7)
    conversion = Conversion(given, ToWebDataset(given.source, 7), out)
    (out / ".parts").mkdir(parents=True)
    (out / "manifest.json").write_text(json.dumps(conversion.facts))
    conversion.make(0), conversion.make(1)
    with (out / "shard-000001.tar").open("r+b") as stream:
        stream.truncate(1000)
    again = Conversion(given, ToWebDataset(given.source, 7), out)
    assert set(again.records) == {0}
    again.run()
    assert files(out) == files(tmp_path / "whole")


def test_another_conversion_is_refused(lines: Path, tmp_path: Path) -> None:
    given, out = Input.of(str(lines)), tmp_path / "out"
    shards(given, out)
    with pytest.raises(UserError, match=r"another conversion: output.part is 16 there, 17 here"):
        shards(given, out, samples=17)
    with pytest.raises(UserError, match=r"another conversion: output.to is 'webdataset' there, 'megatron' here"):
        tokens(given, out)
    with lines.open("a") as stream:
        stream.write('{"text": "more"}\n')
    with pytest.raises(UserError, match=r"another conversion: input.samples is 100 there, 101 here"):
        shards(Input.of(str(lines)), out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match="not empty, and no conversion began there"):
        shards(given, tmp_path / "other")


def test_bad_samples(lines: Path, tmp_path: Path) -> None:
    text = lines.read_text().splitlines(keepends=True)
    text[10], text[50] = "{broken\n", '{"txt": 1}\n'
    lines.write_text("".join(text))
    given = Input.of(str(lines))
    for workers in (1, 3):
        with pytest.raises(UserError, match=r"text.jsonl#(11: JSONDecodeError|51: the record has no field)"):
            tokens(given, tmp_path / "out", workers)
        with pytest.raises(UserError, match=r"\(2 samples so far cannot be used, and --max-bad is 1.\)"):
            Conversion(given, ToMegatron("bytes", 257), tmp_path / "out", max_bad=1).run(workers)
    manifest = Conversion(given, ToMegatron("bytes", 257), tmp_path / "out", max_bad=2).run(3)  # goes on
    assert (manifest["samples"], manifest["left_out"]) == (98, 2)
    ledger = [json.loads(line) for line in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()]
    assert [entry["sample"] for entry in ledger] == ["text.jsonl#11", "text.jsonl#51"]
    assert "no field 'text'" in ledger[1]["error"]
    assert len(Megatron(f"{tmp_path}/out/tokens")) == 98


# ---- the command -----------------------------------------------------------------------------------------------------


def test_command(lines: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = command(lines, out, "--to", "megatron", "--workers", "2", "columns.text=text")
    assert first.returncode == 0, first.stderr
    assert "100 samples in 2 files" in first.stdout and "\x1b" not in first.stdout
    again = command(lines, out, "--to", "megatron", "columns.text=text")
    assert again.returncode == 0 and "complete: nothing to do" in again.stdout
    (out / "tokens.idx").unlink()
    again = command(lines, out, "--to", "megatron", "columns.text=text")
    assert again.returncode == 0 and "tokens.idx is missing: it is made again" in again.stdout
    refused = command(lines, out, "--to", "megatron")
    assert refused.returncode == 1 and "input.settings" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "megatron", "--shard-size", "1M"], "--shard-size has no meaning with --to megatron"),
        (["--to", "webdataset", "--field", "text"], "--field has no meaning with --to webdataset"),
        (["--to", "webdataset", "--shard-size", "1M", "--samples-per-shard", "3"], "both given"),
        (["--to", "webdataset", "--shard-size", "big"], "write a number of bytes, e.g. 256M"),
        (["--to", "webdataset", "wher.split=train"], "Did you mean 'where'?"),
        (["--to", "webdataset", "--from", "jsn"], "Did you mean 'json'?"),
        (["--to", "megatron", "--tokenizer", "t.json"], "--vocab-size is missing"),
        (["--to", "megatron", "--workers", "0"], "--workers is 0"),
    ],
)
def test_wrong_commands(
    arguments: list[str], message: str, lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.syspath_prepend(ROOT / "run")
    import convert_data

    assert convert_data.main([str(lines), str(tmp_path / "out"), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_forms(tmp_path: Path) -> None:
    paths = ["a.jsonl", "a.json.gz", "b.csv", "c.tsv.gz", "d-{0..3}.tar", "e.tar.gz", "f/*.parquet", "g.bin", "shipped:h.jsonl"]
    assert [form_of(path) for path in paths] == [*["json"] * 2, *["csv"] * 2, *["webdataset"] * 2, "hf", "megatron", "json"]
    assert form_of(str(tmp_path)) == "images"
    (tmp_path / "dataset_info.json").touch()
    assert form_of(str(tmp_path)) == "hf"
    with pytest.raises(UserError, match="Say what it is: --from json|csv"):
        form_of("nowhere.xyz")


def test_values() -> None:
    assert [parse_bytes(text) for text in ("256M", "1.5k", "7", "2GiB")] == [256 * 2**20, 1536, 7, 2 * 2**30]
    written = ["where.split=train", "where.year=1999", "delimiter=;", "header=[a, b]", "where.day=2024-01-01"]
    assert parse_settings(written) == {
        "where": {"split": "train", "year": 1999, "day": "2024-01-01"},
        "delimiter": ";",
        "header": ["a", "b"],
    }
