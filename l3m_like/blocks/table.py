"""Every block and its ports as a Markdown table, for docs/keys.md:  ``python -m l3m_like.blocks.table`` rewrites it there."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import l3m_like.blocks
from l3m_like.core.block import ReadWriteBlock

BEGIN, END = "<!-- blocks: begin (written by python -m l3m_like.blocks.table) -->", "<!-- blocks: end -->"


def rows() -> Iterator[tuple[str, str, str, str]]:
    """``(block, what it is, its read ports, its write ports)`` of each of ``l3m_like.blocks``; optional ones in brackets."""
    for name in sorted(l3m_like.blocks.__all__):
        block: type[ReadWriteBlock] = getattr(l3m_like.blocks, name)
        ports = {port: p.default is None for port, p in inspect.signature(block.compute).parameters.items()}
        reads = {port: optional for port, optional in ports.items() if port not in ("self", "outputs")}
        writes = dict.fromkeys(block.outputs, False) | dict.fromkeys(block.optional_outputs, True)
        written = _listed(writes)
        if block.inference_outputs is not None:
            written += f"; at inference {_listed(dict.fromkeys(block.inference_outputs, False))}"
        yield name, _first_sentence(block), _listed(reads), written


def _listed(ports: dict[str, bool]) -> str:
    always = [f"`{port}`" for port, optional in ports.items() if not optional]
    optional = [f"`{port}`" for port, optional in ports.items() if optional]
    return " ".join([*_joined(always), *(f"[{part}]" for part in _joined(optional))])


def _joined(parts: Sequence[str]) -> list[str]:
    return [", ".join(parts)] if parts else []


def _first_sentence(block: type) -> str:
    text = " ".join((inspect.getdoc(block) or "").partition("\n\n")[0].split())
    return re.split(r"(?<![ .])\. ", text)[0].rstrip(".").replace("|", r"\|").replace("``", "`")


def table() -> str:
    """The table, between its marks."""
    lines = ["| block | what it is | reads | writes |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows()]
    return "\n".join([BEGIN, *lines, END])


def replaced(text: str) -> str:
    """A document with the table in it brought up to date."""
    return text[: text.index(BEGIN)] + table() + text[text.index(END) + len(END) :]


if __name__ == "__main__":
    document = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/keys.md")
    document.write_text(replaced(document.read_text(encoding="utf-8")), encoding="utf-8")
