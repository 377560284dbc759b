"""run/launcher.py with a training loop of a few lines in place of the real one: what the launcher tests start.

The loop reduces over all ranks, as a real one does, so that ranks out of step would hang or disagree.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import types
from typing import Any


def train(cfg: Any) -> dict[str, float]:
    import torch
    import torch.distributed as dist

    from l3m_like.config import start_run
    from l3m_like.core.errors import UserError

    start_run(cfg)
    rank = dist.get_rank()
    fault = os.environ.get("FAKE_FAULT", "")
    value = torch.tensor([cfg.optim.lr * cfg.model["dim"]], dtype=torch.float64)
    for step in range(cfg.steps or 1):
        if fault == f"user_error_rank_{rank}" and step == 1:
            raise UserError(f"only rank {rank} cannot read its shard; mount it")
        if fault == "user_error_all" and step == 1:
            raise UserError("batch.global = 5: it does not divide")
        if fault == "rank_0_waits_for_ever" and step == 1:
            if rank == 0:
                time.sleep(100)
            raise UserError("rank 1 is the one that knows why")
        if fault == f"kill_rank_{rank}" and step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == f"crash_rank_{rank}" and step == 1:
            raise RuntimeError("out of paper")
        if fault.startswith("bad_dim_") and cfg.model["dim"] == int(fault.removeprefix("bad_dim_")):
            raise UserError(f"dim = {cfg.model['dim']} is cursed")
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    ids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ids, (str(cfg.run_dir), cfg.run.id))
    assert len(set(ids)) == 1, ids
    with open(os.path.join(cfg.run_dir, f"seen_{rank}.txt"), "a") as file:
        file.write(
            f"{cfg.run.id} {os.environ.get('CUDA_VISIBLE_DEVICES')} {os.environ.get('MASTER_PORT')} {dist.get_world_size()}\n"
        )
    return {"loss": value.item(), "step": float(cfg.steps or 1)}


if __name__ == "__main__":
    sys.modules["l3m_like.training.train"] = module = types.ModuleType("l3m_like.training.train")
    module.train = train  # type: ignore[attr-defined]
    from l3m_like.config.cli import main

    sys.exit(main())
