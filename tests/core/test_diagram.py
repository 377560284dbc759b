"""The diagram, and docs/keys.md, against the wiring that they describe."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from functools import cache
from pathlib import Path

import pytest

from l3m_like import blocks
from l3m_like.blocks.table import replaced, rows
from l3m_like.config import RunConfig
from l3m_like.core.diagram import Box, Diagram, Label, _lay_out, _width
from l3m_like.core.wiring import Trace
from l3m_like.training.train import plan

ROOT = Path(__file__).parents[2]


@cache
def trace(name: str) -> Trace:
    return plan(RunConfig.from_file(ROOT / "configs" / "experiment" / f"{name}.yaml"), 1).trace


def test_lanes_are_the_wiring() -> None:
    diagram = Diagram.of(trace("sit"))
    kinds = [column.kind for column in diagram.columns]
    assert kinds == ["Dataset", "FlowNoise", "DropLabel", "PatchEmbed", "TimeLabelEmbed", "DiT", "PatchDecode", "FlowMatching"]
    assert [column.training_only for column in diagram.columns] == [False, True, True, False, False, False, False, False]
    lanes = {lane.key: lane for lane in diagram.lanes}
    assert (lanes["row"].writer, lanes["row"].readers) == (0, (1, 2))
    assert (lanes["image_target"].writer, lanes["image_target"].readers) == (1, (7,))
    assert (lanes["image_condition"].writer, lanes["image_condition"].readers) == (4, (5, 6))
    assert re.fullmatch(r"\[\d+, 49, \d+\] f32", lanes["image_tokens"].shape)


def test_text() -> None:
    text = Diagram.of(trace("llm")).text()
    lines = {line.split()[0]: line for line in text.split("\n")}
    assert lines["text_targets"].endswith("●───────────▶───▶")
    assert lines["text_tokens"].rstrip().endswith("│   ●───▶   │   │")
    assert lines["row"].endswith("(not read)")
    assert max(map(len, text.split("\n"))) <= 100


def lanes_of(diagram: Diagram) -> list[str]:
    return [lane.key for lane in diagram.lanes]


@pytest.mark.parametrize("name", ["llm", "sit"])
def test_pictures(name: str, tmp_path: Path) -> None:
    diagram = Diagram.of(trace(name))
    svg = diagram.save(tmp_path / "d.svg").read_text(encoding="utf-8")
    words = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    for lane in diagram.lanes:
        assert lane.key in words and lane.shape in words
    drawn = (ROOT / "docs" / "images" / f"{name}.svg").read_text(encoding="utf-8")  # its numbers may be of another size
    assert all(f">{word}<" in drawn for word in [*lanes_of(diagram), *(column.kind for column in diagram.columns)]), "redraw it"
    from PIL import Image

    picture = _lay_out(diagram)
    with Image.open(diagram.save(tmp_path / "d.png")) as png:
        assert png.size == pytest.approx((2 * picture.width, 2 * picture.height), abs=2)


def test_nothing_overlaps() -> None:
    for name in ("llm", "sit"):
        picture = _lay_out(Diagram.of(trace(name)))
        cards = sorted((s for s in picture.shapes if isinstance(s, Box) and s.y == 54), key=lambda card: card.x)
        assert all(a.x + a.width + 10 < b.x for a, b in zip(cards, cards[1:], strict=False))
        assert cards[0].x > 0 and cards[-1].x + cards[-1].width < picture.width
        bars = [s for s in picture.shapes if isinstance(s, Box) and s.width == 12]
        for label in (s for s in picture.shapes if isinstance(s, Label) and s.mono):
            end = label.x + _width(label.text, label.size, mono=True)
            hit = [bar for bar in bars if label.x < bar.x < end and bar.y < label.y < bar.y + bar.height]
            assert not hit, f"{label.text} runs into a block"


# ---- docs/keys.md --------------------------------------------------------------------------------------------------


def documented() -> dict[str, tuple[str, list[str], list[str]]]:
    """``{key: (dtype, dimensions, further cells)}`` of docs/keys.md."""
    text = (ROOT / "docs" / "keys.md").read_text("utf-8")
    rows = re.findall(r"^\| (`[\w`, ]+`) \| (\w+) \| \[(.*?)\] \| (.*) \|$", text, re.MULTILINE)
    return {
        key: (dtype, [dim for dim in dims.split(", ") if dim], [c.strip() for c in rest.split(" | ")])
        for keys, dtype, dims, rest in rows
        for key in re.findall(r"\w+", keys)
        if not key.startswith(("_", "paired_", "teacher_"))
    }


#: experiments whose keys are all in the table
DOCUMENTED = ("llm", "sit", "deepseek", "dllm", "clip", "vit", "mae", "aimv2")
#: whose keys of streams of their own (`paired_...`, `teacher_...`) share a row, or are written inside a frozen part
OTHERS = ("block_diffusion", "distill", "rae", "dit_dh")
#: written at inference, by a teacher's `top_k`, by a source that only evaluations have, with statistics of latents
OPTIONAL = {"text_logits", "text_teacher_logprobs", "text_teacher_ids", "text_answer", "text_choice_bytes", "logit_bias"}
OPTIONAL |= {"image_normalized"}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_keys_are_the_declared_ones(name: str) -> None:
    table = documented()
    for key, spec in trace(name).wiring.provided.items():
        dtype, dims, (meaning,) = table[key]
        assert (dtype, len(dims), meaning) == (str(spec.dtype).removeprefix("torch."), len(spec.dims), spec.meaning), key
    for row in trace(name).rows:
        for key, (shape, dtype) in row.writes.items():
            said, dims, (writers, _) = table[key]
            assert row.block in writers.split(", ") and len(dims) == len(shape), key
            assert said == "compute" or said == str(dtype).removeprefix("torch."), key


def test_every_block_is_documented() -> None:
    text = (ROOT / "docs" / "keys.md").read_text("utf-8")
    assert replaced(text) == text, "docs/keys.md is out of date: python -m l3m_like.blocks.table"
    made = {name: (reads, writes) for name, _, reads, writes in rows()}
    assert set(made) == set(blocks.__all__) and all(what for _, what, _, _ in rows())
    built = blocks.LanguageModelHead(4, 2, writes=["nll"])
    assert re.findall(r"\w+", made["LanguageModelHead"][0]) == list(built.ports)


def test_no_key_is_documented_that_nothing_writes() -> None:
    written = set(OPTIONAL)
    for name in (*DOCUMENTED, *OTHERS):
        written |= set(trace(name).wiring.provided) | {key for row in trace(name).rows for key in row.writes}
    assert set(documented()) == {key for key in written if not key.startswith(("paired_", "teacher_"))}
