"""`-m`: Hydra's sweeper decides on the jobs; they run in this process, in lock-step on all ranks, or where a Hydra launcher
starts them (`hydra/launcher=torchrun`).

In lock-step only rank 0 knows Hydra: it tells the others each job's overrides. So sweepers that are not deterministic work
too, the sweep's directory and the run ids come from rank 0, and the process group, made once, outlives the jobs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from l3m_like.config.compose import COMMAND_LINE, for_hydra, hydra_errors, parse_overrides, search_folders, search_path_override
from l3m_like.config.job import RECORD, Job, quoted, records, write_table
from l3m_like.config.own_data import split
from l3m_like.config.ranks import Failures
from l3m_like.config.run_config import RunConfig
from l3m_like.config.run_dir import cannot_write
from l3m_like.config.torchrun_launcher import register
from l3m_like.core.errors import Stopped, UserError


class _EndSweep(BaseException):
    """Carries a job's failure through Hydra, which would run the remaining jobs first."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def sweep(config: Path, overrides: Sequence[str], failures: Failures) -> int:
    """Run the sweep. Returns the exit code: 1 if a job failed.

    Raises:
        UserError: what is wrong with the sweep or with the config of one of its jobs; in lock-step, how one of them failed.
    """
    first = RunConfig.from_file(config, first_job(overrides))
    lockstep = failures.world_size > 1
    if failures.rank > 0:
        while (told := tell(None)) is not None:
            run_job(Job(*told))
        return 0
    digest = hashlib.sha1(repr((str(config), list(overrides))).encode()).hexdigest()[:6]
    folder = Path(first.run.dir) / f"{first.run.name}-sweep-{digest}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    for old in folder.glob(f"*/{RECORD}"):
        old.unlink()

    def table() -> None:
        if records(folder):
            print(f"\n{write_table(folder)}\n{folder / 'sweep.csv'}", flush=True)

    failures.last_words = table
    drive(config, overrides, folder, lockstep=lockstep)
    if lockstep:
        tell(None)
    failures.last_words = None
    table()
    failed = [record for record in records(folder) if record["status"] != "done"]
    for record in failed:
        print(f"error: job {record['job']} failed: {record['error']}", file=sys.stderr)
    return 1 if failed else 0


def tell(job: tuple[str, str, int, Sequence[str]] | None) -> tuple[str, str, int, Sequence[str]] | None:
    """Rank 0 tells the others the next job (None: there is none); they call it to hear."""
    from l3m_like.distributed import mesh

    return mesh.broadcast_object(job)


def first_job(overrides: Sequence[str]) -> list[str]:
    """The overrides with the first value of each sweep: a job that can be checked before the sweep starts."""
    first = []
    for override in parse_overrides(overrides):
        if override.is_hydra_override():
            continue
        if not override.is_sweep_override():
            first.append(override.input_line)
            continue
        if override.key_or_group in ("run.dir", "run.name", "run.id"):
            raise UserError(f"{override.input_line} ({COMMAND_LINE}): a sweep names its jobs' directories itself.")
        if override.is_discrete_sweep():
            first.append(f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}")
    return first


def drive(config: Path, overrides: Sequence[str], folder: Path, *, lockstep: bool) -> None:
    """Let Hydra run the jobs of the sweep (on rank 0). It writes nothing but `multirun.yaml`, in the sweep's folder."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    def task(_: Any) -> float:
        settings = HydraConfig.get()
        job = Job(str(config), str(folder), int(settings.job.num), [*own, *settings.overrides.task])
        if lockstep:
            tell((job.config, job.sweep_dir, job.number, job.overrides))
        try:
            return run_job(job)
        except Exception as error:
            status = "stopped" if isinstance(error, Stopped) else "failed"
            job.write(status, error=str(error).splitlines()[0] if str(error) else type(error).__name__)
            raise _EndSweep(error) from error

    folders = search_folders(config)
    own, overrides = split(overrides, parse_overrides(overrides))
    register(own)
    quiet = [
        f"hydra/{name}=none" for name in ("job_logging", "hydra_logging") if not any(f"hydra/{name}" in o for o in overrides)
    ]
    places = [f"hydra.sweep.dir={quoted(str(folder))}", "hydra.sweep.subdir='.'", "hydra.output_subdir=null"]
    argv = [sys.argv[0], "--multirun", search_path_override(folders), *for_hydra(overrides, folders), *quiet, *places]
    with _arguments(argv), hydra_errors(config, folders):
        try:
            hydra.main(config_path=str(config.parent), config_name=config.stem, version_base="1.3")(task)()
        except _EndSweep as end:
            raise end.error from None


def run_job(job: Job) -> float:
    """Train one job in this process; returns its final loss to the sweeper."""
    from l3m_like.config.cli import run
    from l3m_like.distributed import mesh

    rank, _ = mesh.init_process_group()
    if rank == 0:
        print(f"sweep: job {job.number}: {' '.join(job.shown())}", flush=True)
    metrics = run(RunConfig.from_file(job.config, job.all_overrides()))
    if rank == 0:
        job.write("done", metrics)
    return float(metrics.get("loss", "nan"))


@contextlib.contextmanager
def _arguments(argv: list[str]) -> Iterator[None]:
    """Hydra reads its command line from sys.argv, and hides exceptions unless the environment says otherwise."""
    before, variable = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = argv, "1"
    try:
        yield
    finally:
        sys.argv = before
        if variable is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = variable
