"""What each way of keeping activations costs in time, and what it saves: a step per mode, on the device that is there."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from l3m_like.benchmarks.bench import bench
from l3m_like.config import RunConfig
from l3m_like.config.schema import Offload
from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.training.check import examine

#: name -> (parallel.checkpoint, parallel.offload)
MODES: dict[str, tuple[Any, Offload | None]] = {
    "none": ("none", None),
    "selective": ("selective", None),
    "selective, attention": ({"save": ["attention"]}, None),
    "selective, every 2nd matmul": ({"save": ["attention", "every_second_matmul"]}, None),
    "every 2nd unit": (2, None),
    "full": ("full", None),
    "offload": ("none", Offload()),
    "full, offload": ("full", Offload()),
    "selective, offload": ("selective", Offload()),
}


def bench_memory(cfg: RunConfig, modes: Sequence[str] = (), *, steps: int = 10, warmup: int = 5) -> dict[str, Any]:
    """``bench`` of ``cfg`` once per mode, one after the other; every rank calls it.

    Returns:
        JSON values: ``config``, ``compiled``, ``facts`` of the last run, and ``modes``: per name ``seconds`` and ``memory`` (peak
        bytes) as ``bench`` measures them, ``estimate`` (bytes, of ``--check``) and ``recomputed`` (FLOPs of a step on this rank
        beyond those of "none", of eager units); or ``error``: "out of memory", or why the mode was refused.
    """
    for name in modes:
        if name not in MODES:
            raise UserError(f"bench_memory: no mode '{name}'. {did_you_mean(name, MODES)}")
    least = examine(_with(cfg, "none"), model_only=True).numbers["computed"]
    found = {name: _estimate(_with(cfg, name), least) for name in modes or MODES}
    facts: dict[str, Any] = {}
    for name, row in found.items():
        if "error" in row:
            continue
        try:
            result = bench(_with(cfg, name), steps, warmup=warmup)
            row |= {"seconds": result["seconds"], "memory": result["memory"]}
            facts = result["facts"]
        except torch.OutOfMemoryError:
            if dist.get_world_size() > 1:
                raise  # the others wait for this one
            row["error"] = "out of memory"
        _forget()
    return {"config": cfg.experiment, "compiled": cfg.parallel.compile, "facts": facts, "modes": found}


def _estimate(cfg: RunConfig, least: int) -> dict[str, Any]:
    try:
        numbers = examine(cfg, model_only=True).numbers
    except UserError as error:  # a combination that is refused
        return {"error": str(error)}
    return {"estimate": numbers["memory"]["total"], "recomputed": numbers["computed"] - least}


def _with(cfg: RunConfig, mode: str) -> RunConfig:
    changed = copy.deepcopy(cfg)
    changed.parallel.checkpoint, changed.parallel.offload = copy.deepcopy(MODES[mode])
    return changed


def _forget() -> None:
    """Nothing of one mode is in the memory or the compiled code of the next."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(result: Mapping[str, Any]) -> str:
    """``result`` of ``bench_memory`` as a short text."""
    rows = [("mode", "step ms", "peak GiB", "estimate GiB", "recomputed TFLOP")]
    for name, row in result["modes"].items():
        measured = (f"{1e3 * row['seconds']:.1f}", f"{row['memory'] / 2**30:.2f}") if "seconds" in row else (row["error"], "")
        expected = (f"{row['estimate'] / 2**30:.2f}", f"{row['recomputed'] / 1e12:.3g}") if "estimate" in row else ("", "")
        rows.append((name, *measured, *expected))
    widths = [max(len(row[i]) for row in rows if len(row[1]) < 20 or i != 1) for i in range(len(rows[0]))]
    device = result["facts"].get("device", "nothing ran")
    head = f"{result['config']}{', compiled' if result['compiled'] else ''}, {device}"
    return "\n".join([head, *("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)])
