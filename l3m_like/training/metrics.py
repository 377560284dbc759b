"""What a run says while it trains: metrics.jsonl, and a line on the console."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from l3m_like.core.errors import UserError

METRICS = "metrics.jsonl"
LEDGER = "ledger.jsonl"


class MetricsLog:
    """``metrics.jsonl``: one JSON object a line, each with the ``step`` (steps taken so far) that it belongs to.

    Floats are written by ``repr``, so they come back bit for bit; NaN and infinities are written as Python's json does. What
    ``write`` was given is in the file when it returns (it survives a kill of the process); ``sync`` makes it survive a crash
    of the machine.

    Args:
        run_dir: the run's directory.
        is_main: only this process writes; elsewhere all methods do nothing.
        resume_step: the step that the run goes on from. Lines of later steps are cut from ``metrics.jsonl`` and ``ledger.jsonl``,
            so that each shows one history; 0 begins anew.
    """

    def __init__(self, run_dir: str | Path, *, is_main: bool, resume_step: int) -> None:
        self._file: TextIO | None = None
        self._ledger = Path(run_dir) / LEDGER
        if not is_main:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, LEDGER):
            truncate(run_dir / name, resume_step)
        self._file = (run_dir / METRICS).open("a", encoding="utf-8")

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self._file is not None:
            self._file.write("".join(json.dumps(row) + "\n" for row in rows))
            self._file.flush()

    def left_out(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Note the samples that were left out up to ``step`` in the ledger."""
        if self._file is not None and samples:
            with self._ledger.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps({"step": step, **sample}) + "\n" for sample in samples))

    def sync(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None


def truncate(path: Path, step: int) -> None:
    """Cut the lines of steps after ``step`` from a JSONL file, atomically; a last line that a kill cut short goes too.

    Lines without a ``step`` stay; with ``step`` 0 nothing does.

    Raises:
        UserError: a line before the last is not JSON.
    """
    if not path.exists():
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        if step > 0:
            file.writelines(line for line, row in _lines(path) if row.get("step", 0) <= step)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's ``metrics.jsonl``, without the sample references (``refs``)."""
    path = Path(run_dir) / METRICS
    return [{key: value for key, value in row.items() if key != "refs"} for _, row in _lines(path)] if path.exists() else []


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(line, object)`` of a JSONL file, without a last line that was cut short."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}. Remove the line, or give a new run directory.") from error
            yield line, row


class Console:
    """The run's progress: one live line in a terminal, a plain line per call elsewhere (no control characters).

    Args:
        total: steps of the run, for the time left; None: not known.
        start: steps taken before this process began.
        file: default: standard output as it is at the first line.
    """

    def __init__(self, total: int | None = None, *, start: int = 0, file: TextIO | None = None) -> None:
        self.total = total
        self.start = start
        self._file = file or sys.stdout
        self._live: Any = None
        if self._file.isatty():
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, Progress, TextColumn
            from rich.table import Column

            # refreshed by update() alone: a thread that draws would compete with the loop for the interpreter
            self._live = Progress(
                BarColumn(bar_width=20),
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
                console=RichConsole(file=self._file),
                auto_refresh=False,
            )
            self._task = self._live.add_task("starting", total=total, completed=start)
            self._live.start()

    def update(self, row: Mapping[str, Any], rates: Mapping[str, float]) -> None:
        """Show the newest step ``row`` (see ``Reporter.steps``) and the ``rates`` since the last call (see ``window_rates``)."""
        text = self.line(row, rates)
        if self._live is None:
            print(text, file=self._file, flush=True)
        else:
            self._live.update(self._task, completed=row["step"], description=text, refresh=True)

    def print(self, text: str) -> None:
        """A line that stays, above the live one."""
        if self._live is None:
            print(text, file=self._file, flush=True)
        else:
            self._live.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def line(self, row: Mapping[str, Any], rates: Mapping[str, float]) -> str:
        """The text of one progress line."""
        total = f"/{self.total}" if self.total else ""
        parts = [f"step {row['step']}{total}"]
        if "loss" in row:
            parts.append(f"loss {row['loss']:.4f}")
        if "lr" in row:
            parts.append(f"lr {row['lr']:.2e}")
        if "grad_norm" in row:
            parts.append(f"grad {row['grad_norm']:.3g}")
        if rates.get("unit"):
            parts.append(f"{short(rates['per_second'])} {rates['unit']}/s")
        if rates.get("mfu") is not None:
            parts.append(f"mfu {100 * rates['mfu']:.1f}%")
            if rates["hfu"] > rates["mfu"]:  # something is recomputed
                parts.append(f"hfu {100 * rates['hfu']:.1f}%")
        if row.get("memory"):
            parts.append(f"mem {row['memory'] / 2**30:.2f} GiB")
        parts.append(f"data {100 * rates['data_wait']:.0f}%")
        if self.total:
            parts.append(f"eta {clock((self.total - row['step']) * rates['seconds_per_step'])}")
        return "  ".join(parts)


def window_rates(rows: Sequence[Mapping[str, Any]], peak_flops: float | None) -> dict[str, Any]:
    """Rates over the wall-clock time of ``rows`` (which includes waiting for data), weighted by time.

    Returns ``seconds_per_step``, ``data_wait`` (fraction of the time), ``unit`` and ``per_second`` (of the first of ``counts``;
    None without counts), ``mfu`` and ``hfu`` (None if the FLOPs or the devices' peak are not known).
    """
    seconds = max(sum(row["seconds"] for row in rows), 1e-9)
    unit = next(iter(rows[-1].get("counts", {})), None)
    flops = sum(row.get("flops") or 0 for row in rows)
    hardware = sum(row.get("hardware_flops") or row.get("flops") or 0 for row in rows)
    return {
        "seconds_per_step": seconds / len(rows),
        "data_wait": sum(row.get("data_wait", 0.0) for row in rows) / seconds,
        "unit": unit,
        "per_second": sum(row["counts"][unit] for row in rows) / seconds if unit else None,
        "mfu": flops / seconds / peak_flops if peak_flops and flops else None,
        "hfu": hardware / seconds / peak_flops if peak_flops and flops else None,
    }


def short(value: float) -> str:
    """Three digits and a magnitude: 12.3k."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def clock(seconds: float) -> str:
    """h:mm:ss"""
    whole = round(max(seconds, 0.0))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
