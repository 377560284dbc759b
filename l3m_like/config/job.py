"""One job of a sweep: its directory, the overrides that make it, and the record that the sweep's table is made of."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l3m_like.config.run_config import RunConfig
from l3m_like.core.errors import UserError

RECORD = "job.json"


@dataclass(frozen=True)
class Job:
    """Job ``number`` of the sweep in ``sweep_dir``: the file ``config`` with ``overrides``."""

    config: str
    sweep_dir: str
    number: int
    overrides: Sequence[str]

    @property
    def name(self) -> str:
        """Its directory's name: the number, and its values, so that a sweep that is started again finds its jobs."""
        return f"{self.number:02d}-{hashlib.sha1(repr(list(self.overrides)).encode()).hexdigest()[:6]}"

    @property
    def folder(self) -> Path:
        return Path(self.sweep_dir) / self.name

    def all_overrides(self) -> list[str]:
        """The overrides with the job's own directory."""
        return [*self.overrides, f"run.dir={quoted(self.sweep_dir)}", f"run.name={quoted(self.name)}"]

    def shown(self) -> list[str]:
        """The overrides as the user wrote them."""
        return [text.lstrip("+") for text in self.overrides]

    def write(self, status: str, metrics: Mapping[str, Any] | None = None, error: str = "") -> None:
        """Record how it ended."""
        self.folder.mkdir(parents=True, exist_ok=True)
        values = dict(text.partition("=")[::2] for text in self.shown())
        record = {"job": self.number, "status": status, "overrides": values, "metrics": dict(metrics or {}), "error": error}
        (self.folder / RECORD).write_text(json.dumps(record), encoding="utf-8")


def check_jobs(jobs: Sequence[Job]) -> None:
    """Compose and check the configs of all jobs, before the first of them starts.

    Raises:
        UserError: what is wrong with one of them, and which it is.
    """
    for job in jobs:
        try:
            RunConfig.from_file(job.config, job.all_overrides())
        except UserError as error:
            raise UserError(f"job {job.number} of the sweep ({' '.join(job.shown())}); no job was started: {error}") from error


def quoted(text: str) -> str:
    """A string as the value of a Hydra override."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def records(sweep_dir: str | Path) -> list[dict[str, Any]]:
    """What the sweep's jobs recorded, by number."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in Path(sweep_dir).glob(f"*/{RECORD}")]
    return sorted(found, key=lambda record: record["job"])


def write_table(sweep_dir: str | Path) -> str:
    """Write `sweep.csv`: a row per job with its overrides and final metrics. Returns the same as text."""
    rows = [
        {"job": r["job"], "status": r["status"]} | r["overrides"] | r["metrics"] | ({"error": r["error"]} if r["error"] else {})
        for r in records(sweep_dir)
    ]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns.sort(key=lambda column: column == "error")  # last
    with open(Path(sweep_dir) / "sweep.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    cells = [columns, *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
