"""The launcher with a training loop of a few lines: run directories, failures, sweeps; in process where one process will do."""

from __future__ import annotations

import csv
import importlib.util
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from l3m_like.config import RunConfig, start_run
from l3m_like.config.cli import main
from l3m_like.config.ranks import adopt_launcher, first_node
from l3m_like.config.run_dir import MAY_CHANGE
from l3m_like.core.errors import UserError

ROOT = Path(__file__).parents[2]
TOY = Path(__file__).parent / "own" / "toy.yaml"
FAKE = Path(__file__).parent / "fake_launcher.py"


# ---- one process, in this one ----------------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[RunConfig]]:
    """One process without a process group; `train` records the runs that it is given."""
    from l3m_like.distributed import mesh

    seen: list[RunConfig] = []

    def train(cfg: RunConfig) -> dict[str, float]:
        start_run(cfg)
        seen.append(cfg)
        if cfg.model["dim"] == 13:
            raise UserError("dim = 13: unlucky")
        return {"loss": cfg.optim.lr * cfg.model["dim"], "heldout/loss": 2.0}

    fake = types.ModuleType("l3m_like.training.train")
    fake.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "l3m_like.training.train", fake)
    monkeypatch.setattr(mesh, "init_process_group", lambda: (0, 1))
    monkeypatch.setattr(mesh, "broadcast_object", lambda value: value)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield seen
    assert Path.cwd() == tmp_path  # Hydra does not change it


def launch(*overrides: str) -> int:
    return main(["--config", str(TOY), *overrides])


def test_the_same_command_continues_the_run(alone: list[RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert launch() == 0
    first = alone[0]
    assert first.run_dir == Path("runs/toy") and first.run.id
    saved = yaml.safe_load(Path("runs/toy/config.yaml").read_text())
    assert saved["run"]["id"] == first.run.id and saved["optim"]["eps"] == 1e-8
    assert json.loads(Path("runs/toy/result.json").read_text())["loss"] == pytest.approx(0.008)
    # the same again, a longer run, and the saved config itself: one id, one directory
    assert launch() == 0 and launch("steps=100") == 0 and main(["--config", "runs/toy/config.yaml", "steps=100"]) == 0
    assert {cfg.run.id for cfg in alone} == {first.run.id} and {cfg.run_dir for cfg in alone} == {Path("runs/toy")}
    assert yaml.safe_load(Path("runs/toy/config.yaml").read_text())["steps"] == 100
    # once something is saved, another configuration is refused, and told what to do
    Path("runs/toy/checkpoints/step_00000001").mkdir(parents=True)
    assert launch("optim.lr=0.5") == 1
    error = capsys.readouterr().err
    assert "optim.lr is 0.001 there and 0.5 here (command line)" in error and "run.name=" in error
    assert launch("optim.lr=0.5", "run.name=other") == 0 and alone[-1].run_dir == Path("runs/other")
    assert launch("checkpoint.resume=never") == 1 and "resume is never" in capsys.readouterr().err
    assert launch("run.id=mine") == 1 and "has the id" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["runs"]  # no outputs/, no multirun/


def test_a_crash_while_saving_leaves_the_old_config(alone: list[RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch() == 0
    before = Path("runs/toy/config.yaml").read_text()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        start_run(RunConfig.from_file(TOY, ["steps=7"]))
    assert Path("runs/toy/config.yaml").read_text() == before


def test_a_folder_that_cannot_be_written(alone: list[RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    for more in ((), ("-m", "dim=4,8")):
        assert launch("run.dir=file", *more) == 1
        assert "cannot be written: Not a directory. Give run.dir=" in capsys.readouterr().err
    assert not alone


def test_debug_has_a_folder_of_its_own(alone: list[RunConfig]) -> None:
    assert launch() == 0 and launch("--debug") == 0 and main(["--config", "runs/toy/config.yaml", "--debug", "optim.lr=1"]) == 0
    names = [cfg.run.name or "" for cfg in alone]
    assert names[0] == "toy" and names[1].startswith("toy-debug-") and names[2].startswith("toy-debug-")
    assert main(["--config", f"runs/{names[1]}/config.yaml"]) == 0 and alone[-1].run.name == names[1]  # that one goes on


def test_sweep_in_one_process(alone: list[RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    argv = sys.argv
    assert launch("-m", "dim=4,8", "optim.lr=1e-3,1e-2", "parallel.tp=1") == 0
    assert sys.argv is argv
    assert [(cfg.model["dim"], cfg.optim.lr) for cfg in alone] == [(4, 1e-3), (4, 1e-2), (8, 1e-3), (8, 1e-2)]
    assert len({cfg.run_dir for cfg in alone}) == 4 and len({cfg.run.id for cfg in alone}) == 4
    (folder,) = Path("runs").iterdir()
    assert all(cfg.run_dir.parent == folder for cfg in alone)
    with open(folder / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["dim"], row["optim.lr"], float(row["loss"])) for row in rows][1] == ("4", "0.01", 0.04)
    assert rows[0].keys() == {"job", "status", "dim", "optim.lr", "parallel.tp", "loss", "heldout/loss"}
    out = capsys.readouterr().out
    assert "job  status  dim  optim.lr" in out and "sweep.csv" in out
    # the same command goes on in the same folders
    assert launch("-m", "dim=4,8", "optim.lr=1e-3,1e-2", "parallel.tp=1") == 0
    assert [cfg.run.id for cfg in alone[4:]] == [cfg.run.id for cfg in alone[:4]]
    assert sorted(os.listdir()) == ["runs"]


def test_a_failing_job_ends_a_sweep_in_step(alone: list[RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("-m", "dim=4,13,8") == 1
    assert [cfg.model["dim"] for cfg in alone] == [4, 13]
    captured = capsys.readouterr()
    assert captured.err.strip() == "error: dim = 13: unlucky"
    assert "failed" in captured.out and "done" in captured.out  # the table is printed all the same


def test_sweep_errors(alone: list[RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    for overrides, part in {
        ("optim.lrr=1,2",): "Did you mean 'lr'?",
        ("dmi=1,2",): "Did you mean 'dim'?",
        ("run.name=a,b",): "names its jobs' directories itself",
        ("dim=1,2", "hydra/launcher=torchrnu"): "torchrnu",
        ("dim=4,8,wide",): "job 2 of the sweep (dim=wide); no job was started: model.",
        ("dim=4,8,wide", "hydra/launcher=torchrun"): "job 2 of the sweep (dim=wide); no job was started: model.",
    }.items():
        assert launch("-m", *overrides) == 1
        assert part in capsys.readouterr().err
    assert not alone and not list(Path("runs").glob("*/*/"))


def test_the_environment_of_other_launchers() -> None:
    assert adopt_launcher({}) == (0, 1)
    assert adopt_launcher({"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}) == (3, 4)
    slurm = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456"}
    slurm["SLURM_STEP_NODELIST"] = "gpu[003-006,9],cpu1"
    assert adopt_launcher(slurm) == (5, 8)
    assert (slurm["MASTER_ADDR"], slurm["MASTER_PORT"], slurm["LOCAL_RANK"]) == ("gpu003", "23456", "1")
    # inside a batch script, without srun, there is one process whatever the job holds
    assert adopt_launcher({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == (0, 1)
    assert adopt_launcher({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}) == (1, 2)
    with pytest.raises(UserError, match="MASTER_ADDR, MASTER_PORT is not"):
        adopt_launcher({"RANK": "0", "WORLD_SIZE": "2"})
    assert [first_node(nodes) for nodes in ("a1", "a1,b2", "node[7,9]", "n-[01-02]x")] == ["a1", "a1", "node7", "n-01"]


def test_what_may_change_is_documented() -> None:
    text = (ROOT / "docs" / "configs.md").read_text()
    assert all(f"`{name}`" in text for name in MAY_CHANGE)


# ---- several processes -----------------------------------------------------------------------------------------------

Outcome = tuple[list[int], str]

#: ranks are forked from a clean process that imports once: a fork of the tests' own, with the threads that earlier tests started
#: in it, may wait for ever for a lock that one of them held
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__])


def rank_process(argv: Sequence[str], env: dict[str, str], folder: Path) -> None:
    """One rank, in a process that has imported everything already."""
    os.environ.update(env)
    os.chdir(folder)
    descriptor = os.open(folder / f"output_{os.getpid()}.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    spec = importlib.util.spec_from_file_location("fake_launcher", FAKE)
    assert spec is not None and spec.loader is not None
    fake = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fake)
    sys.modules["l3m_like.training.train"] = fake
    code = main(["--config", str(TOY), *argv])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@pytest.fixture
def processes(tmp_path: Path) -> Callable[..., Outcome]:
    """Run the launcher as n ranks, as torchrun or srun would start them; -> (exit codes, output of all)."""

    def start(n: int, *argv: str, slurm: bool = False, patience_s: float = 50.0, **env: str) -> Outcome:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        started = []
        for rank in range(n):
            place = {"RANK": str(rank), "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            if slurm:
                place = {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(n), "SLURM_LOCALID": str(rank)}
                place |= {"MASTER_PORT": str(port), "SLURM_STEP_NODELIST": "localhost"}
            started.append(SERVER.Process(target=rank_process, args=(argv, place | env, tmp_path)))
            started[-1].start()
        for process in started:
            process.join(patience_s)
        outputs = [(tmp_path / f"output_{process.pid}.txt").read_text() for process in started]
        codes = [-1 if process.exitcode is None else process.exitcode for process in started]
        for process in started:
            process.kill()
        return codes, "".join(outputs)

    return start


def popen(command: Sequence[str], folder: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("slurm", [False, True])
def test_one_directory_and_id_on_all_ranks(processes: Callable[..., Outcome], tmp_path: Path, slurm: bool) -> None:
    codes, errors = processes(3, slurm=slurm)  # the fake loop asserts that directory and id are equal
    assert codes == [0, 0, 0], errors
    assert sorted(p.name for p in (tmp_path / "runs" / "toy").glob("seen_*")) == ["seen_0.txt", "seen_1.txt", "seen_2.txt"]


@pytest.mark.parametrize(
    ("fault", "argv", "message"),
    [
        ("", ["optim.lrr=1"], "Did you mean 'lr'?"),  # on all ranks, before anything
        ("user_error_all", [], "it does not divide"),  # on all ranks, in the loop
        ("user_error_rank_1", [], "only rank 1 cannot read its shard"),  # rank 0 is in a collective
        ("rank_0_waits_for_ever", [], "rank 1 is the one that knows why"),  # and here it would never return
    ],
)
def test_an_error_is_printed_once_and_ends_every_rank(
    processes: Callable[..., Outcome], fault: str, argv: list[str], message: str
) -> None:
    codes, errors = processes(2, *argv, FAKE_FAULT=fault)
    assert codes == [1, 1]
    ours = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(ours) == 1 and message in ours[0], errors
    assert "Traceback" not in errors


def test_rank_0_killed_is_told_by_the_others(processes: Callable[..., Outcome]) -> None:
    """Here rank 0 hosts the store, as under srun: the other ranks lose the channel itself."""
    codes, errors = processes(2, FAKE_FAULT="kill_rank_0")
    assert codes == [-9, 1]
    assert "error: rank 1 of 2 lost its connection to rank 0" in errors and "Traceback" not in errors


def test_a_crash_shows_its_own_trace_only(processes: Callable[..., Outcome]) -> None:
    codes, errors = processes(2, FAKE_FAULT="crash_rank_1")
    assert codes == [1, 1] and errors.count("Traceback") == 1
    assert "rank 1 of 2 failed" in errors and "out of paper" in errors


SWEEP = ["-m", "dim=4,8", "optim.lr=1e-3,1e-2,1e-1"]


def assert_swept(folder: Path, out: str) -> None:
    """Six jobs, each once on both ranks, told of by rank 0 alone."""
    (table,) = folder.glob("runs/toy-sweep-*/sweep.csv")
    with open(table) as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == pytest.approx([0.004, 0.04, 0.4, 0.008, 0.08, 0.8])
    assert out.count("sweep: job ") == 6 and out.count("job  status") == 1
    assert len(list(table.parent.glob("*/seen_1.txt"))) == 6 and os.listdir(folder / "runs") == [table.parent.name]


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_sweep_in_lock_step(processes: Callable[..., Outcome], tmp_path: Path, times: int) -> None:
    for _ in range(times):
        codes, out = processes(2, *SWEEP, patience_s=50.0 if times == 1 else 200.0)
        assert codes == [0, 0], out
        assert_swept(tmp_path, out)
        assert {path.name for path in tmp_path.iterdir() if path.suffix != ".txt"} == {"runs"}
        shutil.rmtree(tmp_path / "runs")


@pytest.mark.slow
def test_sweep_in_lock_step_under_torchrun(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = popen([*torchrun, str(FAKE), "--config", str(TOY), *SWEEP], tmp_path, {})
    out, err = process.communicate(timeout=110)
    assert process.returncode == 0, err
    assert_swept(tmp_path, out)


def test_a_failing_job_ends_the_lock_step_sweep_on_all_ranks(processes: Callable[..., Outcome], tmp_path: Path) -> None:
    codes, errors = processes(2, "-m", "dim=4,8,16", FAKE_FAULT="bad_dim_8")
    assert codes == [1, 1] and errors.count("error: dim = 8 is cursed") == 1
    (table,) = tmp_path.glob("runs/*/sweep.csv")
    with open(table) as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["done", "failed"]


def test_torchrun_launcher(tmp_path: Path) -> None:
    """Jobs with a GPU of their own, two at a time; one fails, is named, and the other goes on."""
    command = [
        sys.executable,
        str(FAKE),
        "--config",
        str(TOY),
        "-m",
        "dim=8,4",
        "hydra/launcher=torchrun",
    ]
    process = popen(command, tmp_path, {"CUDA_VISIBLE_DEVICES": "5,7", "FAKE_FAULT": "bad_dim_8"})
    out, err = process.communicate(timeout=110)
    assert process.returncode == 1
    assert "job 0 FAILED (dim=8): dim = 8 is cursed" in err and "log.txt" in err
    (table,) = tmp_path.glob("runs/*/sweep.csv")
    with open(table) as file:
        rows = list(csv.DictReader(file))
    assert [(row["status"], row["loss"]) for row in rows] == [("failed", ""), ("done", "0.004")]
    (seen,) = table.parent.glob("*/seen_0.txt")
    assert seen.read_text().split()[1] in ("5", "7") and os.listdir(tmp_path) == ["runs"] and "job  status" in out


@pytest.mark.slow  # three processes and their imports for each job
@pytest.mark.parametrize("dims", ["4", "4,8"])
def test_torchrun_launcher_with_processes(tmp_path: Path, dims: str) -> None:
    argv = ["-m", f"dim={dims}", "hydra/launcher=torchrun", "launcher.processes_per_job=2", "launcher.parallel_jobs=2"]
    process = popen([sys.executable, str(FAKE), "--config", str(TOY), *argv], tmp_path, {"CUDA_VISIBLE_DEVICES": ""})
    _, err = process.communicate(timeout=110)
    assert process.returncode == 0, err
    seen = [path.read_text().split() for path in sorted(tmp_path.glob("runs/*/*/seen_*.txt"))]
    jobs = len(dims.split(","))
    assert len(seen) == 2 * jobs and {words[-1] for words in seen} == {"2"}
    assert len({words[-2] for words in seen}) == jobs  # a port per job
