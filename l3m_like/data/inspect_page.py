"""The page of ``run/inspect_data.py``: what was seen of a dataset, in one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from torch import Tensor

from l3m_like.data.inspect import Document, Seen
from l3m_like.data.packing import IGNORED, PADDING
from l3m_like.data.processors.pixels import Pixels
from l3m_like.data.tokenizer import TextTokenizer

TEXT_ROWS, PICTURES, VIDEOS, FRAMES = 6, 48, 8, 16
PICTURE_PIXELS = 192  # larger ones are made smaller
LEFT_OUT = 50
BINS = 24

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1.5em; color: #222; }
h1 { font-size: 1.5em; margin-bottom: 0.2em; } h2 { font-size: 1.15em; margin: 2em 0 0.6em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; } th { text-align: left; font-weight: 600; color: #666; }
td, th { padding: 0.2em 1.4em 0.2em 0; vertical-align: top; } td:first-child { white-space: nowrap; }
code, .text { font-family: ui-monospace, Menlo, Consolas, monospace; } code { font-size: 0.9em; }
.note { color: #777; } .left { color: #a33; }
.row { margin: 0 0 1.4em; border: 1px solid #ddd; border-radius: 6px; overflow: hidden; }
.head { padding: 0.4em 0.8em; background: #f6f6f6; }
.bar { display: flex; height: 8px; background: #fff; } .bar i { display: block; }
.yes { background: #7cc48a; } .no { background: #c9c9c9; } .first { border-left: 2px solid #346; }
.pad { background: repeating-linear-gradient(45deg, #fff, #fff 4px, #eee 4px, #eee 8px); }
.text { font-size: 12.5px; line-height: 1.4; max-height: 26em; overflow: auto; }
.document { padding: 0.4em 0.8em; border-top: 1px dashed #bbb; border-left: 4px solid #4a7fb5; }
.document:nth-child(even) { border-left-color: #d08a3c; }
.name { color: #346; font-family: system-ui, sans-serif; font-size: 12px; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; color: #999; }
mark { background: #daf1de; color: #123; } .ahead { border: 1px dotted #7a7; color: #7a7; }
.padding { padding: 0.3em 0.8em; color: #888; border-top: 1px dashed #bbb; }
figure { display: inline-block; margin: 0 8px 8px 0; vertical-align: top; } img { display: block; border: 1px solid #ddd; }
figcaption { font-size: 12px; color: #555; overflow-wrap: anywhere; } .picture { width: 106px; } .picture.large { width: 194px; }
.picture img { width: 104px; image-rendering: pixelated; } .picture.large img { width: auto; image-rendering: auto; }
svg { margin: 0 24px 12px 0; }
svg text { font: 11px system-ui, sans-serif; fill: #555; } svg .title { font-size: 13px; fill: #222; }
.share { display: inline-block; height: 0.8em; background: #7da7cf; margin-right: 0.5em; }
"""


def page(seen: Seen, title: str) -> str:
    """The whole page."""
    parts = [_table(seen.facts()), _section("Keys", _keys(seen)), _section("Mixture", _mixture(seen))]
    if seen.stream is not None:
        parts.append(_section("Rows", _rows(seen)))
    parts += [_section(name, content) for name, content in _pictures(seen)]
    parts += [_section("Distributions", _histograms(seen)), _section("Left out", _left_out(seen))]
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n'
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(part for part in parts if part) + "\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<h2>{html.escape(title)}</h2>\n{content}" if content else ""


def _table(rows: Mapping[str, str]) -> str:
    cells = (f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>" for key, value in rows.items())
    return f"<table>{''.join(cells)}</table>"


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML."""
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return (
        f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
    )


def _keys(seen: Seen) -> str:
    batch = seen.shown[0]
    rows = [
        (
            f"<code>{html.escape(name)}</code>",
            str(spec.dtype).removeprefix("torch."),
            "[" + ", ".join(map(str, spec.dims)) + "]",
            str(list(batch[name].shape)),
            html.escape(spec.meaning),
        )
        for name, spec in seen.dataset.keys().items()
    ]
    return _grid(("key", "dtype", "shape", "in a micro-batch", "meaning"), rows)


def _mixture(seen: Seen) -> str:
    mix = seen.dataset.mix
    if mix is None:
        return ""
    rows = [
        (html.escape(name), *(f'<span class=share style="width:{160 * part:.0f}px"></span>{part:.1%}' for part in parts))
        for name, parts in seen.shares().items()
    ]
    return _grid(("source", f"weight (counted in {mix.by})", "samples", html.escape(seen.dataset.unit)), rows)


# ---- packed text -----------------------------------------------------------------------------------------------------


def tokenizer_of(process: Any) -> TextTokenizer | None:
    """The tokenizer of a processor, or of the one that it hands samples to."""
    for name in ("tokenizer", "process", "chat"):
        inner = getattr(process, name, None)
        if isinstance(inner, TextTokenizer):
            return inner
        if inner is not None and (found := tokenizer_of(inner)) is not None:
            return found
    return None


def _show(tokenizer: TextTokenizer | None, ids: Sequence[int]) -> str:
    return html.escape(" ".join(map(str, ids)) + " " if tokenizer is None else tokenizer.show(ids))


def _rows(seen: Seen) -> str:
    """The first rows as text. A token is marked if a loss counts it: it is the target of the place before it."""
    legend = (
        "<p class=note><mark>Marked</mark> tokens are trained on: each is the target of the token before it. Grey ones are only "
        "read. A <span class=ahead>dotted</span> one is a target that the row does not hold: the document goes on elsewhere.</p>"
    )
    rows = ((batch, row) for batch in seen.shown for row in range(len(batch["row"])))
    made = [_row(seen, batch, row, documents) for (batch, row), documents in zip(rows, seen.rows[:TEXT_ROWS], strict=False)]
    return legend + "\n".join(made)


def _row(seen: Seen, batch: Mapping[str, Tensor], row: int, what: Any) -> str:
    ids, targets, numbers = (batch[f"{seen.stream}_{name}"][row].numpy() for name in ("ids", "targets", "document_ids"))
    trained = trained_tokens(targets, numbers)
    real = int((numbers != PADDING).sum())
    cost = "" if what.cost is None else f", cost {what.cost:,.6g} of {seen.pack.max_cost:,.6g}"
    head = (
        f"<b>row {int(batch['row'][row])}</b>: {real:,} of {len(ids):,} tokens ({real / len(ids):.1%}), "
        f"{int((targets != IGNORED).sum()):,} targets, documents: {len(what.documents)}{cost}"
    )
    tokenizers = {name: tokenizer_of(part.process) for name, part in seen.dataset.parts.items()}
    blocks = [
        _document(document, tokenizers[document.source], ids[here], trained[here], targets[here])
        for number, document in enumerate(what.documents)
        if (here := np.flatnonzero(numbers == number)).size
    ]
    if real < len(ids):
        blocks.append(f"<div class='padding pad'>padding: {len(ids) - real:,} tokens</div>")
    bar = _bar(numbers, trained)
    return f"<div class=row><div class=head>{head}</div>{bar}<div class=text>{''.join(blocks)}</div></div>"


def trained_tokens(targets: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """bool [S]: the token is the target of the place before it, in the same document."""
    trained = np.zeros(len(targets), dtype=bool)
    trained[1:] = (targets[:-1] != IGNORED) & (documents[1:] == documents[:-1])
    return trained


def _document(document: Document, tokenizer: TextTokenizer | None, ids: Any, trained: Any, targets: Any) -> str:
    text = []
    for yes, run in groupby(range(len(ids)), key=lambda place: bool(trained[place])):
        shown = _show(tokenizer, [int(ids[place]) for place in run])
        text.append(f"<mark>{shown}</mark>" if yes else shown)
    if targets[-1] != IGNORED:
        text.append(f"<span class=ahead>{_show(tokenizer, [int(targets[-1])])}</span>")
    source = f"{html.escape(document.source)}: " if document.source else ""
    name = f"{source}{html.escape(document.name)}, {len(ids):,} tokens, {int(trained.sum()):,} marked"
    return f"<div class=document><div class=name>{name}</div><pre>{''.join(text)}</pre></div>"


def _bar(numbers: np.ndarray, trained: np.ndarray) -> str:
    """The row in small: a segment for each run of tokens of one kind."""
    kinds = [(int(number), "pad" if number == PADDING else "yes" if yes else "no") for number, yes in zip(numbers, trained)]
    segments, before = [], None
    for (number, kind), run in groupby(kinds):
        first = " first" if before is not None and number != before else ""
        segments.append(f'<i class="{kind}{first}" style="flex:{len(list(run))}"></i>')
        before = number
    return f"<div class=bar>{''.join(segments)}</div>"


# ---- pictures --------------------------------------------------------------------------------------------------------


def _pictures(seen: Seen) -> Iterator[tuple[str, str]]:
    """(title, content) of every key that holds images or videos."""
    for name, spec in seen.dataset.keys().items():
        if spec.dtype.is_floating_point and len(spec.dims) in (4, 5):
            values = np.concatenate([batch[name].float().numpy() for batch in seen.shown])
            video = values.ndim == 5
            values = values[: VIDEOS if video else PICTURES]
            pixels, note = visible(seen.dataset.process, values)
            labels = _labels(seen, name, len(values))
            figures = [_strip(frames, label) if video else _picture(frames, label) for frames, label in zip(pixels, labels)]
            shape = " x ".join(map(str, values.shape[1:]))
            yield f"{name}: {shape}", f"<p class=note>{html.escape(note)}</p>\n{''.join(figures)}"


def visible(process: Any, values: np.ndarray) -> tuple[np.ndarray, str]:
    """uint8 [.., H, W, 1 or 3] of floats [.., C, H, W], and how it was made."""
    holder = process if isinstance(process, Pixels) else getattr(process, "picture", None)
    if isinstance(holder, Pixels) and values.shape[-3:] == holder.shape:
        return holder.visible(values), f"Values from {values.min():.3g} to {values.max():.3g}, shown as the pixels that they are."
    channels = 3 if values.shape[-3] >= 3 else 1
    shown = np.moveaxis(values[..., :channels, :, :], -3, -1)
    low, high = np.percentile(shown, (1, 99))
    note = f"Channels 0 to {channels - 1} of {values.shape[-3]}; {low:.3g} is black and {high:.3g} white."
    return np.clip((shown - low) / max(high - low, 1e-9) * 255, 0, 255).astype(np.uint8), note


def _labels(seen: Seen, name: str, count: int) -> list[str]:
    """What is written under each picture: its class or its caption, and the sample's name."""
    names = [row.documents[0].name if row.documents else "" for row in seen.rows[:count]]
    short = [name.rpartition("#")[2].rpartition("/")[2] for name in names]
    samples = [f"<span class=note title='{html.escape(name)}'>{html.escape(last)}</span>" for name, last in zip(names, short)]
    label = [str(int(value)) for batch in seen.shown for value in batch.get(f"{name}_label", ())]
    if label:
        return [f"<b>{value}</b> {sample}" for value, sample in zip(label, samples)]
    tokenizer = tokenizer_of(seen.dataset.process)
    if tokenizer is not None and "text_mask" in seen.shown[0]:
        pairs = ((ids, mask) for batch in seen.shown for ids, mask in zip(batch["text_ids"], batch["text_mask"]))
        captions = [_show(tokenizer, ids[mask].tolist()) for ids, mask in pairs]
        return [f"{caption} {sample}" for caption, sample in zip(captions, samples)]
    return samples


def _picture(pixels: np.ndarray, label: str) -> str:
    large = " large" if max(pixels.shape[:2]) > 104 else ""
    return f"<figure class='picture{large}'><img src='{_png(pixels)}'><figcaption>{label}</figcaption></figure>"


def _strip(frames: np.ndarray, label: str) -> str:
    chosen = frames[np.unique(np.linspace(0, len(frames) - 1, FRAMES).round().astype(int))]
    gap = np.full((chosen.shape[1], 2, chosen.shape[3]), 255, dtype=np.uint8)
    strip = np.concatenate([part for frame in chosen for part in (frame, gap)][:-1], axis=1)
    return f"<figure><img style='max-width:100%' src='{_png(strip, wide=True)}'><figcaption>{label}</figcaption></figure>"


def _png(pixels: np.ndarray, *, wide: bool = False) -> str:
    """A ``data:`` URL of uint8 [H, W, 1 or 3]."""
    from PIL import Image

    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image.thumbnail((1150 if wide else PICTURE_PIXELS, PICTURE_PIXELS))
    out = io.BytesIO()
    image.save(out, format="png")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


# ---- distributions ---------------------------------------------------------------------------------------------------


def _histograms(seen: Seen) -> str:
    if seen.stream is None:
        return ""
    lengths = [document.size for document in seen.documents if document.start == 0]
    filled = [sum(document.stop - document.start for document in row.documents) for row in seen.rows]
    drawn = [
        ("tokens of a document (whole)", lengths, None),
        ("documents in a row", [len(row.documents) for row in seen.rows], seen.pack.max_documents),
        ("tokens in a row", filled, seen.pack.length),
    ]
    costs = [row.cost for row in seen.rows if row.cost is not None]
    if costs:
        drawn.append(("cost of a row", costs, seen.pack.max_cost))  # type: ignore[arg-type]
    waits = [wait for row in seen.rows for wait in row.waits]
    if hasattr(seen.pack, "buffer"):
        drawn.append(("rows that a document waits", waits, seen.pack.buffer))
    return "".join(histogram(np.array(values, dtype=float), title, limit) for title, values, limit in drawn if values)


def histogram(values: np.ndarray, title: str, limit: float | None = None) -> str:
    """An SVG of how often values [n] occur, with the median; ``limit`` is named in the title."""
    counts, edges = np.histogram(values, bins=_edges(values))
    width, height, left, top = 360, 150, 40, 44
    bars = []
    step = width / len(counts)
    for place, count in enumerate(counts):
        tall = height * count / counts.max()
        what = f"from {_number(edges[place])}, below {_number(edges[place + 1])}: {count}"
        bars.append(
            f'<rect x="{left + place * step + 0.5:.1f}" y="{top + height - tall:.1f}" width="{max(step - 1, 0.5):.1f}" '
            f'height="{tall:.1f}" fill="#7da7cf"><title>{what}</title></rect>'
        )
    whole = edges[1] - edges[0] == 1  # a bar for each number, which is named under its middle
    places = sorted({0, len(counts) // 2, len(counts) - whole})
    ticks = [(left + (place + whole / 2) * step, edges[place]) for place in places]
    said = (
        f"median {_number(float(np.median(values)))}, mean {_number(float(values.mean()))}, most {_number(float(values.max()))}"
    )
    bound = "" if limit is None else f" (at most {_number(limit)})"
    return (
        f'<svg width="{left + width + 30}" height="{top + height + 24}"><text class=title x="{left}" y="14">'
        f'{html.escape(title + bound)}</text><text x="{left}" y="31">{said}</text>{"".join(bars)}'
        f'<line x1="{left}" x2="{left + width}" y1="{top + height}" y2="{top + height}" stroke="#999"/>'
        + "".join(f'<text x="{x:.0f}" y="{top + height + 15}" text-anchor="middle">{_number(value)}</text>' for x, value in ticks)
        + f'<text x="{left - 5}" y="{top + 9}" text-anchor="end">{counts.max():,}</text></svg>'
    )


def _edges(values: np.ndarray) -> np.ndarray:
    """Borders of the bars: one for each number of few whole ones, equal ones, or growing ones for a long tail."""
    low, high = float(values.min()), float(values.max())
    if (values == values.round()).all() and high - low < BINS:
        return np.arange(low, high + 2)
    if low > 0 and high > 20 * np.median(values):
        return np.geomspace(low, high, BINS + 1)
    return np.linspace(low, high, BINS + 1)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.3g}"


def _left_out(seen: Seen) -> str:
    if not seen.left_out:
        return ""
    kind = {True: "too long", False: "<span class=left>bad</span>"}
    rows = [
        (html.escape(entry["sample"]), kind[entry["dropped"]], html.escape(entry["error"])) for entry in seen.left_out[:LEFT_OUT]
    ]
    more = len(seen.left_out) - len(rows)
    return _grid(("sample", "", "why"), rows) + (f"<p class=note>and {more:,} more</p>" if more else "")
