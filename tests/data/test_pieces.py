"""Sources, processors, packers and Dataset, one at a time."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from l3m_like.core.errors import UserError
from l3m_like.core.keys import KeySpec
from l3m_like.data import ClassImage, ConcatPack, DataMissing, Dataset, JsonLines, Loader, Stack, Tokenize, Visit, WebDataset
from l3m_like.data.dataset import Item
from l3m_like.data.packing import FitPack, Piece
from l3m_like.data.paths import expand_braces, resolve

VISIT = Visit("x#1", 0, 0)


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for key, members in samples.items():
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    path.write_bytes(gzip.compress(out.getvalue()) if path.suffix == ".gz" else out.getvalue())


def picture(array: np.ndarray, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, kind)
    return out.getvalue()


# ---- paths -------------------------------------------------------------------------------------------------------------


def test_braces_and_globs(tmp_path: Path) -> None:
    assert expand_braces("a{08..10}{x,y}") == ["a08x", "a08y", "a09x", "a09y", "a10x", "a10y"]
    assert expand_braces("{9..11}") == ["9", "10", "11"]
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_text("{}\n")
    assert [path.name for path in resolve(f"{tmp_path}/*.jsonl")] == ["a.jsonl", "b.jsonl"]
    assert [path.name for path in resolve(f"{tmp_path}/{{b,a}}.jsonl")] == ["b.jsonl", "a.jsonl"]


@pytest.mark.parametrize("make", [JsonLines, WebDataset])
def test_missing_files(make: type, tmp_path: Path) -> None:
    source = make(f"{tmp_path}/absent-{{0..1}}.x")  # the constructor reads nothing
    with pytest.raises(DataMissing, match="absent-0.x") as error:
        len(source)
    assert error.value.path == source.path
    with pytest.raises(DataMissing, match="Did you mean 'shakespeare.jsonl'"):
        len(make("shipped:shakespear.jsonl"))


# ---- sources -----------------------------------------------------------------------------------------------------------


def test_json_lines(tmp_path: Path) -> None:
    for name, numbers in (("a", range(3)), ("b", range(3, 5))):
        lines = [json.dumps({"n": n, "odd": n % 2 == 1, "text": "é" * n}, ensure_ascii=False) for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n\n".join(lines), encoding="utf-8")  # blank lines, none at the end
    source = JsonLines(f"{tmp_path}/{{a,b}}.jsonl", {"odd": True})
    assert [source.read(index)["n"] for index in range(len(source))] == [1, 3]
    assert [source.reference(index) for index in range(len(source))] == ["a.jsonl#3", "b.jsonl#1"]
    assert [JsonLines(f"{tmp_path}/*.jsonl").read(index)["n"] for index in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match=r"no field 'od'. Did you mean 'odd'"):
        len(JsonLines(f"{tmp_path}/a.jsonl", {"od": True}))
    with pytest.raises(UserError, match=r"selects no record.*n is one of \['0', '1', '2'\]"):
        len(JsonLines(f"{tmp_path}/a.jsonl", {"n": 7}))


def test_bad_json_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match="line 2: not JSON"):
        len(JsonLines(str(path), {"text": "a"}))
    dataset = Dataset(JsonLines(str(path)), Tokenize("bytes", vocab_size=257), ConcatPack(8))
    with pytest.raises(UserError, match=r"^a.jsonl#2: JSONDecodeError"):
        dataset.item(1)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_web_dataset(tmp_path: Path, suffix: str) -> None:
    write_tar(tmp_path / f"s-0{suffix}", {"train/a.b/1": {"png": b"one", "cls": b"1"}, "heldout/2": {"png": b"two", "cls": b"2"}})
    write_tar(tmp_path / f"s-1{suffix}", {"train/1": {"seg.PNG": b"three", "cls": b"3"}})
    source = WebDataset(f"{tmp_path}/s-{{0..1}}{suffix}", {"split": "train"})
    assert [source.read(index) for index in range(len(source))] == [
        {"png": b"one", "cls": b"1"},
        {"seg.png": b"three", "cls": b"3"},
    ]
    assert [source.reference(index) for index in range(2)] == [f"s-0{suffix}#train/a.b/1", f"s-1{suffix}#train/1"]
    with pytest.raises(UserError, match="'hold'.*Available: heldout, train|Did you mean 'heldout'"):
        len(WebDataset(f"{tmp_path}/s-0{suffix}", {"split": "hold"}))


def test_web_dataset_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'splt'"):
        WebDataset("x.tar", {"splt": "train"})
    (tmp_path / "bad.tar").write_bytes(b"not a tar" * 200)
    with pytest.raises(UserError, match="bad.tar is not a readable tar"):
        len(WebDataset(f"{tmp_path}/bad.tar"))


def test_equal_file_names_keep_apart(tmp_path: Path) -> None:
    for folder in ("en", "de"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_text('{"text": "a"}\n')
    source = JsonLines(f"{tmp_path}/*/x.jsonl")
    assert [source.reference(index) for index in range(len(source))] == ["de/x.jsonl#1", "en/x.jsonl#1"]


# ---- processors --------------------------------------------------------------------------------------------------------


def test_bytes_round_trip() -> None:
    tokenize = Tokenize("bytes", vocab_size=257)
    ids = tokenize({"text": "Zoë, 1599"}, VISIT)["ids"]
    assert ids.dtype == np.int64 and ids[-1] == tokenize.end_id == 256 and ids[:-1].tolist() == list("Zoë, 1599".encode())
    assert tokenize.decode(ids) == "Zoë, 1599" and tokenize.encode("A") == [65]


def test_tokenize_errors() -> None:
    with pytest.raises(UserError, match="vocab_size is 300, but tokenizer 'bytes' has 257"):
        Tokenize("bytes", vocab_size=300)
    with pytest.raises(UserError, match="no field 'txt'.*Did you mean 'text'"):
        Tokenize("bytes", vocab_size=257, field="txt")({"text": "a"}, VISIT)
    with pytest.raises(UserError, match="field 'text' is int"):
        Tokenize("bytes", vocab_size=257)({"text": 5}, VISIT)


def test_tokenizer_file(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<|endoftext|>": 0, "to": 1, "be": 2, "or": 3, "not": 4, "<unk>": 5}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = str(tmp_path / "tokenizer.json")
    made.save(path)
    tokenize = Tokenize(path, vocab_size=8)
    assert tokenize({"text": "to be or not to be"}, VISIT)["ids"].tolist() == [1, 2, 3, 4, 1, 2, 0]
    with pytest.raises(UserError, match=r"vocab_size is 5, but tokenizer .*tokenizer.json' has 6 tokens"):
        Tokenize(path, vocab_size=5).check()
    with pytest.raises(UserError, match=rf"tokenizer: '{tmp_path}' is a folder. Name the file in it: {path}"):
        Tokenize(str(tmp_path), vocab_size=8).check()
    with pytest.raises(UserError, match=r"none of the tokens \['<end>'\]"):
        Tokenize(path, vocab_size=8, end="<end>").check()
    with pytest.raises(DataMissing, match="absent.json"):
        Tokenize(str(tmp_path / "absent.json"), vocab_size=8).check()


def test_class_image_values_and_resize() -> None:
    grey = np.zeros((4, 8), dtype=np.uint8)
    grey[:, 4:] = 255
    made = ClassImage(4, channels=1)({"png": picture(grey), "cls": b"7"}, VISIT)
    assert made["image"].shape == (1, 4, 4) and made["image"].dtype == np.float32 and int(made["image_label"]) == 7
    assert made["image"][0, 0].tolist() == [-1, -1, 1, 1]  # the middle square, not squeezed
    exact = ClassImage(4, channels=3)({"png": picture(np.full((4, 4, 3), (0, 51, 255), np.uint8)), "cls": b"0"}, VISIT)
    assert np.allclose(exact["image"][:, 0, 0], [-1, -0.6, 1], atol=1e-6)
    jpeg = ClassImage(16, channels=3)({"jpg": picture(np.full((32, 32, 3), 128, np.uint8), "JPEG"), "cls": b"0"}, VISIT)
    assert jpeg["image"].shape == (3, 16, 16) and np.abs(jpeg["image"]).max() < 0.05
    with pytest.raises(UserError, match=r"has \['cls'\]"):
        ClassImage(4)({"cls": b"0"}, VISIT)
    with pytest.raises(UserError, match="channels is 2"):
        ClassImage(4, channels=2)


def test_flips_depend_on_seed_sample_and_epoch_alone() -> None:
    def flips(workers: int, seed: int = 3) -> dict[tuple[int, str], bool]:
        source = WebDataset("shipped:fashion_mnist.tar.gz", {"split": "heldout"})
        dataset = Dataset(source, ClassImage(28, 1, flip=True), Stack())
        plain = Dataset(source, ClassImage(28, 1), Stack())
        index_of = {source.reference(index): index for index in range(len(source))}
        loader = Loader(dataset, seed=seed, global_batch=250, micro_batch=250, workers=workers)
        seen = {}
        for number in range(5):  # the fifth step is of the second epoch
            step = loader.next_step()
            for image, reference in zip(step.micro[0]["image"][::5], step.refs[::5], strict=True):
                original = torch.from_numpy(plain.item(index_of[reference]).data["image"])
                flipped = not torch.equal(image, original)
                assert torch.equal(image, original.flip(-1)) or not flipped
                seen[number // 4, reference] = flipped
        loader.close()
        return seen

    inline = flips(0)
    assert inline == flips(3)
    assert 0.4 < np.mean(list(inline.values())) < 0.6
    draws = {(e, s): Visit("a#1", e, s).uniform("flip") for e in range(30) for s in range(30)}
    assert len(set(draws.values())) == 900 and 0.45 < np.mean(list(draws.values())) < 0.55


# ---- dataset -----------------------------------------------------------------------------------------------------------


def test_keys_without_data() -> None:
    dataset = Dataset(JsonLines("/nowhere.jsonl"), Tokenize("bytes", vocab_size=257), ConcatPack(64, max_documents=5))
    keys = dataset.keys()
    assert keys["text_ids"].shape(B=3) == (3, 64) and keys["text_ids"].sequence_dim == 1 and keys["row"].dims == ("B",)
    assert keys["text_cu_seqlens"].dims == ("D",) and keys["text_cu_seqlens"].shape(B=3) == (19,)
    with pytest.raises(DataMissing, match="/nowhere.jsonl"):
        dataset.check()
    images = Dataset(WebDataset("/nowhere.tar"), ClassImage(8, 3), Stack())
    assert images.keys()["image"].shape(B=2) == (2, 3, 8, 8) and images.keys()["image_label"].dtype == torch.int64


def test_parts_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="ConcatPack packs token ids"):
        Dataset(WebDataset("x.tar"), ClassImage(8), ConcatPack(8))
    with pytest.raises(UserError, match="Stack needs samples of one size"):
        Dataset(JsonLines("x.jsonl"), Tokenize("bytes", vocab_size=257), Stack())


def test_check_finds_a_false_declaration() -> None:
    class Lies(ClassImage):
        def __call__(self, sample: dict, visit: Visit) -> dict[str, np.ndarray]:
            return super().__call__(sample, visit) | {"image_label": np.array(0.5)}

    with pytest.raises(UserError, match="'image_label' is .*float64.*int64.*is declared"):
        Dataset(WebDataset("shipped:fashion_mnist.tar.gz"), Lies(28, 1), Stack()).check()


def test_documents_that_are_not_kept_apart() -> None:
    """``separate: false``: no key says where documents begin, positions run over the row; ids and targets are the same."""
    apart, together = (FitPack(8, buffer=4, separate=separate) for separate in (True, False))
    item = Item("s#0", {"ids": np.arange(3)})
    rows = [[Piece(item, 0, 3), Piece(item, 0, 3)], [Piece(item, 0, 2)], []]
    one, other = apart.collate(rows), together.collate(rows)
    assert (
        sorted(other)
        == ["text_ids", "text_positions", "text_targets"]
        == sorted(together.keys({"ids": KeySpec(torch.int64, ("n",), 0, "")}))
    )
    assert torch.equal(one["text_ids"], other["text_ids"]) and torch.equal(one["text_targets"], other["text_targets"])
    assert one["text_positions"][0].tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    assert other["text_positions"][0].tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    assert apart.units(one) == together.units(other) == 8
