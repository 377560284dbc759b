"""How Hydra starts the jobs of a sweep: in this process (`basic`), or with ``hydra/launcher=torchrun`` each in processes of its
own, with GPUs and a port of its own; there a job that fails is named and leaves the sweep running.

Either checks the configs of all its jobs before the first one starts.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from l3m_like.config.compose import COMMAND_LINE
from l3m_like.config.job import Job, check_jobs
from l3m_like.config.schema import Launcher as LauncherSection
from l3m_like.config.strict import build
from l3m_like.core.errors import UserError

#: the name under which Hydra accepts this module
PLUGIN = "hydra_plugins.l3m_like"

#: what a surrounding launcher may have left in the environment
_RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


class InProcessLauncher(BasicLauncher):
    """Hydra's own, after a look at all jobs.

    Args:
        own: overrides of every job that Hydra does not know.
    """

    def __init__(self, own: Sequence[str] = ()) -> None:
        super().__init__()
        self.own = own

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        assert self.config is not None
        check_jobs(jobs_of(self.config, self.own, job_overrides, initial_job_idx))
        return super().launch(job_overrides, initial_job_idx)


class TorchrunLauncher(Launcher):
    """Starts one torchrun (one process: plain python) per job.

    Args:
        own: overrides of every job that Hydra does not know.
    """

    def __init__(self, own: Sequence[str] = ()) -> None:
        self.own = own

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("hydra/launcher=torchrun starts torchrun itself: start the sweep with plain python.")
        self.loader, self.config = hydra_context.config_loader, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs, as many at a time as ``launcher.parallel_jobs`` and the GPUs allow, and wait for all."""
        jobs = jobs_of(self.config, self.own, job_overrides, initial_job_idx)
        check_jobs(jobs)
        section = self._section(self.config)
        devices = visible_gpus()
        gpus = section.gpus_per_job if section.gpus_per_job is not None else min(1, len(devices))
        if gpus > len(devices):
            raise UserError(f"launcher.gpus_per_job = {gpus}: this machine has {len(devices)} GPUs.")
        slots = [devices[i : i + gpus] for i in range(0, len(devices) - gpus + 1, gpus)] if gpus else []
        at_once = section.parallel_jobs or (len(slots) if gpus else 1)
        if gpus and at_once > len(slots):
            raise UserError(f"launcher.parallel_jobs = {at_once}: {len(devices)} GPUs hold {len(slots)} jobs of {gpus}.")
        free: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
        for slot in slots[:at_once] or [[]] * at_once:
            free.put(slot)
        processes = section.processes_per_job or max(1, gpus)
        started: list[subprocess.Popen[bytes]] = []

        def one(job: Job) -> JobReturn:
            mine = free.get()
            try:
                return self._run(job, processes, mine, started)
            finally:
                free.put(mine)

        with ThreadPoolExecutor(at_once) as pool:
            try:
                return list(pool.map(one, jobs))
            except BaseException:  # Ctrl-C: jobs have process groups of their own and would live on
                pool.shutdown(wait=False, cancel_futures=True)
                for process in started:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGTERM)
                raise

    def _section(self, config: DictConfig) -> LauncherSection:
        given = OmegaConf.to_container(config.get("launcher") or OmegaConf.create({}), resolve=True)
        return build(LauncherSection, given, "launcher", lambda path: COMMAND_LINE)

    def _run(self, job: Job, processes: int, devices: list[str], started: list[subprocess.Popen[bytes]]) -> JobReturn:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
        command = [
            sys.executable,
            *torchrun,
            *this_program(module_flag=bool(torchrun)),
            "--config",
            job.config,
            *job.all_overrides(),
        ]
        env = {k: v for k, v in os.environ.items() if k not in _RANK_VARIABLES and not k.startswith("TORCHELASTIC_")}
        env["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        job.folder.mkdir(parents=True, exist_ok=True)
        print(f"sweep: job {job.number} starts: {' '.join(job.shown())}", flush=True)
        with open(job.folder / "log.txt", "wb") as log:
            process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            started.append(process)
            code = process.wait()
        result = job.folder / "result.json"
        out = JobReturn()
        out.overrides = job.overrides
        out.status = JobStatus.COMPLETED
        if code == 0 and result.is_file():
            metrics = json.loads(result.read_text())
            job.write("done", metrics)
            out.return_value = metrics.get("loss", float("nan"))
            return out
        error = reason(job.folder / "log.txt", code)
        job.write("failed", error=error)
        print(
            f"sweep: job {job.number} FAILED ({' '.join(job.shown())}): {error}\n       its output: {job.folder / 'log.txt'}",
            file=sys.stderr,
            flush=True,
        )
        out.return_value = float("nan")  # sweepers take it for a bad trial; an exception would end the sweep
        return out


def jobs_of(config: DictConfig, own: Sequence[str], job_overrides: Sequence[Sequence[str]], first: int) -> list[Job]:
    """The jobs that Hydra wants, numbered from ``first``, of the sweep that ``config`` describes."""
    hydra = config.hydra
    folder = next(source.path for source in hydra.runtime.config_sources if source.provider == "main")
    file = str(Path(folder) / f"{hydra.job.config_name}.yaml")
    given = ([text for text in overrides if not text.startswith("hydra")] for overrides in job_overrides)
    return [Job(file, str(hydra.sweep.dir), number, [*own, *overrides]) for number, overrides in enumerate(given, start=first)]


def this_program(*, module_flag: bool) -> list[str]:
    """How a job starts the launcher: as this process was."""
    script = Path(sys.argv[0])
    if script.suffix == ".py" and script.is_file() and script.name != "cli.py":
        return [str(script.resolve())]
    return ["-m", "l3m_like.config.cli"]


def visible_gpus() -> list[str]:
    """The GPUs that jobs may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def reason(log: Path, code: int) -> str:
    """One line on why a job failed: our own error if it printed one, else the last line of its output."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("error: ")]
    return ours[0].removeprefix("error: ") if ours else (lines[-1].strip() if lines else f"exit code {code}")


#: by the names that Hydra gets; `basic` is its default
LAUNCHERS: dict[str, type[Launcher]] = {"basic": InProcessLauncher, "torchrun": TorchrunLauncher}


@dataclass
class _Node:
    _target_: str
    own: list[str] = field(default_factory=list)


def register(own: Sequence[str] = ()) -> None:
    """Make our launchers known to Hydra.

    Hydra takes plugins from the namespace package `hydra_plugins` only. This module is entered under such a name, so that
    nothing has to be installed into that namespace (a clone runs as it is).

    Args:
        own: overrides of every job that Hydra does not know.
    """
    if PLUGIN not in sys.modules:
        try:
            namespace = importlib.import_module("hydra_plugins")
        except ModuleNotFoundError:  # no other plugin is installed
            namespace = sys.modules["hydra_plugins"] = types.ModuleType("hydra_plugins")
            namespace.__path__ = []
        sys.modules[PLUGIN] = namespace.l3m_like = sys.modules[__name__]  # type: ignore[attr-defined]
        for launcher in LAUNCHERS.values():
            launcher.__module__ = PLUGIN
            Plugins.instance().register(launcher)
    for name, launcher in LAUNCHERS.items():
        node = _Node(f"{PLUGIN}.{launcher.__name__}", list(own))
        ConfigStore.instance().store(group="hydra/launcher", name=name, node=node, provider="l3m_like")
