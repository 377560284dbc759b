"""The page shows what the loader gives: text with its targets, pictures, and numbers that can be counted by hand."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from l3m_like.core.errors import UserError
from l3m_like.core.keys import KeySpec
from l3m_like.data import (
    Chat,
    ClassImage,
    ConcatPack,
    Cost,
    Dataset,
    FitPack,
    JsonLines,
    Loader,
    Mix,
    OnePerRow,
    Stack,
    TextTokenizer,
    Tokenize,
    WebDataset,
)
from l3m_like.data.inspect import inspect_evaluation, inspect_training
from l3m_like.data.inspect_page import page, trained_tokens

ROOT = Path(__file__).resolve().parents[2]


def text(tmp_path: Path, sizes: list[int]) -> JsonLines:
    """Documents of so many tokens, the end token among them: aaa, bbb, .."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": chr(97 + i % 26) * (size - 1)}) + "\n" for i, size in enumerate(sizes)))
    return JsonLines(str(path))


def chats(path: Path, count: int, salt: int = 0) -> JsonLines:
    rng = np.random.default_rng(salt)
    words = ["<b>", "&amp;", "Käse", "yes", "no", "\n"]

    def said() -> str:
        return " ".join(rng.choice(words, rng.integers(1, 12)))

    turns = [[{"role": role, "content": said()} for role in ("user", "assistant", "user", "assistant")] for _ in range(count)]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return JsonLines(str(path))


class Documents(HTMLParser):
    """Of each document of the page: [(text, marked)], and the dotted text after it."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.documents: list[list[tuple[str, bool]]] = []
        self.ahead: list[str] = []
        self._in: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "pre":
            self.documents.append([])
            self.ahead.append("")
        if tag == "pre" or self._in:
            self._in.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._in:
            assert self._in.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._in and self._in[-1] == "span":
            self.ahead[-1] += data
        elif self._in:
            self.documents[-1].append((data, self._in[-1] == "mark"))


def expected(batch: dict[str, torch.Tensor], rows: int) -> tuple[list[list[tuple[str, bool]]], list[str]]:
    """What ``Documents`` should find, token by token from the batch: a token is marked if it is the place before's target."""
    tokenizer, documents, ahead = TextTokenizer("bytes", 257), [], []
    for ids, targets, numbers in zip(*(batch[f"text_{name}"].tolist()[:rows] for name in ("ids", "targets", "document_ids"))):
        for number in range(max(numbers) + 1):
            first, last = numbers.index(number), len(numbers) - 1 - numbers[::-1].index(number)
            runs: list[tuple[list[int], bool]] = []
            for place in range(first, last + 1):
                marked = place > first and targets[place - 1] != -100
                assert not marked or targets[place - 1] == ids[place]
                if not runs or runs[-1][1] != marked:
                    runs.append(([], marked))
                runs[-1][0].append(ids[place])
            documents.append([(tokenizer.show(run), marked) for run, marked in runs])
            ahead.append("" if targets[last] == -100 else tokenizer.show([targets[last]]))
    return documents, ahead


def test_spans_are_those_of_the_targets(tmp_path: Path) -> None:
    sources = {"web": chats(tmp_path / "a.jsonl", 40), "books": chats(tmp_path / "b.jsonl", 30, salt=1)}
    dataset = Dataset(sources, Chat(vocab_size=257), FitPack(700, buffer=8), Mix({"web": 3, "books": 1}))
    seen = inspect_training(dataset, 2, seed=3, global_batch=6, micro_batch=6, lanes=2)
    found = Documents(page(seen, "chats"))
    documents, ahead = expected(seen.shown[0], 6)
    assert len(documents) >= 10 and any(marked for spans in documents for _, marked in spans)
    assert (found.documents, found.ahead) == (documents, ahead)
    assert not any(ahead)  # nothing is cut


def test_spans_of_cut_documents(tmp_path: Path) -> None:
    dataset = Dataset(text(tmp_path, [50, 30, 7, 90]), Tokenize(vocab_size=257), ConcatPack(32))
    seen = inspect_training(dataset, 1, seed=0, global_batch=5, micro_batch=5, lanes=1)
    found = Documents(page(seen, "text"))
    assert (found.documents, found.ahead) == expected(seen.shown[0], 5)
    assert any(found.ahead)


def test_trained_tokens() -> None:
    targets, documents = np.array([5, -100, 6, 7, -100, -100]), np.array([0, 0, 0, 1, 1, -1])
    assert trained_tokens(targets, documents).tolist() == [False, True, False, False, True, False]


def test_efficiency_by_hand(tmp_path: Path) -> None:
    """Four documents of 4, 6, 10 and 1 tokens, a row of 16 each."""
    dataset = Dataset(text(tmp_path, [4, 6, 10, 1]), Tokenize(vocab_size=257), OnePerRow(16))
    seen = inspect_evaluation(dataset, 9, batch=3)
    assert (seen.units, seen.capacity, seen.batches) == (21, 64, 2)
    assert seen.trained == 3 + 5 + 9 + 0
    assert seen.facts()["packing"] == "21 of 64 places are tokens: 32.81% efficiency"
    assert [(d.name, d.size) for d in seen.documents] == [(f"text.jsonl#{n + 1}", s) for n, s in enumerate([4, 6, 10, 1])]
    assert re.findall(r"padding: (\d+) tokens", page(seen, "text")) == ["12", "10", "6", "15"]


def test_waits_by_hand(tmp_path: Path) -> None:
    """Rows of 10, best fit of 3: the sixth and the fourth document overtake the third."""
    source = text(tmp_path, [6, 5, 9, 4, 10, 5, 1, 8, 8])
    dataset = Dataset(source, Tokenize(vocab_size=257), FitPack(10, buffer=3), shuffle=False)
    seen = inspect_training(dataset, 3, seed=0, global_batch=1, micro_batch=1)
    names = [[int(d.name.partition("#")[2]) for d in row.documents] for row in seen.rows]
    assert names == [[1, 4], [2, 6], [3, 7]]
    assert [sorted(row.waits) for row in seen.rows] == [[0, 0], [0, 1], [1, 2]]
    assert seen.facts()["longest wait"] == "2 rows of a lane (at most the buffer, 3)"


def test_costs_and_bound(tmp_path: Path) -> None:
    sizes = np.random.default_rng(0).integers(2, 60, 200).tolist()
    pack = FitPack(64, buffer=6, cost=Cost(1.0, 0.05), max_cost=200.0, too_long="drop")
    dataset = Dataset(text(tmp_path, sizes), Tokenize(vocab_size=257), pack)
    seen = inspect_training(dataset, 10, seed=0, global_batch=4, micro_batch=2, lanes=2, workers=2)
    by_hand = [sum((d.stop - d.start) + 0.05 * (d.stop - d.start) ** 2 for d in row.documents) for row in seen.rows]
    assert [row.cost for row in seen.rows] == pytest.approx(by_hand)
    assert 0 < seen.longest_wait <= 6 and max(by_hand) <= 200
    assert len(seen.rows) == 40 and seen.batches == 10
    content = page(seen, "costs")
    assert "cost of a row (at most 200)" in content and "rows that a document waits (at most 6)" in content


def test_shares(tmp_path: Path) -> None:
    sources = {"long": text(tmp_path, [40] * 9)}
    (tmp_path / "b").mkdir()
    sources["short"] = text(tmp_path / "b", [10] * 9)
    dataset = Dataset(sources, Tokenize(vocab_size=257), ConcatPack(80), Mix({"long": 1, "short": 1}, by="samples"))
    seen = inspect_training(dataset, 20, seed=0, global_batch=1, micro_batch=1)
    weight, samples, tokens = seen.shares()["long"]
    assert weight == 0.5 and samples == pytest.approx(0.5, abs=0.02) and tokens == pytest.approx(0.8, abs=0.02)
    assert seen.units == 20 * 80 == sum(seen.units_by_source.values())


def test_watching_changes_nothing(tmp_path: Path) -> None:
    def dataset() -> Dataset:
        return Dataset(text(tmp_path, list(range(2, 40))), Tokenize(vocab_size=257), FitPack(50, buffer=5))

    arguments: dict[str, Any] = {"seed": 7, "global_batch": 4, "micro_batch": 2, "lanes": 2, "epochs": 3, "remainder": "pad"}
    seen = inspect_training(dataset(), 100, **arguments)
    loader = Loader(dataset(), **arguments)
    steps = []
    while (step := loader.next_step()) is not None:
        steps.append(step)
    loader.close()
    assert seen.batches == len(steps)
    assert [" + ".join(d.name for d in row.documents) for row in seen.rows] == [ref for step in steps for ref in step.refs]
    for shown, batch in zip(seen.shown, (batch for step in steps for batch in step.micro)):
        assert all(torch.equal(shown[key], value) for key, value in batch.items())


def test_left_out(tmp_path: Path) -> None:
    source = text(tmp_path, [5, 40, 6, 7])
    path = tmp_path / "text.jsonl"
    path.write_text(path.read_text() + '{"txt": "<oops>"}\n')
    dataset = Dataset(source, Tokenize(vocab_size=257), FitPack(20, buffer=2, too_long="drop"), shuffle=False)
    seen = inspect_training(dataset, 4, seed=0, global_batch=1, micro_batch=1, most_bad=5)
    assert {entry["sample"] for entry in seen.left_out} == {"text.jsonl#2", "text.jsonl#5"}
    assert re.fullmatch(r"\d+ bad samples, \d+ too long", seen.facts()["left out"])
    content = page(seen, "left out")
    assert "it has 40 tokens, more than a row&#x27;s 20" in content and "no field &#x27;text&#x27;" in content


def test_pictures_are_those_of_the_samples() -> None:
    """The PNGs of the page, decoded, are the shipped ones; with the classes under them."""
    source = WebDataset("shipped:fashion_mnist.tar.gz", {"split": "heldout"})
    seen = inspect_evaluation(Dataset(source, ClassImage(28, channels=1), Stack()), 2, batch=5)
    content = page(seen, "images")
    pictures = re.findall(r"base64,([^']+)'.*?<b>(\d)</b>", content)
    assert len(pictures) == 10
    for index, (png, label) in enumerate(pictures):
        sample = source.read(index)
        shown, original = (np.asarray(Image.open(io.BytesIO(data))) for data in (base64.b64decode(png), sample["png"]))
        np.testing.assert_array_equal(shown, original)
        assert label == sample["cls"].decode()
    assert "<code>image_label</code>" in content and "src='http" not in content and "<script" not in content


class Clips:
    """A source and processor of videos of 20 frames."""

    path = "clips"
    unit = "videos"

    def __len__(self) -> int:
        return 5

    def read(self, index: int) -> int:
        return index

    def reference(self, index: int) -> str:
        return f"clips#{index}"

    def keys(self) -> dict[str, KeySpec]:
        return {"video": KeySpec(torch.float32, (20, 3, 8, 12)), "latent": KeySpec(torch.float32, (4, 6, 6))}

    def check(self) -> None: ...

    def __call__(self, sample: Any, visit: Any) -> dict[str, np.ndarray]:
        frames = np.linspace(-1, 1, 20, dtype=np.float32).reshape(20, 1, 1, 1)
        return {"video": np.broadcast_to(frames, (20, 3, 8, 12)).copy(), "latent": np.ones((4, 6, 6), np.float32)}


def test_videos_are_strips() -> None:
    content = page(inspect_evaluation(Dataset(Clips(), Clips(), Stack()), 1, batch=2), "clips")
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(re.findall(r"base64,([^']+)'", content)[0]))))
    assert strip.shape == (8, 16 * 12 + 15 * 2, 3)  # 16 of the 20 frames, with gaps
    levels = strip[0, 6::14, 0].astype(int)
    assert levels[0] == 0 and levels[-1] == 255 and (np.diff(levels) > 0).all()
    assert "video: 20 x 3 x 8 x 12" in content and "Channels 0 to 2 of 4" in content


def test_show_names_special_tokens(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<|endoftext|>": 2}, unk_token="a"))
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = TextTokenizer(str(tmp_path / "tokenizer.json"), 3)
    assert "<|endoftext|>" in tokenizer.show([0, 1, 2]) and "<|endoftext|>" not in tokenizer.decode([0, 1, 2])
    assert TextTokenizer("bytes", 257).show([104, 105, 256, 33]) == "hi<end>!"


def test_no_data(tmp_path: Path) -> None:
    dataset = Dataset(text(tmp_path, [5]), Tokenize(vocab_size=257), OnePerRow(8))
    with pytest.raises(UserError, match="fewer than the 2 lanes"):
        inspect_training(dataset, 2, seed=0, global_batch=2, micro_batch=2, epochs=1)
    with pytest.raises(UserError, match="--batches is 0"):
        inspect_evaluation(dataset, 0, batch=1)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "run")
    import inspect_data

    config = ["--config", str(ROOT / "configs/experiment/llm.yaml"), f"run.dir={tmp_path}"]
    assert inspect_data.main([*config, "--batches", "2", "--set", "heldout", "sequence=128"]) == 0
    said = capsys.readouterr().out
    assert "efficiency" in said and f"{tmp_path}/llm_heldout.html" in said
    assert "[B, 128]" in (tmp_path / "llm_heldout.html").read_text()
    assert inspect_data.main([*config, "--set", "helout"]) == 1
    assert "Did you mean 'heldout'?" in capsys.readouterr().err
