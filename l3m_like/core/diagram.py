"""The data_dict of a model as a picture: columns are blocks in execution order, rows are keys.

A key's line begins at the block that writes it (the data, for the loader's keys) and ends at its last reader; an arrow head
marks every block that reads it. As text, SVG and PNG, from the same wiring that runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from l3m_like.core.meta_model import PARTS
from l3m_like.core.wiring import Trace

DTYPES = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16", "int64": "i64", "int32": "i32"}


def shape_text(shape: Sequence[int | str], dtype: Any) -> str:
    """``[4, 4096] i64``."""
    name = str(dtype).removeprefix("torch.")
    return f"[{', '.join(map(str, shape))}] {DTYPES.get(name, name)}"


# ---- what is drawn -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """The data, a block or a loss."""

    group: str
    name: str
    kind: str
    parameters: int = 0
    #: the inference graph leaves it out
    training_only: bool = False


@dataclass(frozen=True)
class Lane:
    """A key: the column that writes it, and those that read it."""

    key: str
    shape: str
    writer: int
    readers: tuple[int, ...]

    @property
    def end(self) -> int:
        return max(self.readers, default=self.writer)


@dataclass(frozen=True)
class Diagram:
    """The columns and lanes of one update; ``of`` reads them off a trace."""

    columns: Sequence[Column]
    lanes: Sequence[Lane]

    @classmethod
    def of(cls, trace: Trace, program: str | None = None) -> Diagram:
        """The diagram of the update called ``program`` (default: the first)."""
        chosen = next(p for p in trace.wiring.programs if program is None or p.name == program)
        rows = [row for row in trace.rows if row.program == chosen.name]
        columns = [Column("data", "data", "Dataset")]
        writers = dict.fromkeys(trace.wiring.provided, 0)
        readers: dict[str, list[int]] = {}
        shapes: dict[str, str] = {}
        for number, (row, (path, block)) in enumerate(zip(rows, trace.wiring.blocks(chosen), strict=True), start=1):
            group, name = _place(path)
            count = sum(p.numel() for p in block.parameters())
            columns.append(Column(group, name, row.block, count, block.training_only))
            for key, value in (*row.reads.items(), *row.writes.items()):
                shapes[key] = shape_text(*value)
            for key in row.reads:
                readers.setdefault(key, []).append(number)
            for key in row.writes:
                writers[key] = number
            for key in readers.keys() - writers.keys():
                writers[key] = 0  # carried over from an earlier update
        for key, spec in trace.wiring.provided.items():
            shapes.setdefault(key, shape_text(spec.dims, spec.dtype))
        lanes = [Lane(key, shapes[key], writer, tuple(readers.get(key, ()))) for key, writer in writers.items()]
        # a stair: by writer, and among the loader's keys by first reader; what nobody reads comes last
        lanes.sort(key=lambda lane: (not lane.readers, lane.writer, min(lane.readers, default=0), lane.end))
        return cls(columns, lanes)

    def text(self) -> str:
        """For a terminal, in box-drawing characters."""
        keys, shapes = (max(len(getattr(lane, name)) for lane in self.lanes) for name in ("key", "shape"))
        label, step = keys + shapes + 4, 4
        lines = []
        for number, column in enumerate(self.columns):
            title = "data" if number == 0 else f"{column.group}{'.' + column.name if column.name else ''}  {column.kind}"
            title += "  (training only)" if column.training_only else ""
            lines.append(" " * label + f"{'│':{step}}" * number + title)
        for lane in self.lanes:
            cells = []
            for number in range(len(self.columns)):
                mark = "●" if number == lane.writer else "▶" if number in lane.readers else "│"
                covered = lane.writer <= number < lane.end
                mark = "─" if mark == "│" and lane.writer < number < lane.end else mark
                cells.append(mark + ("─" if covered else " ") * (step - 1))
            note = "" if lane.readers else "  (not read)"
            lines.append(f"{lane.key:{keys}}  {lane.shape:{shapes}}  {''.join(cells).rstrip()}{note}")
        return "\n".join(lines)

    def svg(self) -> str:
        """A self-contained SVG."""
        return _svg(_lay_out(self))

    def save(self, path: str | Path) -> Path:
        """Write ``path`` as SVG or, by its suffix, PNG."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            _png(_lay_out(self), path)
        else:
            path.write_text(self.svg(), encoding="utf-8")
        return path


def _place(path: str) -> tuple[str, str]:
    """preprocessor.noise -> (preprocessor, noise); loss.flow -> (loss, flow); encoder.trunk -> (encoder.trunk, "")."""
    names = path.split(".")
    at = next((i for i, name in enumerate(names) if name in PARTS or name == "loss"), 0) + 1
    return ".".join(names[:at]), ".".join(names[at:])


# ---- layout: one list of shapes for every format -------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
    x: float
    y: float
    width: float
    height: float
    radius: float
    fill: str
    stroke: str = "none"
    dashed: bool = False


@dataclass(frozen=True)
class Line:
    x1: float
    x2: float
    y: float
    colour: str
    width: float
    dashed: bool = False


@dataclass(frozen=True)
class Head:
    """An arrow head with its point at (x, y)."""

    x: float
    y: float
    colour: str


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    radius: float
    colour: str


@dataclass(frozen=True)
class Label:
    x: float
    y: float
    text: str
    size: float
    colour: str
    bold: bool = False
    mono: bool = False
    middle: bool = False


@dataclass(frozen=True)
class Picture:
    width: float
    height: float
    shapes: Sequence[Box | Line | Head | Dot | Label]


#: part -> (strong colour, tint)
COLOURS = {
    "data": ("#475569", "#f1f5f9"),
    "noise": ("#0e7490", "#ecfeff"),
    "preprocessor": ("#0f766e", "#ecfdf8"),
    "trunk": ("#4338ca", "#eef2ff"),
    "postprocessor": ("#7e22ce", "#faf5ff"),
    "head": ("#c2410c", "#fff7ed"),
    "loss": ("#be123c", "#fff1f2"),
}
INK, FAINT = "#1e293b", "#94a3b8"
MARGIN, TOP, ROW, BAR = 24.0, 118.0, 42.0, 12.0


def _lay_out(diagram: Diagram) -> Picture:
    columns, lanes = diagram.columns, diagram.lanes
    # a column is as wide as its card, and as the labels of the lines that begin there
    widths = []
    for number, column in enumerate(columns):
        card = max(_width(text, 12.5, bold=True) for text in (column.kind, column.name)) + 28
        own = [lane for lane in lanes if lane.writer == number]
        labels = [max(_width(lane.key, 11.5, mono=True), _width(lane.shape, 10, mono=True)) for lane in own]
        widths.append((max(card, 104.0), max(labels, default=0.0) + 34))
    centres = [MARGIN + 12 + widths[0][0] / 2]
    for (card, label), (following, _) in zip(widths, widths[1:], strict=False):
        centres.append(centres[-1] + max(label + BAR, (card + following) / 2 + 24))
    width = centres[-1] + widths[-1][0] / 2 + 12 + MARGIN
    bottom = TOP + ROW * len(lanes) + 18
    shapes: list[Any] = []

    # parts: tinted bands behind everything
    groups = list(dict.fromkeys(column.group for column in columns))
    lefts = [x - card / 2 for x, (card, _) in zip(centres, widths, strict=True)]
    rights = [x + card / 2 for x, (card, _) in zip(centres, widths, strict=True)]
    for group in groups:
        inside = [number for number, column in enumerate(columns) if column.group == group]
        first, last = inside[0], inside[-1]
        left = (rights[first - 1] + lefts[first]) / 2 + 3 if first else MARGIN
        right = (rights[last] + lefts[last + 1]) / 2 - 3 if last + 1 < len(columns) else width - MARGIN
        strong, tint = _colours(group)
        shapes.append(Box(left, 20, right - left, bottom - 20, 12, tint))
        shapes.append(Label((left + right) / 2, 41, group, 12, strong, bold=True, middle=True))

    # keys
    for row, lane in enumerate(lanes):
        y = TOP + ROW * row + ROW / 2
        start = centres[lane.writer]
        strong, _ = _colours(columns[lane.writer].group)
        colour = strong if lane.readers else FAINT
        end = centres[lane.end] if lane.readers else start + 40
        shapes.append(Line(start, end - (BAR / 2 + 2 if lane.readers else 0), y, colour, 2.0, dashed=not lane.readers))

    # blocks: a card on top and a bar down to the last key that it touches; lines that it does not touch pass behind the bar
    for number, (column, x) in enumerate(zip(columns, centres, strict=True)):
        strong, _ = _colours(column.group)
        touched = [row for row, lane in enumerate(lanes) if number == lane.writer or number in lane.readers]
        reach = TOP + ROW * max(touched, default=0) + ROW / 2 + 11
        card = widths[number][0]
        shapes.append(Box(x - BAR / 2, 92, BAR, reach - 92, BAR / 2, "#ffffff", strong))
        shapes.append(Box(x - card / 2, 54, card, 48, 9, "#ffffff", strong, dashed=column.training_only))
        title, under = (column.kind, column.name) if number else (column.kind, "")
        size = f"{_amount(column.parameters)} weights" if column.parameters else ""
        below = "  ".join(text for text in (under, size) if text) or ("the loader's keys" if number == 0 else "")
        shapes.append(Label(x, 75 if below else 82, title, 12.5, strong, bold=True, middle=True))
        shapes.append(Label(x, 91, below, 9.5, FAINT if not below else "#64748b", middle=True))

    # marks and labels
    for row, lane in enumerate(lanes):
        y = TOP + ROW * row + ROW / 2
        strong, _ = _colours(columns[lane.writer].group)
        colour = strong if lane.readers else FAINT
        shapes.append(Dot(centres[lane.writer], y, 4.2, colour))
        shapes += [Head(centres[reader] - BAR / 2, y, colour) for reader in lane.readers]
        x = centres[lane.writer] + BAR / 2 + 7
        shapes.append(Label(x, y - 6, lane.key, 11.5, INK if lane.readers else FAINT, bold=bool(lane.readers), mono=True))
        shapes.append(Label(x, y + 14, lane.shape, 10, "#64748b" if lane.readers else FAINT, mono=True))
    note = "● writes   ▶ reads   numbers: one micro-batch on one rank"
    if any(column.training_only for column in columns):
        note += "   dashed card: training only, left out of the inference graph"
    shapes.append(Label(MARGIN, bottom + 22, note, 10, "#64748b"))
    return Picture(width, bottom + 38, shapes)


def _colours(group: str) -> tuple[str, str]:
    return COLOURS.get(group.rpartition(".")[2], COLOURS["data"])


def _width(text: str, size: float, *, bold: bool = False, mono: bool = False) -> float:
    """An upper estimate of a text's width in pixels."""
    return len(text) * size * (0.61 if mono else 0.64 if bold else 0.56)


def _amount(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


# ---- formats -------------------------------------------------------------------------------------------------------


def _svg(picture: Picture) -> str:
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {picture.width:.0f} {picture.height:.0f}" '
        f'width="{picture.width:.0f}" height="{picture.height:.0f}">',
        "<style>text{font-family:Helvetica,Arial,'DejaVu Sans',sans-serif}"
        ".m{font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace}</style>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for s in picture.shapes:
        if isinstance(s, Box):
            dash = ' stroke-dasharray="5 3"' if s.dashed else ""
            out.append(
                f'<rect x="{s.x:.1f}" y="{s.y:.1f}" width="{s.width:.1f}" height="{s.height:.1f}" rx="{s.radius:.1f}" '
                f'fill="{s.fill}" stroke="{s.stroke}" stroke-width="1.4"{dash}/>'
            )
        elif isinstance(s, Line):
            dash = ' stroke-dasharray="3 3"' if s.dashed else ""
            out.append(f'<path d="M{s.x1:.1f} {s.y:.1f}H{s.x2:.1f}" stroke="{s.colour}" stroke-width="{s.width}"{dash}/>')
        elif isinstance(s, Head):
            out.append(f'<path d="M{s.x:.1f} {s.y:.1f}l-9 -5v10z" fill="{s.colour}"/>')
        elif isinstance(s, Dot):
            out.append(f'<circle cx="{s.x:.1f}" cy="{s.y:.1f}" r="{s.radius}" fill="{s.colour}"/>')
        else:
            extra = ' class="m"' * s.mono + ' font-weight="600"' * s.bold + ' text-anchor="middle"' * s.middle
            out.append(f'<text x="{s.x:.1f}" y="{s.y:.1f}" font-size="{s.size}" fill="{s.colour}"{extra}>{escape(s.text)}</text>')
    return "\n".join([*out, "</svg>\n"])


def _png(picture: Picture, path: Path, scale: float = 2.0) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # heavy, and only for this format
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle, FancyBboxPatch, Polygon

    # 72 dots per inch make one point one pixel of the layout
    figure = Figure(figsize=(picture.width / 72, picture.height / 72), dpi=72 * scale)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, picture.width), ylim=(picture.height, 0))
    axes.axis("off")
    for order, s in enumerate(picture.shapes):
        if isinstance(s, Box):
            corners = f"round,pad=0,rounding_size={min(s.radius, s.width / 2, s.height / 2)}"
            box = FancyBboxPatch((s.x, s.y), s.width, s.height, boxstyle=corners, facecolor=s.fill, zorder=order)
            box.set(edgecolor=s.stroke, linewidth=1.4, linestyle=(0, (4, 2.5)) if s.dashed else "solid")
            axes.add_patch(box)
        elif isinstance(s, Line):
            (line,) = axes.plot((s.x1, s.x2), (s.y, s.y), color=s.colour, linewidth=s.width, zorder=order)
            line.set(linestyle=(0, (2, 2)) if s.dashed else "solid", solid_capstyle="butt")
        elif isinstance(s, Head):
            points = ((s.x, s.y), (s.x - 9, s.y - 5), (s.x - 9, s.y + 5))
            axes.add_patch(Polygon(points, facecolor=s.colour, edgecolor="none", zorder=order))
        elif isinstance(s, Dot):
            axes.add_patch(Circle((s.x, s.y), s.radius, facecolor=s.colour, edgecolor="none", zorder=order))
        else:
            # DejaVu is wider than what browsers take
            text = axes.text(s.x, s.y, s.text, fontsize=s.size * 0.92, color=s.colour, zorder=order)
            text.set(family="DejaVu Sans Mono" if s.mono else "DejaVu Sans", weight="bold" if s.bold else "normal")
            text.set(ha="center" if s.middle else "left", va="baseline")
    figure.savefig(path)
