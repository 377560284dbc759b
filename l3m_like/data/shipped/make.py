"""Make the shipped data from its two origins; the output depends on nothing but them (README.md beside this file).

    python l3m_like/data/shipped/make.py FASHION_MNIST_FOLDER SHAKESPEARE_FOLDER [--out FOLDER]

FASHION_MNIST_FOLDER holds the four ``*-ubyte.gz`` files, SHAKESPEARE_FOLDER the ``*_gut.txt`` files; both are searched
below the folder that is given.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

TRAIN_PER_CLASS = 900
HELDOUT_PER_CLASS = 100

#: {file: title}, in the order of the shipped file
WORKS = {
    "romeo_and_juliet": "Romeo and Juliet",
    "hamlet": "Hamlet",
    "macbeth": "Macbeth",
    "midsummer_nights_dream": "A Midsummer Night's Dream",
    "julius_caesar": "Julius Caesar",
    "tempest": "The Tempest",
    "as_you_like_it": "As You Like It",
    "merchant_of_venice": "The Merchant of Venice",
    "sonnets": "The Sonnets",
}
DOCUMENT_BYTES = 2500  # a document is closed at the paragraph that brings it above this
SHORTEST_BYTES = 900  # a shorter rest of a scene joins the document before it
HELDOUT_SCENE_EVERY = 20  # of the scenes of all works, numbered from 0, every 20th is held out, whole
SONNETS_PER_SCENE = 3
DIALOGUE_SPEECHES = 4  # at most, of two speakers by turns; an even number, so that the second has the last word
SPEECH_BYTES = 110  # a longer speech ends a dialogue


# ---- images ------------------------------------------------------------------------------------------------------------


def read_idx(path: Path) -> np.ndarray:
    """An idx file of uint8: the last byte of the magic number is the number of dimensions."""
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = np.frombuffer(raw, ">u4", count=dims, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def first_of_each_class(labels: np.ndarray, number: int) -> np.ndarray:
    """Indices of the first ``number`` of each class, in file order."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:number] for label in range(10)]))


def png(image: np.ndarray) -> bytes:
    # stored, not deflated: the gzip around the tar then compresses across images, which is 10 % smaller in all
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG", compress_level=0)
    return out.getvalue()


def make_images(source: Path, out: Path) -> None:
    tar_bytes = io.BytesIO()
    with tarfile.open(fileobj=tar_bytes, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for split, stem, number in (("train", "train", TRAIN_PER_CLASS), ("heldout", "t10k", HELDOUT_PER_CLASS)):
            images = read_idx(find(source, f"{stem}-images-idx3-ubyte.gz"))
            labels = read_idx(find(source, f"{stem}-labels-idx1-ubyte.gz"))
            for index in first_of_each_class(labels, number):
                for extension, content in (("png", png(images[index])), ("cls", str(labels[index]).encode())):
                    member = tarfile.TarInfo(f"{split}/{index:05d}.{extension}")  # the number in the original file
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    out.write_bytes(gzip.compress(tar_bytes.getvalue(), compresslevel=9, mtime=0))


# ---- text --------------------------------------------------------------------------------------------------------------

ACT = re.compile(r"^act\s+(\w+)\b", re.IGNORECASE)
SCENE = re.compile(r"^scene\s+([ivx]+|\d+)\b", re.IGNORECASE)
SONNET = re.compile(r"^[IVXLC]+$")
SPEAKER = re.compile(r"^[A-Z0-9][A-Za-z0-9 .,']{1,30}$")
LICENCE = re.compile(r"gutenberg|etext|copyright", re.IGNORECASE)


def paragraphs(text: str) -> list[list[str]]:
    text = "\n".join(line.rstrip() for line in text.splitlines())
    return [block.split("\n") for block in re.split(r"\n{2,}", text.strip("\n"))]


def scenes_of_play(text: str) -> Iterator[tuple[str, list[str]]]:
    """``(act and scene, paragraphs)``; the list of persons in front of the first act is left out."""
    blocks = paragraphs(text)
    heads = collections.Counter(block[0].rstrip(" .") for block in blocks if len(block) > 1)
    act, name = "", ""
    body: list[str] = []
    for block in blocks:
        if LICENCE.search(block[0]) or block == ["THE END"]:
            continue
        act_here, scene_here = ACT.match(block[0]), SCENE.match(block[0])
        if act_here or (scene_here and act):
            if body and name:
                yield name, body
                body = []
            if act_here:
                act, name = act_here[1].upper(), ""
                scene_here = next(filter(None, map(SCENE.match, block[1:])), None)  # "ACT 1\nSCENE 1"
            if scene_here:
                name = f"Act {act}, Scene {scene_here[1].upper()}"
        if act:
            body.append(speaker_line(block, heads))
    yield name, body


def speaker_line(block: list[str], heads: collections.Counter[str]) -> str:
    """The paragraph, its speaker written ``NAME:`` in every work (the originals write ``Name.``, ``NAME.`` and ``NAME``)."""
    name = block[0].rstrip(" .")
    is_speaker = len(block) > 1 and SPEAKER.match(block[0]) and (name.isupper() or heads[name] > 1)
    if not is_speaker or ACT.match(name) or SCENE.match(name):
        return "\n".join(block)
    return "\n".join([f"{' '.join(name.upper().split())}:", *block[1:]])


def scenes_of_sonnets(text: str) -> Iterator[tuple[str, list[str]]]:
    """Three sonnets make one scene."""
    poems: list[list[str]] = []
    for block in paragraphs(text):
        lines = "\n".join(block)
        if SONNET.match(block[0]):
            poems.append([lines])
        elif poems:
            poems[-1].append(lines)
    for start in range(0, len(poems), SONNETS_PER_SCENE):
        group = poems[start : start + SONNETS_PER_SCENE]
        names = [poem[0].split("\n")[0] for poem in group]
        yield f"{names[0]} to {names[-1]}" if len(names) > 1 else names[0], [part for poem in group for part in poem]


def documents(scene: list[str]) -> list[str]:
    """A scene cut between paragraphs into documents of about ``DOCUMENT_BYTES``."""
    parts: list[list[str]] = [[]]
    size = 0
    for paragraph in scene:
        if size > DOCUMENT_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(paragraph)
        size += len(paragraph) + 2
    if size < SHORTEST_BYTES and len(parts) > 1:
        parts[-2:] = [parts[-2] + parts[-1]]
    return ["\n\n".join(part) + "\n" for part in parts]


def make_text(source: Path, out: Path) -> None:
    number = 0
    with out.open("w", encoding="utf-8", newline="\n") as lines:
        for work, title in WORKS.items():
            text = find(source, f"{work}_gut.txt").read_text(encoding="utf-8")
            for name, scene in scenes_of_sonnets(text) if work == "sonnets" else scenes_of_play(text):
                split = "heldout" if number % HELDOUT_SCENE_EVERY == 0 else "train"
                for part, document in enumerate(documents(scene), start=1):
                    record = {"id": f"{work}/{number}/{part}", "split": split, "title": f"{title}, {name}", "text": document}
                    lines.write(json.dumps(record, ensure_ascii=False) + "\n")
                number += 1


def speeches(text: str) -> Iterator[tuple[str, str] | None]:
    """``(speaker, what he says in one line)`` of a document's paragraphs; None where no one speaks, or for too long."""
    for block in text.strip("\n").split("\n\n"):
        head, _, body = block.partition("\n")
        said = " ".join(re.sub(r"\[[^\]]*\]", "", body).split())
        spoken = head.endswith(":") and head.isupper() and said and len(said.encode()) <= SPEECH_BYTES and "[" not in said
        yield (head[:-1], said) if spoken else None


def dialogues(text: str) -> Iterator[tuple[str, list[str]]]:
    """``(who answers, speeches of two speakers by turns)``, an even number of them."""
    run: list[tuple[str, str]] = []
    for speech in [*speeches(text), None]:
        turn = run[len(run) % 2][0] if len(run) > 1 else None
        if speech is not None and (not run or speech[0] == turn or (len(run) == 1 and speech[0] != run[0][0])):
            run.append(speech)
            if len(run) < DIALOGUE_SPEECHES:
                continue
            speech = None
        if len(run) > 1:
            yield run[1][0], [said for _, said in run[: len(run) // 2 * 2]]
        run = [speech] if speech is not None else []


def make_dialogues(texts: Path, out: Path) -> None:
    """Conversations of the shipped plays, in the form of chats; the splits are those of the texts."""
    with out.open("w", encoding="utf-8", newline="\n") as lines:
        for line in texts.read_text(encoding="utf-8").splitlines():
            document = json.loads(line)
            for number, (name, said) in enumerate(dialogues(document["text"])):
                turns = [{"role": ("user", "assistant")[place % 2], "content": speech} for place, speech in enumerate(said)]
                messages = [{"role": "system", "content": f"You are {name.title()}."}, *turns]
                record = {"id": f"{document['id']}/{number}", "split": document["split"], "messages": messages}
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")


def find(folder: Path, name: str) -> Path:
    found = sorted(folder.rglob(name))
    if not found:
        raise SystemExit(f"{name} is not below {folder}")
    return found[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fashion_mnist", type=Path)
    parser.add_argument("shakespeare", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    make_images(arguments.fashion_mnist, arguments.out / "fashion_mnist.tar.gz")
    make_text(arguments.shakespeare, arguments.out / "shakespeare.jsonl")
    make_dialogues(arguments.out / "shakespeare.jsonl", arguments.out / "dialogues.jsonl")
