"""The shipped data is what its README says."""

from __future__ import annotations

import collections
import json

import pytest

from l3m_like.data import ClassImage, ConcatPack, Dataset, JsonLines, Stack, Tokenize, WebDataset
from l3m_like.data.paths import SHIPPED


def images(split: str | None) -> Dataset:
    where = {"split": split} if split else None
    return Dataset(WebDataset("shipped:fashion_mnist.tar.gz", where), ClassImage(28, 1), Stack())


def records(split: str) -> list[dict[str, str]]:
    source = JsonLines("shipped:shakespeare.jsonl", {"split": split})
    return [source.read(index) for index in range(len(source))]


def test_size() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir() if file.is_file()) < 6_000_000


@pytest.mark.parametrize(("split", "per_class"), [("train", 900), ("heldout", 100)])
def test_images_decode_and_classes_are_balanced(split: str, per_class: int) -> None:
    dataset = images(split)
    items = [dataset.item(index).data for index in range(len(dataset))]
    assert collections.Counter(int(item["image_label"]) for item in items) == dict.fromkeys(range(10), per_class)
    assert all(item["image"].shape == (1, 28, 28) and -1 <= item["image"].min() < item["image"].max() <= 1 for item in items)


def test_image_splits_are_disjoint() -> None:
    dataset = images(None)
    content: dict[str, set[bytes]] = {"train": set(), "heldout": set()}
    for index in range(len(dataset)):
        split = dataset.source.reference(index).split("#")[1].split("/")[0]
        content[split].add(dataset.source.read(index)["png"])
    assert len(content["train"]) > 8990 and len(content["heldout"]) == 1000  # the original has a few equal images
    assert not content["train"] & content["heldout"]


def test_text_splits() -> None:
    train, heldout = records("train"), records("heldout")
    scenes = [{record["id"].rpartition("/")[0] for record in part} for part in (train, heldout)]
    assert not scenes[0] & scenes[1]
    sizes = [sum(len(record["text"].encode()) for record in part) for part in (train, heldout)]
    assert 0.95e6 < sum(sizes) < 1.15e6 and 0.045 < sizes[1] / sum(sizes) < 0.055
    lines = [len(record["text"].encode()) for record in train + heldout]
    assert min(lines) > 300 and max(lines) < 6000
    text = json.dumps(train + heldout)
    assert "utenberg" not in text and "etext" not in text.lower() and "ROMEO:" in text
    lines_of = [{line for record in part for line in record["text"].split("\n") if len(line) > 40} for part in (train, heldout)]
    assert len(lines_of[0] & lines_of[1]) <= 5  # Shakespeare repeats himself


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_check_passes(split: str) -> None:
    assert images(split).check()["image"].shape == (1, 1, 28, 28)
    text = Dataset(JsonLines("shipped:shakespeare.jsonl", {"split": split}), Tokenize("bytes", vocab_size=257), ConcatPack(256))
    assert text.check()["text_ids"].shape == (1, 256)
