"""Reporter, the one thing that the loop talks to; and the report of a run: its curves as report.png and report.html."""

from __future__ import annotations

import base64
import html
import io
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.evaluations.evaluation import Findings
from l3m_like.training.metrics import Console, MetricsLog, read_metrics, short, window_rates
from l3m_like.training.trackers import open_trackers

log = logging.getLogger(__name__)

POINTS = 1500  # of a curve; longer runs are averaged in that many parts


class Reporter:
    """metrics.jsonl, the console, the trackers, and the report at the end. On other processes than the main one, nothing.

    Args:
        settings: the ``log`` section of the run.
        run_dir: the run's directory.
        is_main: does this process report?
        resume_step: the step that the run goes on from (0: it begins).
        stamp: facts of the run for the report (parameters, device, versions, ``random_weights`` ...); JSON values.
        total: steps of the run, for the time left.
        peak_flops: of all devices together, per second, for MFU; None: not known, no MFU.
        run_id: the run's id in trackers; None: one is made and kept in ``run_dir``.
    """

    def __init__(
        self,
        settings: Any,
        run_dir: str | Path,
        is_main: bool,
        resume_step: int,
        stamp: Mapping[str, Any],
        *,
        total: int | None = None,
        peak_flops: float | None = None,
        run_id: str | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.is_main = is_main
        self.stamp = dict(stamp)
        self.peak_flops = peak_flops
        self.metrics = MetricsLog(self.run_dir, is_main=is_main, resume_step=resume_step)
        self.console = Console(total, start=resume_step) if is_main and settings.console else None
        self._attention: set[str] = set()
        self.trackers = (
            open_trackers(settings, self.run_dir, resume_step=resume_step, run_id=run_id, stamp=self.stamp) if is_main else []
        )

    def steps(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Report all steps since the last call; call it before each save, so that no step before a checkpoint is lost.

        Each row has ``step`` (steps taken, this one included) and ``seconds`` (its wall-clock time, waiting for data included;
        an average over the rows is fine). Known, and left out where not known: ``loss``, ``lr``, ``grad_norm``, ``data_wait``
        (seconds), ``memory`` (bytes), ``counts`` ({"tokens": 8192, "rows": 16} over all ranks; the first is the console's
        unit), ``flops`` (of the model, over all ranks), ``hardware_flops`` (with what is recomputed), ``refs`` (sample
        references), ``left_out`` (for the ledger). Any other JSON value is written as it is.
        """
        if not self.is_main or not rows:
            return
        lines = [self._line(row) for row in rows]
        self.metrics.write(lines)
        for row in rows:
            self.metrics.left_out(row["step"], row.get("left_out", ()))
        if self.console is not None:
            self.console.update(rows[-1], window_rates(rows, self.peak_flops))
        for line in lines if self.trackers else ():
            values = {key: value for key, value in line.items() if key != "step" and _is_number(value)}
            for tracker in self.trackers:
                tracker.scalars(line["step"], values)

    def say(self, text: str) -> None:
        """A line on the console that stays."""
        if self.console is not None:
            self.console.print(text)

    def attention(self, blocks: Iterable[Any]) -> None:
        """Print by which backend each kind of mask is computed, where that is news."""
        used = {f"{kind} = {name}" for block in blocks for kind, name in getattr(block, "attention_used", {}).items()}
        if not used <= self._attention:
            self._attention |= used
            self.say("attention: " + "; ".join(sorted(used)))

    def left_out(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Note samples that were left out after the last step."""
        self.metrics.left_out(step, samples)

    def evaluation(self, step: int, name: str, found: Findings) -> None:
        """Report what the evaluation ``name`` found as ``<name>/<key>``; its notes go into the report's facts too."""
        if not self.is_main:
            return
        named = {f"{name}/{key}": value for key, value in found.values.items()}
        notes = {f"{name}/{key}": note for key, note in found.notes.items()}
        paths = {f"{name}/{key}": self.image(step, f"{name}/{key}", image) for key, image in found.images.items()}
        pictures = {"images": {key: path.relative_to(self.run_dir).as_posix() for key, path in paths.items()}} if paths else {}
        self.stamp |= notes
        self.metrics.write([{"step": step, "evaluation": name, **named, **notes, **pictures}])
        if self.console is not None:
            said = [f"{key} {value:.4f}" for key, value in named.items()]
            said += [f"{key} {text}" for key, text in (notes | {key: str(path) for key, path in paths.items()}).items()]
            self.console.print(f"step {step}  " + "  ".join(said))
        for tracker in self.trackers if named else ():
            tracker.scalars(step, named)

    def image(self, step: int, name: str, image: Tensor | np.ndarray | Path) -> Path:
        """Save a picture, uint8 [H, W, 1 or 3] or a file, as ``images/<name>_<step>.png``, and give it to the trackers; the
        report shows the newest of each name."""
        path = self.run_dir / "images" / f"{name.replace('/', '_')}_{step:08d}.png"
        if not self.is_main:
            return path
        from PIL import Image

        array = np.asarray(Image.open(image).convert("RGB")) if isinstance(image, Path) else np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3):
            raise UserError(f"image '{name}': expected uint8 [H, W, 1 or 3], got {array.dtype} {list(array.shape)}.")
        array = np.broadcast_to(array, (*array.shape[:2], 3)).copy()
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(array).save(path)
        for tracker in self.trackers:
            tracker.image(step, name, array)
        return path

    def sync(self) -> None:
        """Make what was reported survive a crash of the machine (a kill of the process it survives anyway)."""
        self.metrics.sync()

    def close(self, final: Mapping[str, Any]) -> None:
        """End the run: trackers, report, console. ``final``: the run's last metrics."""
        if not self.is_main:
            return
        self.metrics.close()
        numbers = {key: value for key, value in final.items() if _is_number(value)}
        for tracker in self.trackers:
            tracker.close(numbers)
        made = write_report(self.run_dir, self.stamp, numbers)
        if self.console is not None:
            if made is not None:
                self.console.print(f"report: {made}")
            self.console.close()

    def _line(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row as it is written: counts as totals and rates per second of wall clock, FLOPs as MFU and HFU."""
        line = {key: value for key, value in row.items() if key not in ("counts", "flops", "hardware_flops", "refs", "left_out")}
        seconds = max(row["seconds"], 1e-9)
        for unit, count in row.get("counts", {}).items():
            line[unit] = count
            line[f"{unit}_per_second"] = count / seconds
        if self.peak_flops and row.get("flops"):
            line["mfu"] = row["flops"] / seconds / self.peak_flops
            line["hfu"] = row.get("hardware_flops", row["flops"]) / seconds / self.peak_flops
        return line | ({"refs": row["refs"]} if "refs" in row else {})


def write_report(run_dir: str | Path, stamp: Mapping[str, Any], final: Mapping[str, float]) -> Path | None:
    """``report.png`` (the curves of metrics.jsonl) and ``report.html`` (these, facts, final metrics and images, in one file).

    Returns the path of the HTML file; None, with a message, without matplotlib (a finished run must not fail on its report).
    """
    run_dir = Path(run_dir)
    try:
        png = _curves(read_metrics(run_dir), title=run_dir.name)
    except ImportError:
        log.warning("no report: matplotlib is not installed. Run: pip install matplotlib")
        return None
    (run_dir / "report.png").write_bytes(png)
    path = run_dir / "report.html"
    path.write_text(_page(run_dir, png, stamp, final), encoding="utf-8")
    return path


def _curves(rows: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """The curves as a PNG."""
    # the Agg canvas by itself, not pyplot: no global figures, no display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [row for row in rows if "evaluation" not in row]
    evaluations = [row for row in rows if "evaluation" in row]
    losses = _keys(steps, lambda key: key == "loss" or key.startswith("loss/"))
    # the unit of the console: the first count of a row
    units = _keys(steps, lambda key: key.endswith("_per_second"))[:1]
    panels: list[tuple[str, list[str], str, Sequence[Mapping[str, Any]]]] = [
        ("loss", losses, "linear", steps),
        ("loss, log steps", losses, "log", steps),
        ("learning rate", _keys(steps, lambda key: key == "lr" or key.startswith("lr/")), "linear", steps),
        ("gradient norm", _keys(steps, lambda key: key == "grad_norm" or key.startswith("grad_norm/")), "linear", steps),
        (units[0].replace("_per_second", " per second") if units else "throughput", units, "linear", steps),
        ("evaluations", _keys(evaluations, lambda key: "/" in key), "linear", evaluations),
    ]
    figure = Figure(figsize=(15, 8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (name, keys, scale, source) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.set_xscale(scale)
        axes.tick_params(which="both", labelsize=8)
        axes.grid(alpha=0.25)
        for key in keys[:8]:
            x, y = _series(source, key)
            axes.plot(x, y, label=key, linewidth=1.2, marker="o" if len(x) < 30 else None, markersize=3)
        if name == "gradient norm" and any(line.get_ydata().max(initial=0.0) > 0 for line in axes.get_lines()):
            axes.set_yscale("log")
        if keys and keys == units:
            axes.set_ylim(bottom=0)
        if name == "learning rate":
            axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        if len(keys) > 1 or name == "evaluations" and keys:
            axes.legend(fontsize=7)
        if not keys:
            axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color="gray")
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _keys(rows: Sequence[Mapping[str, Any]], wanted: Any) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key, value in row.items() if wanted(key) and _is_number(value)))


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """``(steps, values)`` of ``key``, finite values only, averaged in at most ``POINTS`` parts."""
    pairs = np.array([(row["step"], row[key]) for row in rows if key in row], dtype=np.float64).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs[:, 1])]
    if len(pairs) > POINTS:
        pairs = np.stack([part.mean(axis=0) for part in np.array_split(pairs, POINTS)])
    return pairs[:, 0], pairs[:, 1]


def _page(run_dir: Path, png: bytes, stamp: Mapping[str, Any], final: Mapping[str, float]) -> str:
    newest = {}
    for path in sorted((run_dir / "images").glob("*.png")):
        newest[path.stem.rsplit("_", 1)[0]] = path
    random_weights = stamp.get("random_weights")
    warning = f"Frozen parts ran with random weights: {_text(random_weights)}. Do not compare these results."
    images = "".join(
        f"<figure><img src='{_inline(path.read_bytes())}'><figcaption>{html.escape(path.stem)}</figcaption></figure>\n"
        for path in newest.values()
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(run_dir.name)}</title>
<style>
body {{ font-family: system-ui, sans-serif; margin: 2em; max-width: 1500px; }}
img {{ max-width: 100%; }} figure {{ display: inline-block; margin: 0 1em 1em 0; }} figcaption {{ color: gray; }}
td {{ padding: 0.1em 1.5em 0.1em 0; vertical-align: top; }} .warning {{ background: #fdd; padding: 0.7em; }}
</style>
<h1>{html.escape(run_dir.name)}</h1>
{f"<p class=warning>{html.escape(warning)}</p>" if random_weights else ""}
<img src="{_inline(png)}" alt="curves">
<h2>Final metrics</h2>
{_table({key: f"{value:.6g}" for key, value in final.items()})}
<h2>Facts</h2>
{_table(stamp)}
{"<h2>Images</h2>" + images if images else ""}
</html>
"""


def _table(rows: Mapping[str, Any]) -> str:
    cells = ((html.escape(str(key)), html.escape(_text(value))) for key, value in rows.items())
    return "<table>\n" + "".join(f"<tr><td>{key}</td><td>{value}</td></tr>\n" for key, value in cells) + "</table>"


def _text(value: Any) -> str:
    """A fact in words: large whole numbers also in short."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1_000_000:
        return f"{value:,} ({short(value)})"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _inline(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
