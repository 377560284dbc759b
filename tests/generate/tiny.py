"""Tiny runs of both kinds, with random weights that are nowhere zero, as files on disk."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch

from l3m_like.config.run_config import RunConfig
from l3m_like.training.checkpoint import Checkpointer
from l3m_like.training.load import Loaded, load
from l3m_like.training.train import train
from tests.parity.rule import perturb

CONFIGS = Path(__file__).parents[2] / "configs" / "experiment"
PROMPTS = ["ROMEO:", "To be, or not", "a", "Thou art"]
OVERRIDES = {
    "llm": ["dim=32", "layers=2", "heads=4", "kv_heads=2", "head_dim=8", "mlp_dim=48"],
    **dict.fromkeys(
        ("dllm", "block_diffusion"), ["dim=32", "layers=2", "heads=4", "kv_heads=2", "head_dim=8", "mlp_dim=48"]
    ),
    "sit": ["dim=16", "layers=2", "heads=2", "image_size=8", "patch=2"],
    "vit": ["dim=16", "layers=1", "heads=2", "image_size=8", "patch=4"],
}


def tiny(kind: str, *overrides: str, seed: int = 0) -> Loaded:
    """The model of ``kind`` (an experiment's name) in float64."""
    loaded = load(CONFIGS / f"{kind}.yaml", dtype="float64", overrides=[*OVERRIDES.get(kind, []), *overrides])
    perturb(loaded.model, seed)
    return loaded


def save_run(folder: Path, kind: str, *overrides: str, steps: tuple[int, ...] = (2,), precision: str = "fp64") -> Path:
    """A run's directory as training leaves it: weights of seed ``step`` at each step, averaged ones of seed ``100 + step``."""
    cfg = RunConfig.from_file(CONFIGS / f"{kind}.yaml", [*OVERRIDES.get(kind, []), f"parallel.precision={precision}", *overrides])
    folder.mkdir(parents=True, exist_ok=True)
    cfg.save(folder)
    checkpointer = Checkpointer(folder / "checkpoints", keep_last=len(steps), asynchronous=False)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    for step in steps:
        tensors = {f"model/{n}": p.detach().to(dtype) for n, p in tiny(kind, *overrides, seed=step).model.named_parameters()}
        tensors["optim/main/step"] = torch.ones(())  # what a sampler does not want
        if cfg.ema is not None:
            averaged = tiny(kind, *overrides, seed=100 + step).model.named_parameters()
            tensors |= {f"ema/{n}": p.detach().to(dtype) for n, p in averaged}
        checkpointer.save(step, tensors, {"step": step})
    checkpointer.close()
    return folder


def train_run(folder: Path, kind: str, *overrides: str, steps: int) -> Path:
    """A run that was trained in this process, in float64; its directory."""
    short = ["sequence=64", "lr=0.02", f"steps={steps}", "evals=null", "checkpoint.every=null", "log.console=false"]
    where = [f"run.dir={folder}", "run.name=trained", "parallel.precision=fp64"]
    with mock.patch("l3m_like.training.report.write_report", lambda *args: None):  # a second of matplotlib
        train(RunConfig.from_file(CONFIGS / f"{kind}.yaml", [*OVERRIDES[kind], *short, *where, *overrides]))
    return folder / "trained"
