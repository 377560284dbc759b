"""Sources: what they read, how they name it, and what they say when the data is wrong."""

from __future__ import annotations

import base64
import gzip
import importlib.util
import io
import json
import os
import struct
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from l3m_like.core.errors import UserError
from l3m_like.data import (
    ChatJson,
    ClassImage,
    ConcatPack,
    Csv,
    DataMissing,
    Dataset,
    HFDataset,
    ImageFolder,
    JsonLines,
    JsonLinesStream,
    Megatron,
    MegatronWriter,
    ParquetStream,
    Stack,
    TokenIds,
    Tokenize,
    Visit,
    WebDataset,
    WebDatasetStream,
)
from l3m_like.data.dataset import given
from l3m_like.data.sources import web_dataset

VISIT = Visit("x#1", 0, 0)


def opened(stream: Any, shard: int, skip: int) -> Iterator[tuple[str, Any]]:
    """What a stream's shard gives, its records made."""
    return ((reference, given(raw)) for reference, raw in stream.open(shard, skip))



def picture(value: int, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(out, kind)
    return out.getvalue()


def samples(source: Any) -> list[Any]:
    return [source.read(index) for index in range(len(source))]


def references(source: Any) -> list[str]:
    return [source.reference(index) for index in range(len(source))]


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def tar_of(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


@pytest.mark.parametrize(
    "make",
    [
        lambda path: ImageFolder(f"{path}/absent"),
        lambda path: ChatJson(f"{path}/absent.json"),
        lambda path: Csv(f"{path}/absent.csv"),
        lambda path: HFDataset(f"{path}/absent"),
        lambda path: HFDataset(f"{path}/absent.parquet"),
        lambda path: Megatron(f"{path}/absent"),
    ],
)
def test_missing_data(make: Any, tmp_path: Path) -> None:
    source = make(tmp_path)  # the constructor reads nothing
    with pytest.raises(DataMissing, match=str(tmp_path / "absent")):
        len(source)


def test_reading_from_many_threads(tmp_path: Path) -> None:
    """Sources give the same to eight threads as to one."""
    write(tmp_path / "media/a.png", picture(3))
    lines = [json.dumps({"n": n, "image": "a.png", "messages": [{"role": "user", "content": f"<image>{n}"}]}) for n in range(200)]
    write(tmp_path / "a.jsonl", "\n".join(lines))
    write(tmp_path / "a.json.gz", gzip.compress(f"[{','.join(lines)}]".encode()))
    write(tmp_path / "a.csv", "n,word\n" + "".join(f'{n},"w\n{n}"\n' for n in range(200)))
    write(tmp_path / "a.tar", tar_of({f"{n}.cls": b"%d" % n for n in range(200)}))
    for n in range(200):
        write(tmp_path / f"images/{n % 7}/{n}.png", b"%d" % n)
    with MegatronWriter(f"{tmp_path}/a", 1000) as out:
        for n in range(200):
            out.add(np.full(n + 1, n))
    sources: list[Any] = [
        JsonLines(f"{tmp_path}/a.jsonl"),
        JsonLines(f"{tmp_path}/a.json.gz"),
        ChatJson(f"{tmp_path}/a.jsonl", data_folder=f"{tmp_path}/media"),
        Csv(f"{tmp_path}/a.csv"),
        WebDataset(f"{tmp_path}/a.tar"),
        ImageFolder(f"{tmp_path}/images"),
        Megatron(f"{tmp_path}/a"),
    ]
    if importlib.util.find_spec("datasets"):
        import pyarrow

        table = pyarrow.table({"n": list(range(200))})
        with pyarrow.ipc.new_stream(f"{tmp_path}/a.arrow", table.schema) as stream:
            stream.write_table(table)
        sources.append(HFDataset(f"{tmp_path}/a.arrow", where={"n": 7}))
        sources.append(HFDataset(f"{tmp_path}/a.arrow"))
    for source in sources:
        expected = [repr(sample) for sample in samples(source)]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda index, source=source: repr(source.read(index)), range(len(source)))) == expected
        assert len(source) in (1, 200) and len(set(references(source))) == len(set(expected)) == len(source)


# ---- ImageFolder -------------------------------------------------------------------------------------------------------


def test_image_folder(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    write(root / "train/dog/b.PNG", picture(255))
    write(root / "train/dog/a/z.jpeg", picture(0, "JPEG"))
    write(root / "train/cat/1.webp", picture(9, "WEBP"))
    write(root / "train/cat/notes.txt", "no image")
    write(root / "train/cat/.hidden.png", "no image")
    write(root / "train/.cache/x.png", "no class")
    write(root / "heldout/cat/2.jpg", picture(3, "JPEG"))
    source = ImageFolder(str(root), {"split": "train"})
    assert references(source) == ["pets/train/cat/1.webp", "pets/train/dog/a/z.jpeg", "pets/train/dog/b.PNG"]
    assert source.classes == ["cat", "dog"]
    assert source.read(2) == {"png": picture(255), "cls": b"1", "class_name": b"dog"}
    batch = Dataset(source, ClassImage(4, 1), Stack()).check()
    assert batch["image_label"].tolist() == [0] and batch["image"].shape == (1, 1, 4, 4)
    assert references(ImageFolder(str(root / "train"))) == ["train/cat/1.webp", "train/dog/a/z.jpeg", "train/dog/b.PNG"]


def test_image_folder_errors(tmp_path: Path) -> None:
    write(tmp_path / "train/cat/1.png", picture(1))
    with pytest.raises(UserError, match="no split 'trian'. Did you mean 'train'"):
        len(ImageFolder(str(tmp_path), {"split": "trian"}))
    with pytest.raises(UserError, match=r"are splits: \['train'\]. Set where: {split: train}"):
        len(ImageFolder(str(tmp_path)))
    with pytest.raises(UserError, match=r"cat has no class folders. It holds \['1.png'\]"):
        len(ImageFolder(str(tmp_path / "train" / "cat")))
    with pytest.raises(UserError, match="not by 'splt'"):
        ImageFolder(str(tmp_path), {"splt": "train"})
    (tmp_path / "train/dog").mkdir()
    with pytest.raises(UserError, match="train/dog holds no image"):
        len(ImageFolder(str(tmp_path), {"split": "train"}))


# ---- JsonLines ---------------------------------------------------------------------------------------------------------

RECORDS = [{"n": 0, "text": "é [,] }"}, {"n": 1, "text": 'a "quote"\n'}, {"n": 2, "text": "日本"}]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".jsonl", ".jsonl.gz"])
def test_json_kinds(tmp_path: Path, suffix: str, indent: int | None) -> None:
    if suffix.startswith(".jsonl"):
        text = "\n".join(json.dumps(record, ensure_ascii=indent is None) for record in RECORDS)
    else:
        text = "\ufeff \n" + json.dumps(RECORDS, ensure_ascii=indent is None, indent=indent) + "\n"
    content = text.encode()
    write(tmp_path / f"a{suffix}", gzip.compress(content) if suffix.endswith(".gz") else content)
    source = JsonLines(f"{tmp_path}/a{suffix}")
    assert samples(source) == RECORDS and references(source) == [f"a{suffix}#{number}" for number in (1, 2, 3)]
    assert samples(JsonLines(f"{tmp_path}/a{suffix}", {"n": 2})) == RECORDS[2:]


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a":', '[{"a": 1} {"a": 2}]', '[{"a": 1}, ]', '[{"a": 1}'])
def test_damaged_array(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="a.json, record 2: not JSON"):
        len(JsonLines(str(write(tmp_path / "a.json", text))))


def test_json_that_holds_nothing(tmp_path: Path) -> None:
    for text in ("", "[]", "\n\n"):
        with pytest.raises(UserError, match="a.json is empty"):
            len(JsonLines(str(write(tmp_path / "a.json", text))))
    cut = gzip.compress(b'{"a": 1}\n' * 100)[:-12]
    with pytest.raises(UserError, match="a.jsonl.gz is not a readable gzip file"):
        len(JsonLines(str(write(tmp_path / "a.jsonl.gz", cut))))


def test_json_media_columns(tmp_path: Path) -> None:
    write(tmp_path / "media/x/1.PNG", picture(7))
    path = str(
        write(tmp_path / "a.jsonl", '{"image": "x/1.PNG", "caption": "seven", "kind": 7}\n{"image": "x/2.png", "caption": ""}')
    )
    source = JsonLines(path, columns={"media": "image", "txt": "caption"}, data_folder=f"{tmp_path}/media")
    assert source.read(0) == {"png": picture(7), "txt": "seven"} and len(source) == 2
    with pytest.raises(UserError, match="no media file .*media/x/2.png"):
        source.read(1)
    images = JsonLines(path, columns={"media": "image", "cls": "kind"}, data_folder=f"{tmp_path}/media")
    assert int(ClassImage(4, 1)(images.read(0), VISIT)["image_label"]) == 7
    with pytest.raises(UserError, match="no column 'captoin' .for 'txt'.. Did you mean 'caption'"):
        JsonLines(path, columns={"txt": "captoin"}).read(0)
    with pytest.raises(DataMissing, match="no folder at .*nowhere"):
        len(JsonLines(path, columns={"media": "image"}, data_folder=f"{tmp_path}/nowhere"))
    with pytest.raises(UserError, match="data_folder: .* has no meaning without columns.media"):
        JsonLines(path, data_folder="x")


def test_wrong_type_names_the_record(tmp_path: Path) -> None:
    source = JsonLines(str(write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": 5}\n')))
    dataset = Dataset(source, Tokenize("bytes", vocab_size=257), ConcatPack(8))
    with pytest.raises(UserError, match="^a.jsonl#2: field 'text' is int, not text"):
        dataset.item(1)


# ---- ChatJson ----------------------------------------------------------------------------------------------------------


def chat(tmp_path: Path, record: Any, **arguments: Any) -> Any:
    path = write(tmp_path / "chat.json", json.dumps([record]))
    source = ChatJson(str(path), data_folder=str(tmp_path / "media"), **arguments)
    assert len(source) == 1 and source.reference(0) == "chat.json#1"
    return source.read(0)["messages"]


@pytest.fixture
def media(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "c.mp4", "d.wav"):
        write(tmp_path / "media" / name, f"bytes of {name}")
    return tmp_path


def medium(kind: str, name: str) -> dict[str, Any]:
    return {"type": kind, "bytes": f"bytes of {name}".encode(), "name": name}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def test_chat_openai(media: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(b"inline").decode()
    content = [
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
        {"type": "image", "image": "b.png"},
        {"type": "image", "path": "file://" + str(media / "media/a.png")},
        {"type": "image_url", "image_url": url},
        {"type": "text", "text": "<image> is only text here"},
        {"type": "video", "video": "c.mp4"},
        {"type": "audio", "url": "d.wav"},
        {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"sound").decode(), "format": "wav"}},
    ]
    calls = [{"id": "1", "function": {"name": "f"}}]
    record = {
        "messages": [
            {"role": "system", "content": "Short."},
            {"role": "user", "content": content},
            {"role": "assistant", "content": None, "tool_calls": calls},
        ]
    }
    assert chat(media, record) == [
        {"role": "system", "content": [text("Short.")]},
        {
            "role": "user",
            "content": [
                medium("image", "a.png"),
                medium("image", "b.png"),
                medium("image", "a.png") | {"name": "file://" + str(media / "media/a.png")},
                {"type": "image", "bytes": b"inline", "name": "data:image/png;base64"},
                text("<image> is only text here"),
                medium("video", "c.mp4"),
                medium("audio", "d.wav"),
                {"type": "audio", "bytes": b"sound", "name": "data:audio/wav;base64"},
            ],
        },
        {"role": "assistant", "content": [], "tool_calls": calls},
    ]


def test_chat_share_gpt(media: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nfirst <image>second"}, {"from": "gpt", "value": "seen"}]
    assert chat(media, {"image": ["a.png", "b.png"], "conversations": turns}) == [
        {"role": "user", "content": [medium("image", "a.png"), text("\nfirst "), medium("image", "b.png"), text("second")]},
        {"role": "assistant", "content": [text("seen")]},
    ]
    listed = {"video": "c.mp4", "messages": [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "?"}]}]}
    assert chat(media, listed) == [{"role": "user", "content": [medium("video", "c.mp4"), text("?")]}]


def test_chat_prompt_and_response(media: Path) -> None:
    record = {"question": "<image>What?", "answer": "A b.", "image": "a.png"}
    assert chat(media, record, prompt="question", response="answer") == [
        {"role": "user", "content": [medium("image", "a.png"), text("What?")]},
        {"role": "assistant", "content": [text("A b.")]},
    ]
    with pytest.raises(UserError, match="no field 'anser' .response.. Did you mean 'answer'"):
        chat(media, record, prompt="question", response="anser")
    with pytest.raises(UserError, match="give both fields or neither"):
        ChatJson("x.json", prompt="question")
    with pytest.raises(DataMissing, match="no folder at .*nowhere"):
        len(ChatJson(f"{media}/chat.json", data_folder=f"{media}/nowhere"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, r"has \['text'\]; it needs 'messages' or 'conversations'"),
        ({"messages": "a"}, "'messages' is not a list of turns"),
        ({"messages": [{"content": "a"}]}, r"a turn has \['content'\]; it needs 'role'"),
        ({"messages": [{"role": "user", "content": 5}]}, "content of a turn is int"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "'text' has NoneType for its text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "imgae", "image": "a.png"}]}]},
            "type 'imgae'. Did you mean 'image'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "z.png"}]}]}, "no media file .*media/z.png"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "one more <image> than the record lists"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "https://a/b.png"}]}]}, "Download it"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "data:image/png;base64,?"}]}]},
            "cannot be decoded",
        ),
        ({"conversations": [{"from": "humn", "value": "a"}]}, "'humn', which is no known speaker. Did you mean 'human'"),
        ({"image": "a.png", "conversations": [{"from": "human", "value": "a"}]}, "lists 1 more image file.s. than its text"),
        ({"image": 5, "conversations": [{"from": "human", "value": "a"}]}, "field 'image' is not the path"),
        ("a", "the record is str"),
    ],
)
def test_chat_errors(media: Path, record: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        chat(media, record)


# ---- HFDataset ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    datasets = pytest.importorskip("datasets", exc_type=ImportError)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "outside.png", picture(2))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"]), "more": datasets.Value("string")}
    )
    images = [{"bytes": picture(0), "path": None}, {"bytes": picture(1), "path": "1.png"}, str(tmp_path / "outside.png")]
    return datasets.Dataset.from_dict({"image": images, "label": [1, 0, 1], "more": ["x", "y", "z"]}, features=features)


def test_hf_folder(pictures: Any, tmp_path: Path) -> None:
    pictures.save_to_disk(str(tmp_path / "saved"))
    source = HFDataset(str(tmp_path / "saved"), columns={"png": "image", "cls": "label"})
    assert samples(source) == [{"png": picture(n), "cls": label} for n, label in enumerate([b"1", b"0", b"1"])]
    assert references(source) == ["saved#0", "saved#1", "saved#2"]
    assert Dataset(source, ClassImage(4, 1), Stack()).check()["image_label"].tolist() == [1]
    for where in ({"label": "dog"}, {"label": 1}):
        dogs = HFDataset(str(tmp_path / "saved"), where=where)
        assert samples(dogs) == [{"image": picture(n), "label": 1, "more": "xyz"[n]} for n in (0, 2)]
        assert references(dogs) == ["saved#0", "saved#2"]


def test_hf_files(pictures: Any, tmp_path: Path) -> None:
    pictures.select([0, 1]).to_parquet(str(tmp_path / "p-0.parquet"))
    pictures.select([2]).to_parquet(str(tmp_path / "p-1.parquet"))
    source = HFDataset(f"{tmp_path}/p-{{0..1}}.parquet", columns={"png": "image", "txt": "more"}, where={"label": "dog"})
    assert samples(source) == [{"png": picture(0), "txt": "x"}, {"png": picture(2), "txt": "z"}]
    assert references(source) == ["p-{0..1}.parquet#0", "p-{0..1}.parquet#2"]
    pictures.save_to_disk(str(tmp_path / "saved"))
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    assert samples(HFDataset(str(arrow))) == samples(HFDataset(str(tmp_path / "saved")))


def test_hf_splits_and_errors(pictures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    path = str(tmp_path / "splits")
    datasets.DatasetDict({"train": pictures, "test": pictures.select([0])}).save_to_disk(path)
    source = HFDataset(path, "test", columns={"txt": "more"})
    assert samples(source) == [{"txt": "x"}] and references(source) == ["splits/test#0"]
    for arguments, message in [
        ({}, "no split 'None'. Available: test, train"),
        ({"split": "tset"}, "no split 'tset'. Did you mean 'test'"),
        ({"split": "train", "columns": {"png": "imgae"}}, "no column 'imgae' .for 'png'.. Did you mean 'image'"),
        ({"split": "train", "where": {"lable": 1}}, "no column 'lable'. Did you mean 'label'"),
        ({"split": "train", "where": {"label": "bird"}}, "no class 'bird'. Available: cat, dog"),
        ({"split": "train", "where": {"more": "q"}}, r"selects no row .* more is one of \['x', 'y', 'z'\]"),
    ]:
        with pytest.raises(UserError, match=message):
            len(HFDataset(path, **arguments))
    write(tmp_path / "bad.parquet", b"PAR1 no parquet")
    with pytest.raises(UserError, match="bad.parquet' cannot be read"):
        len(HFDataset(f"{tmp_path}/bad.parquet"))
    with pytest.raises(UserError, match="files have no splits"):
        len(HFDataset(f"{tmp_path}/bad.parquet", "train"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataMissing, match="'nobody/nothing' is not on this machine and cannot be downloaded"):
        len(HFDataset("nobody/nothing"))
    with pytest.raises(UserError, match="is a configuration on the hub"):
        HFDataset(f"{tmp_path}/bad.parquet", name="x")


# ---- Csv ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz"])
def test_csv(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "media/1.JPG", b"one")
    text = '\ufefffile,title,site\r\n1.JPG,"a, ""b""\r\nsecond line",x\r\n\r\n1.JPG,é,y'
    content = text.replace(",", "\t").replace("a\t", "a,").encode() if suffix == ".tsv" else text.encode()
    write(tmp_path / f"a{suffix}", gzip.compress(content) if suffix.endswith(".gz") else content)
    path = f"{tmp_path}/a{suffix}"
    captions = ['a, "b"\r\nsecond line', "é"]
    assert samples(Csv(path)) == [{"file": "1.JPG", "title": title, "site": "xy"[n]} for n, title in enumerate(captions)]
    source = Csv(path, {"media": "file", "txt": "title", "site": "site"}, str(tmp_path / "media"))
    assert samples(source) == [{"jpg": b"one", "txt": title, "site": "xy"[n]} for n, title in enumerate(captions)]
    assert references(source) == [f"a{suffix}#2", f"a{suffix}#5"]


def test_csv_without_header_and_errors(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.csv", "1;one\n2;two;more\n"))
    source = Csv(path, header=["n", "word"], delimiter=";")
    assert len(source) == 2 and source.read(0) == {"n": "1", "word": "one"} and source.reference(0) == "a.csv#1"
    with pytest.raises(UserError, match=r"3 values, but there are 2 columns: \['n', 'word'\]"):
        source.read(1)
    with pytest.raises(UserError, match="no column 'wrd' .for 'txt'.. Did you mean 'word'"):
        len(Csv(path, {"txt": "wrd"}, header=["n", "word"]))
    with pytest.raises(UserError, match="a.csv, line 2: unexpected end of data"):
        len(Csv(str(write(tmp_path / "a.csv", 'n,word\n1,"never closed\n2,two\n'))))
    with pytest.raises(UserError, match="a.csv holds no row"):
        len(Csv(str(write(tmp_path / "a.csv", "n,word\n"))))


# ---- Megatron ----------------------------------------------------------------------------------------------------------


def write_megatron(name: Path, sequences: list[list[int]], borders: list[int], code: int, dtype: str, gap: int = 0) -> None:
    """As Megatron-LM's IndexedDatasetBuilder writes it, byte by byte; ``gap``: unused bytes before each sequence."""
    data, offsets = b"", []
    for sequence in sequences:
        data += b"\xff" * gap
        offsets.append(len(data))
        data += np.array(sequence, dtype=dtype).tobytes()
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code) + struct.pack("<QQ", len(sequences), len(borders))
    index += struct.pack(f"<{len(sequences)}i", *map(len, sequences)) + struct.pack(f"<{len(sequences)}q", *offsets)
    write(name.with_suffix(".bin"), data)
    write(name.with_suffix(".idx"), index + struct.pack(f"<{len(borders)}q", *borders))


@pytest.mark.parametrize(
    ("code", "dtype"), [(1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")], ids=lambda value: str(value)
)
def test_megatron(tmp_path: Path, code: int, dtype: str) -> None:
    top = min(np.iinfo(dtype).max, 2**40)
    sequences = [[1, 2, 3], [4], [5, int(top)], [], [6]]
    write_megatron(tmp_path / "t", sequences, [0, 1, 3, 3, 4, 5], code, dtype, gap=np.dtype(dtype).itemsize)
    for path in ("t", "t.bin", "t.idx"):
        source = Megatron(str(tmp_path / path))
        assert [sample["ids"].tolist() for sample in samples(source)] == [[1, 2, 3], [4, 5, top], [6]]
        assert all(sample["ids"].dtype == np.int64 for sample in samples(source))
        assert source.lengths().tolist() == [3, 3, 1] and source.lengths().dtype == np.int64
        assert references(source) == ["t.bin#0", "t.bin#1", "t.bin#4"]  # 2 and 3 have no tokens


def test_megatron_split(tmp_path: Path) -> None:
    for name, documents in (("a", 103), ("b", 5)):
        with MegatronWriter(f"{tmp_path}/{name}", 300) as out:
            for number in range(documents):
                out.add([number])
    parts = {
        part: Megatron(f"{tmp_path}/{{a,b}}.bin", {"fractions": "90,8,2", "part": part}) for part in ("train", "valid", "test")
    }
    # round(103 * .9) = 93, round(103 * .98) = 101; round(5 * .9) = 4, round(5 * .98) = 5
    found = {part: [int(sample["ids"][0]) for sample in samples(source)] for part, source in parts.items()}
    assert found == {"train": [*range(93), *range(4)], "valid": [*range(93, 101), 4], "test": [101, 102]}
    assert [len(source.lengths()) for source in parts.values()] == [97, 9, 2]
    assert parts["valid"].reference(8) == "b.bin#4"
    with pytest.raises(UserError, match=r"no document in the split"):
        len(Megatron(f"{tmp_path}/b", {"fractions": "1,0,0", "part": "test"}))
    for split, message in [
        ({"part": "train"}, "it needs 'fractions'"),
        ({"fractions": "98,1,1", "part": "val"}, "there is no 'val'. Did you mean 'valid'"),
        ({"fractions": "a,b", "part": "train"}, "fractions is 'a,b'"),
        ({"fractions": "0,0", "part": "train"}, "fractions is '0,0'"),
    ]:
        with pytest.raises(UserError, match=message):
            Megatron("x", split)


def test_megatron_damaged(tmp_path: Path) -> None:
    name = tmp_path / "t"
    write_megatron(name, [[1, 2], [3]], [0, 1, 2], 7, "<f4")
    with pytest.raises(UserError, match="t.bin holds float32, but token ids are integers"):
        len(Megatron(str(name)))
    write_megatron(name, [[1, 2], [3]], [0, 1, 2], 9, "<i4")
    with pytest.raises(UserError, match="dtype code 9"):
        len(Megatron(str(name)))
    write_megatron(name, [[1, 2], [3]], [0, 1, 3], 4, "<i4")
    with pytest.raises(UserError, match="borders outside its 2 sequences"):
        len(Megatron(str(name)))
    write_megatron(name, [[1, 2], [3]], [0, 1, 2], 4, "<i4")
    write(tmp_path / "t.bin", (tmp_path / "t.bin").read_bytes()[:-1])
    with pytest.raises(UserError, match="t.bin has 11 bytes, but its index needs 12"):
        len(Megatron(str(name)))
    write(tmp_path / "t.idx", (tmp_path / "t.idx").read_bytes()[:-1])
    with pytest.raises(UserError, match="t.idx is too short for its 2 sequences"):
        len(Megatron(str(name)))
    for content in (b"", b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00" + bytes(99)):
        write(tmp_path / "t.idx", content)
        with pytest.raises(UserError, match="t.idx is not a Megatron index"):
            len(Megatron(str(name)))
    (tmp_path / "t.idx").unlink()
    with pytest.raises(DataMissing, match="t.idx"):
        len(Megatron(str(name)))


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(65499, 2), (65500, 4)])
def test_megatron_writer(tmp_path: Path, vocab_size: int, itemsize: int) -> None:
    path = tmp_path / "new" / "t"
    documents = [[1, 2, vocab_size - 1], [], [5]]
    with MegatronWriter(str(path), vocab_size) as out:
        for document in documents:
            out.add(np.array(document, dtype=np.int64))
    assert sorted(file.name for file in path.parent.iterdir()) == ["t.bin", "t.idx"]
    assert (tmp_path / "new/t.bin").stat().st_size == 4 * itemsize
    written = (tmp_path / "new/t.idx").read_bytes(), (tmp_path / "new/t.bin").read_bytes()
    write_megatron(tmp_path / "new/t", documents, [0, 1, 2, 3], {2: 8, 4: 4}[itemsize], {2: "<u2", 4: "<i4"}[itemsize])
    assert written == ((tmp_path / "new/t.idx").read_bytes(), (tmp_path / "new/t.bin").read_bytes())
    assert [sample["ids"].tolist() for sample in samples(Megatron(str(path)))] == [[1, 2, vocab_size - 1], [5]]


def test_megatron_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="document 1 has ids from 1 to 10, but vocab_size is 10"),
        MegatronWriter(f"{tmp_path}/t", 10) as out,
    ):
        out.add([1, 2])
        out.add([1, 10])
    assert not list(tmp_path.iterdir())
    with MegatronWriter(f"{tmp_path}/t", 10) as out:
        out.add([1])
        assert [file.suffix for file in tmp_path.iterdir()] == [".part"]  # a killed process leaves this alone
    with pytest.raises(UserError, match="document 0 is float64"), MegatronWriter(f"{tmp_path}/t", 10) as out:
        out.add([1.5])
    assert samples(Megatron(f"{tmp_path}/t"))[0]["ids"].tolist() == [1]  # the older files stay


def test_megatron_is_quick(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 50257, 5_000_000, dtype=np.uint16)
    with MegatronWriter(f"{tmp_path}/t", 50257) as out:
        for document in np.split(ids, 10_000):
            out.add(document)
    source = Megatron(f"{tmp_path}/t")
    order = np.random.default_rng(1).permutation(len(source))
    started = time.process_time()
    tokens = sum(len(source.read(int(index))["ids"]) for index in order)
    seconds = time.process_time() - started
    print(f"{tokens / seconds / 1e6:.1f} M tokens/s")
    assert tokens == 5_000_000 and tokens / seconds > 5e6
    assert (source.read(7)["ids"] == ids[3500:4000]).all()


def test_token_ids(tmp_path: Path) -> None:
    with MegatronWriter(f"{tmp_path}/t", 10) as out:
        out.add([1, 2, 3])
        out.add([4])
    dataset = Dataset(Megatron(f"{tmp_path}/t"), TokenIds(10, end=9), ConcatPack(8))
    assert dataset.check()["text_ids"].tolist() == [[1, 2, 3, 9, 4, 9, 0, 0]]
    plain = TokenIds(10)({"ids": np.array([1, 9], np.uint16)}, VISIT)["ids"]
    assert plain.tolist() == [1, 9] and plain.dtype == np.int64 and TokenIds(10).keys()["ids"].dtype == torch.int64
    for ids, message in [
        (np.array([1, 10]), "go from 1 to 10, but vocab_size is 10"),
        (np.array([-1]), "go from -1 to -1"),
        (np.array([1.0]), r"is float64 \[1\]"),
        (np.array([[1]]), r"is int64 \[1, 1\]"),
        (np.array([], np.int64), r"is int64 \[0\]"),
    ]:
        with pytest.raises(UserError, match=message):
            TokenIds(10)({"ids": ids}, VISIT)
    with pytest.raises(UserError, match="needs 'ids'. For text use Tokenize"):
        TokenIds(10)({"text": "a"}, VISIT)
    with pytest.raises(UserError, match="end is 10"):
        TokenIds(10, end=10)


# ---- WebDataset --------------------------------------------------------------------------------------------------------

#: five samples of two members, the second 3000 bytes long: 5 x (512 + 512 + 512 + 3072) bytes and the end mark
MEMBERS = {f"k/{n}.{ext}": content for n in range(5) for ext, content in (("cls", b"%d" % n), ("bin", bytes([n]) * 3000))}
SAMPLES = [{"cls": b"%d" % n, "bin": bytes([n]) * 3000} for n in range(5)]
SAMPLE_BYTES = 4608


@pytest.mark.parametrize("size", [2 * SAMPLE_BYTES, 2 * SAMPLE_BYTES + 100, 2 * SAMPLE_BYTES + 700, 3 * SAMPLE_BYTES - 512])
def test_tar_that_is_cut_off(tmp_path: Path, size: int) -> None:
    """At the border of two samples, in a header, in the first and in the second member's content."""
    path = str(write(tmp_path / "a.tar", tar_of(MEMBERS)[:size]))
    with pytest.raises(UserError, match="a.tar is not a readable tar: (it is cut off|unexpected end of data)"):
        len(WebDataset(path))
    stream, found = WebDatasetStream(path).open(0, 0), []
    with pytest.raises(UserError, match=r"^a.tar, sample [12]: .*a.tar cannot be read: "):
        found += [next(stream), next(stream), next(stream)]
    assert found == []  # the error came within three samples


def test_tar_that_is_empty(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.tar", b""))
    with pytest.raises(UserError, match="a.tar is not a readable tar"):
        len(WebDataset(path))
    with pytest.raises(UserError, match="^a.tar, sample 0: "):
        list(WebDatasetStream(path).open(0, 0))
    write(tmp_path / "a.tar", tar_of({}))
    with pytest.raises(UserError, match="holds no sample"):
        len(WebDataset(path))
    assert list(WebDatasetStream(path).open(0, 0)) == []
    write(tmp_path / "a.tar.gz", gzip.compress(tar_of(MEMBERS))[:-20])
    with pytest.raises(UserError, match="a.tar.gz is not a readable gzip file"):
        len(WebDataset(path + ".gz"))
    with pytest.raises(UserError, match="^a.tar.gz, sample [45]: "):
        list(WebDatasetStream(path + ".gz").open(0, 0))


def test_tar_that_shrinks_after_it_was_indexed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", tar_of(MEMBERS))
    source = WebDataset(str(path))
    assert samples(source) == SAMPLES
    write(path, path.read_bytes()[: 2 * SAMPLE_BYTES])
    with pytest.raises(UserError, match="a.tar has become shorter since it was indexed"):
        source.read(2)


def test_index_is_kept_beside_a_large_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, index = write(tmp_path / "a.tar", tar_of(MEMBERS)), tmp_path / "a.tar.index.json"
    assert samples(WebDataset(str(path))) == SAMPLES and not index.exists()  # a small tar is read again
    monkeypatch.setattr(web_dataset, "KEPT_MEMBERS", 9)
    assert samples(WebDataset(str(path))) == SAMPLES and index.exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tar", "a.tar.index.json"]

    scans = []
    scan = web_dataset._scan
    monkeypatch.setattr(web_dataset, "_scan", lambda stream, path: scans.append(path) or scan(stream, path))
    kept = WebDataset(str(path))
    assert samples(kept) == SAMPLES and references(kept) == [f"a.tar#k/{n}" for n in range(5)] and scans == []
    with pytest.raises(UserError, match="no sample .* has the split 'j'. Available: k"):
        len(WebDataset(str(path), {"split": "j"}))

    changed = {name: content[::-1] + b"!" for name, content in MEMBERS.items()}
    write(path, tar_of(changed))
    assert WebDataset(str(path)).read(3)["cls"] == b"3!" and len(scans) == 1
    times = path.stat()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))  # the same size
    assert WebDataset(str(path)).read(3)["cls"] == b"3!" and len(scans) == 2
    assert WebDataset(str(path)).read(3)["cls"] == b"3!" and len(scans) == 2
    index.write_text("{")
    assert WebDataset(str(path)).read(3)["cls"] == b"3!" and len(scans) == 3 and json.loads(index.read_text())["samples"]


def test_index_in_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.tar", tar_of(MEMBERS))
    monkeypatch.setattr(web_dataset, "KEPT_MEMBERS", 0)

    def refuse(self: Path, *_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_text", refuse)
    assert samples(WebDataset(str(path))) == SAMPLES and [file.name for file in tmp_path.iterdir()] == ["a.tar"]


# ---- streams -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_web_dataset_stream(tmp_path: Path, suffix: str) -> None:
    for name in ("b", "a"):
        write(tmp_path / f"{name}{suffix}", tar_of(MEMBERS) if suffix == ".tar" else gzip.compress(tar_of(MEMBERS)))
    stream = WebDatasetStream(f"{tmp_path}/{{b,a}}{suffix}")
    assert stream.shards() == [f"b{suffix}", f"a{suffix}"]
    for skip in range(7):
        assert list(stream.open(1, skip)) == [(f"a{suffix}#k/{n}", SAMPLES[n]) for n in range(skip, 5)]
    with pytest.raises(DataMissing, match="absent.tar"):
        WebDatasetStream(f"{tmp_path}/absent.tar").shards()


def test_keys_are_those_of_webdataset(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    members = {
        "a.b/1.seg.PNG": b"1",
        "a.b/1.cls": b"2",
        "README": b"no sample",
        "a.b/2.png": b"3",
        "a.b/2.seg.png": b"4",
        ".hidden.cls": b"no sample",
        "1.cls": b"5",
    }
    path = str(write(tmp_path / "a.tar", tar_of(members)))
    theirs = [
        ("a.tar#" + sample["__key__"], {name: content for name, content in sample.items() if not name.startswith("__")})
        for sample in webdataset.WebDataset(path, shardshuffle=False)
    ]
    source = WebDataset(path)
    assert list(zip(references(source), samples(source))) == list(WebDatasetStream(path).open(0, 0)) == theirs
    assert [name for name, _ in theirs] == ["a.tar#a.b/1", "a.tar#a.b/2", "a.tar#1"]
    write(tmp_path / "a.tar", tar_of({"./train/1.cls": b"1", "./train/._1.cls": b"no sample"}))  # as `tar -C folder .` names them
    assert references(WebDataset(path, {"split": "train"})) == ["a.tar#train/1"]


def test_streams_and_sources_agree() -> None:
    source, stream = WebDataset("shipped:fashion_mnist.tar.gz"), WebDatasetStream("shipped:fashion_mnist.tar.gz")
    streamed = list(opened(stream, 0, 9000))
    assert streamed == [(source.reference(index), source.read(index)) for index in range(9000, len(source))] and streamed
    text, lines = JsonLines("shipped:shakespeare.jsonl"), JsonLinesStream("shipped:shakespeare.jsonl")
    assert list(opened(lines, 0, 100)) == [(text.reference(index), text.read(index)) for index in range(100, len(text))]


def test_pipe(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path / f"t-{number}.tar.gz", gzip.compress(tar_of(MEMBERS)))
    stream = WebDatasetStream(f"pipe:gunzip < {tmp_path}/t-{{0..1}}.tar.gz | cat")
    assert stream.shards() == ["t-0.tar.gz", "t-1.tar.gz"]
    assert list(opened(stream, 1, 2)) == [(f"t-1.tar.gz#k/{n}", SAMPLES[n]) for n in (2, 3, 4)]
    early = opened(stream, 0, 0)
    assert next(early)[1] == SAMPLES[0]
    early.close()  # ends the command


def test_a_pipe_is_apart_from_the_terminal_and_ends_whole(tmp_path: Path) -> None:
    """Ctrl-C goes to the group of the run; a reader that stops early ends all that the shell started."""
    path = write(tmp_path / "t.tar", tar_of(MEMBERS))
    early = opened(WebDatasetStream(f"pipe:sleep 100 & echo $! > {tmp_path}/pid; cat {path}; wait"), 0, 0)
    next(early)
    pid = int((tmp_path / "pid").read_text())
    assert os.getpgid(pid) != os.getpgid(0)
    early.close()
    until = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("end", ["exit 0", "exit 3", "kill -9 $$"])
@pytest.mark.parametrize("size", [SAMPLE_BYTES * 3 + 100, SAMPLE_BYTES * 3, SAMPLE_BYTES * 3 + 2000])
def test_pipe_that_dies_once(tmp_path: Path, size: int, end: str) -> None:
    path = write(tmp_path / "t.tar", tar_of(MEMBERS))
    once = f"if [ -e {tmp_path}/died ]; then cat {path}; else touch {tmp_path}/died; head -c {size} {path}; {end}; fi"
    stream = WebDatasetStream(f"pipe:{once}", retries=1, backoff=0.0)
    assert list(opened(stream, 0, 1)) == [(f"t.tar#k/{n}", SAMPLES[n]) for n in range(1, 5)]
    assert (tmp_path / "died").exists()


def test_pipe_that_fails_after_the_last_sample(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tar", tar_of(MEMBERS))
    stream, found = WebDatasetStream(f"pipe:cat {path}; exit 7", retries=2, backoff=0.0).open(0, 0), []
    with pytest.raises(UserError, match=r"^t.tar, sample 5: pipe:cat .* 2 retries in a row: the command ended with status 7"):
        for sample in stream:
            found.append(sample[1])
    assert found == SAMPLES


@pytest.mark.parametrize(("end", "said"), [("exit 3", "the command ended with status 3"), ("exit 0", "it is cut off or damaged")])
def test_pipe_that_always_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, said: str) -> None:
    path = write(tmp_path / "t.tar", tar_of(MEMBERS))
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    command = f"pipe:echo >> {tmp_path}/starts; head -c {SAMPLE_BYTES * 3 + 100} {path}; {end}"
    stream, found = WebDatasetStream(command, retries=3, backoff=0.5).open(0, 0), []
    with pytest.raises(UserError, match=rf"^t.tar, sample 2: pipe:.*cannot be read, 3 retries in a row: {said}"):
        for _, sample in stream:
            found.append(sample)
    assert found == SAMPLES[:2]  # the third is complete only when the next is seen
    assert waits == [0.5, 1.0, 2.0] and (tmp_path / "starts").read_text() == "\n" * 4


def test_http(tmp_path: Path) -> None:
    """A server that breaks the first two answers off, each further on, and knows no other file."""
    content, cuts, asked = tar_of(MEMBERS), [SAMPLE_BYTES * 2 + 10, SAMPLE_BYTES * 4], []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if "t-0.tar" not in self.path:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: cuts.pop(0)] if cuts else content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
    stream = WebDatasetStream(f"http://127.0.0.1:{server.server_port}/t-{{0..1}}.tar?key=1", retries=1, backoff=0.0)
    assert stream.shards() == ["t-0.tar", "t-1.tar"]
    assert list(opened(stream, 0, 0)) == [(f"t-0.tar#k/{n}", SAMPLES[n]) for n in range(5)]  # one retry in a row, twice
    assert asked == ["/t-0.tar?key=1"] * 3
    with pytest.raises(DataMissing, match="t-1.tar.*404"):
        next(opened(stream, 1, 0))
    assert len(asked) == 4
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="^t-0.tar, sample 0: .*1 retries in a row"):
        next(opened(stream, 0, 0))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_json_lines_stream(tmp_path: Path, suffix: str) -> None:
    content = b"\n".join(b'{"n": %d}\n' % n for n in range(300))  # a blank line between two records
    if suffix.endswith(".zst"):
        content = pytest.importorskip("pyarrow").compress(content, codec="zstd", asbytes=True)
    path = write(tmp_path / f"a{suffix}", gzip.compress(content) if suffix.endswith(".gz") else content)
    stream = JsonLinesStream(str(path))
    assert stream.shards() == [f"a{suffix}"]
    for skip in (0, 1, 299, 300, 400):
        assert list(opened(stream, 0, skip)) == [(f"a{suffix}#{2 * n + 1}", {"n": n}) for n in range(skip, 300)]
    if suffix != ".jsonl":
        write(path, path.read_bytes()[:-9])
        with pytest.raises(UserError, match=r"a.jsonl.* after line \d+: .*Copy it again"):
            list(opened(stream, 0, 0))


def test_json_lines_stream_errors(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", '{"n": 1}\n{"n": \n5\n'))
    assert next(opened(JsonLinesStream(path), 0, 0)) == ("a.jsonl#1", {"n": 1})
    with pytest.raises(UserError, match="a.jsonl, line 2: not JSON"):
        next(opened(JsonLinesStream(path), 0, 1))
    with pytest.raises(UserError, match="a.jsonl, line 3: the record is int"):
        next(opened(JsonLinesStream(path), 0, 2))
    assert list(opened(JsonLinesStream(str(write(tmp_path / "b.jsonl", ""))), 0, 0)) == []


def test_parquet_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": b"%d" % n, "path": None} for n in range(1000)]
    table = pyarrow.table({"text": [f"t{n}" for n in range(1000)], "score": list(range(1000)), "image": images})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    stream = ParquetStream(f"{tmp_path}/a.parquet", {"text": "text", "cls": "score"})
    assert stream.shards() == ["a.parquet"]
    for skip in (0, 1, 299, 300, 301, 899, 999, 1000, 2000):
        expected = [(f"a.parquet#{n}", {"text": f"t{n}", "cls": b"%d" % n}) for n in range(skip, 1000)]
        assert list(opened(stream, 0, skip)) == expected
    whole = ParquetStream(f"{tmp_path}/a.parquet")
    assert next(opened(whole, 0, 700)) == ("a.parquet#700", {"text": "t700", "score": 700, "image": b"700"})
    with pytest.raises(UserError, match="no column 'txt' .for 'text'.. Did you mean 'text'"):
        next(opened(ParquetStream(f"{tmp_path}/a.parquet", {"text": "txt"}), 0, 0))

    groups: list[list[int]] = []
    iter_batches = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile,
        "iter_batches",
        lambda self, *args, **kwargs: groups.append(kwargs["row_groups"]) or iter_batches(self, *args, **kwargs),
    )
    for skip in (599, 600, 650):
        next(opened(stream, 0, skip))
    assert groups == [[1, 2, 3], [2, 3], [2, 3]]


def test_damaged_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [os.urandom(500).hex() for _ in range(1000)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=250, use_dictionary=False)
    content = (tmp_path / "a.parquet").read_bytes()
    for damaged in (b"", content[:100_000], b"no parquet" * 99):
        path = str(write(tmp_path / "b.parquet", damaged))
        with pytest.raises(UserError, match="^b.parquet, row 0: .*b.parquet is not readable parquet"):
            next(opened(ParquetStream(path), 0, 0))
    half = len(content) // 2
    path = str(write(tmp_path / "b.parquet", content[:half] + b"\xff" * 100_000 + content[half + 100_000 :]))
    found: list[str] = []
    with pytest.raises(UserError, match=r"^b.parquet, row (25\d|[34]\d\d|500): "):
        for _, sample in opened(ParquetStream(path), 0, 0):
            found.append(sample["text"])
    assert found == texts[: len(found)] and len(found) >= 250
