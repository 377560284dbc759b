"""Runs small trainings in forked processes and kills them; test_checkpoint.py starts it and talks to it.

``python checkpoint_driver.py FOLDER`` reads a job (JSON) per line of its input and answers with a line. A job is a list of
launches of one run directory. One process imports torch and forks all ranks, so that a launch costs a fraction of a second.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # the first DTensor imports it, for seconds: once here, not in every fork
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from l3m_like.training import checkpoint
from l3m_like.training.metrics import MetricsLog

STEPS, SAVE_EVERY, LOG_EVERY = 9, 3, 2
SHAPES = {"model/w": (40, 33), "model/odd": (5, 3), "model/scalar": ()}


def train(rank: int, world: int, run_dir: Path, launch: dict) -> dict:
    """A run whose loss depends on every step before it: momentum on noise. Resumes by itself, like a real one."""
    if world > 1:
        store = dist.FileStore(str(run_dir / f"store_{launch['number']}"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,)) if world > 1 else None

    def place(full: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None) if mesh is not None and full.ndim else full

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    weights = {name: place(torch.zeros(shape, dtype=torch.float64)) for name, shape in SHAPES.items()}
    momentum = {f"optim/{name}": place(torch.zeros(shape, dtype=torch.float64)) for name, shape in SHAPES.items()}
    tensors = weights | momentum
    checkpointer = checkpoint.Checkpointer(run_dir / "checkpoints", keep_last=1, asynchronous=launch.get("asynchronous", True))
    step = 0
    if (found := checkpointer.resume(tensors)) is not None:
        step = found[1]["step"]
        assert step == found[0]
    checkpointer.clean()
    resumed = step
    log = MetricsLog(run_dir, is_main=rank == 0, resume_step=step)
    saves = 0

    def on_point(point: str) -> None:
        kill = launch.get("kill", {})
        if kill.get("point") == point and rank in kill["ranks"] and saves == 2:
            if launch.get("fault"):  # what a library does that commits before its data is written
                marker = json.dumps({"step": 2 * SAVE_EVERY, "files": {}, "sha256": {}})
                (run_dir / "checkpoints" / f"step_{2 * SAVE_EVERY:08d}" / "COMMITTED").write_text(marker)
                (run_dir / "checkpoints" / "latest").write_text(f"{2 * SAVE_EVERY}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.on_point = on_point
    rows: list[dict] = []
    while step < STEPS:
        for number, name in enumerate(SHAPES):
            noise = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(100 * step + number), dtype=torch.float64)
            momentum[f"optim/{name}"].mul_(0.9).add_(place(noise))
            weights[name].add_(momentum[f"optim/{name}"], alpha=-0.1)
        if launch.get("kill", {}).get("point") == "mid_step" and rank in launch["kill"]["ranks"] and step == 4:
            checkpointer.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        # a collective on the default group while the save before runs its own on another
        loss = sum(float(whole(value).square().sum()) for value in weights.values())
        time.sleep(launch.get("sleep", 0.0))
        step += 1
        rows.append({"step": step, "loss": loss, "refs": [2 * step, 2 * step + 1]})
        saving = step % SAVE_EVERY == 0
        if saving or step % LOG_EVERY == 0:
            log.write(rows)
            rows.clear()
        if saving:
            checkpointer.wait()  # so that a point belongs to one save
            saves += 1
            checkpointer.save(step, tensors, {"step": step, "rate": 0.1 * step})
    checkpointer.close()
    log.close()
    return {"resumed": resumed}


def fork(rank: int, world: int, run_dir: Path, launch: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(run_dir / f"log_{launch['number']}_{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(out, 2)
        logging.basicConfig(level=logging.WARNING)
        (run_dir / f"result_{launch['number']}_{rank}").write_text(json.dumps(train(rank, world, run_dir, launch)))
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(code)


def run(run_dir: Path, launch: dict) -> list[int]:
    """Start all ranks, and wait as torchrun does: when one fails, the others are killed. Returns the exit codes."""
    world = launch["world"]
    pids = [fork(rank, world, run_dir, launch) for rank in range(world)]
    codes: dict[int, int] = {}
    began = time.monotonic()
    deadline = began + 30
    while len(codes) < world:
        for rank, pid in enumerate(pids):
            if rank not in codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(done[1])
                if codes[rank]:
                    deadline = min(deadline, time.monotonic() + 0.5)
        now = time.monotonic()
        if now > deadline or ("after" in launch and now > began + launch["after"]):
            for rank, pid in enumerate(pids):
                if rank not in codes:
                    os.kill(pid, signal.SIGKILL)
                    codes[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.002)
    return [codes[rank] for rank in range(world)]


def do(folder: Path, job: dict) -> dict:
    run_dir = folder / job["name"]
    run_dir.mkdir()
    launches = []
    for number, launch in enumerate(job["launches"]):
        launch["number"] = number
        if "random" in launch:
            launch["after"] = random.Random(launch["random"]).uniform(0.0, launch["within"])
        codes = run(run_dir, launch)
        result = run_dir / f"result_{number}_0"
        logs = "".join(path.read_text() for path in sorted(run_dir.glob(f"log_{number}_*")))
        launches.append({"codes": codes, "log": logs} | (json.loads(result.read_text()) if result.exists() else {}))
    metrics = run_dir / "metrics.jsonl"
    return {
        "launches": launches,
        "metrics": metrics.read_text() if metrics.exists() else "",
        "left": sorted(path.name for path in (run_dir / "checkpoints").glob("*")),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(do(Path(sys.argv[1]), json.loads(line))), flush=True)
