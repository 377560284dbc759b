"""One run = one directory and one id, equal on all ranks, kept when the same command is started again."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Any

from l3m_like.config.run_config import RunConfig, _leaves
from l3m_like.config.strict import show
from l3m_like.core.errors import UserError
from l3m_like.training.metrics import METRICS

#: what may change when a run goes on: how long, on what machines, what is reported and kept; not what is computed
MAY_CHANGE = (
    "steps",
    "epochs",
    "tokens",
    "batch.global",
    "batch.micro",
    "checkpoint",
    "data.max_bad_samples",
    "data.workers",
    "data.prefetch",
    "debug",
    "deterministic",
    "evals",
    "gc_every",
    "guard.max_bad_steps",
    "guard.spike_factor",
    "keep",
    "kernels",
    "launcher",
    "log",
    "parallel",
    "run",
    "sample",
)


def start_run(cfg: RunConfig) -> Path:
    """Make or continue the run's directory; fills in ``cfg.run.name`` and ``cfg.run.id``, saves the config there.

    Called on all ranks: rank 0 decides, the others hear of it. Calling it again does nothing new.

    Raises:
        UserError: the directory holds a run of another configuration, or cannot be written (on all ranks).
    """
    from l3m_like.distributed import mesh

    rank, _ = mesh.init_process_group()
    decided: Any = None
    if rank == 0:
        try:
            decided = cfg.run.name, cfg.run.id = _claim(cfg)
            cfg.save(cfg.run_dir)
        except UserError as error:
            decided = error
        except OSError as error:
            decided = cannot_write(cfg.run_dir, error)
    decided = mesh.broadcast_object(decided)
    if isinstance(decided, UserError):
        raise decided
    cfg.run.name, cfg.run.id = decided
    return cfg.run_dir


def cannot_write(folder: Path, error: OSError) -> UserError:
    """The error for a directory below `run.dir` that nothing can be written to."""
    return UserError(f"{folder} cannot be written: {error.strerror}. Give run.dir=..., a folder where you may write.")


def _claim(cfg: RunConfig) -> tuple[str, str]:
    """The run's name and id: new ones, or those of the run that its directory holds."""
    name = cfg.run.name or cfg.experiment
    fresh = cfg.run.id or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    if cfg.debug and "-debug-" not in name:
        return f"{name}-debug-{fresh}", fresh
    folder = Path(cfg.run.dir) / name
    if not (folder / "config.yaml").is_file():
        return name, fresh
    rename = f"Give the new run a name of its own (run.name=...), or the same values. The run is in {folder}."
    try:
        saved = RunConfig.from_file(folder / "config.yaml")
    except UserError as error:
        raise UserError(f"{folder} already holds a run, whose config.yaml cannot be read: {error} {rename}") from error
    if cfg.checkpoint.resume == "never" and cfg.run.id != saved.run.id:
        raise UserError(
            f"{folder} already holds a run, and checkpoint.resume is never. Give run.name=..., or remove that folder."
        )
    if cfg.run.id is not None and cfg.run.id != saved.run.id:
        raise UserError(f"run.id = {cfg.run.id}: the run in {folder} has the id {saved.run.id}. {rename}")
    difference = first_difference(saved, cfg)
    if difference and not any((folder / "checkpoints").glob("step_*")):
        # nothing was saved: begin anew, and keep what was logged
        if (folder / METRICS).exists():
            (folder / METRICS).rename(folder / f"metrics-{saved.run.id}.jsonl")
        return name, fresh
    if difference:
        path, before, now = difference
        raise UserError(
            f"{folder} already holds a run with another configuration: {path} is {show(before)} there and {show(now)} here "
            f"({cfg.origins.get(path, 'removed')}). {rename}"
        )
    return name, str(saved.run.id)


def first_difference(saved: RunConfig, cfg: RunConfig) -> tuple[str, Any, Any] | None:
    """``(path, saved value, new value)`` of the first setting that a continued run may not change."""
    before, now = _leaves(saved.to_dict()), _leaves(cfg.to_dict())
    for path in [*now, *(path for path in before if path not in now)]:
        if any(path == free or path.startswith(free + ".") for free in MAY_CHANGE):
            continue
        if before.get(path, _ABSENT) != now.get(path, _ABSENT):
            return path, before.get(path), now.get(path)
    return None


_ABSENT = object()
