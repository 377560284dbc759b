"""100 optimizer steps of ``train()`` against plain loops over the reference classes, in float32 (docs/trajectory.md)."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch
from trajectory import LOSS, NORM, STEPS, WEIGHTS, Faults, Trajectory, config, differences, draw, ours, plain, weight_difference


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny matrices: threads only get into each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def trained(kind: str) -> Trajectory:
    with tempfile.TemporaryDirectory() as run_dir:
        return ours(config(kind, Path(run_dir)))


def check(kind: str, wanted: Trajectory) -> None:
    """Assert that ``train()`` took the path of ``wanted``; the weights only if that is a whole run."""
    found = trained(kind)
    assert max(differences(found.losses, wanted.losses)) <= LOSS
    assert max(differences(found.norms, wanted.norms)) <= NORM
    if len(wanted.losses) == STEPS:
        # softmax ignores what all keys have in common: the gradient of this bias is rounding, which Adam blows up to a step
        assert weight_difference(found.weights, wanted.weights, ignored="k_proj.bias") <= WEIGHTS
        assert weight_difference(found.averages, wanted.averages, ignored="k_proj.bias") <= WEIGHTS


@pytest.mark.parametrize("kind", ["llm", "sit"])
def test_equals_a_plain_loop(kind: str, tmp_path: Path) -> None:
    cfg = config(kind, tmp_path)
    wanted, found = plain(cfg, kind), trained(kind)
    check(kind, wanted)
    # what is compared has to have happened
    assert len(found.losses) == STEPS and found.losses[-1] < 0.7 * found.losses[0]
    clipped = sum(norm > cfg.optim.clip for norm in found.norms)
    assert 10 <= clipped <= 90, "clipping is tested where some steps are clipped and some are not"
    assert cfg.batch.global_ == 2 * cfg.batch.micro and cfg.optim.weight_decay == 0.1 and cfg.schedule.name == "cosine"
    assert weight_difference(found.averages, found.weights) > 10 * WEIGHTS
    draw(found, wanted, ("ours", "reference"), kind, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


FAULTS = {
    "schedule one step off": ("llm", 6, Faults(schedule_shift=1)),
    "each group clipped by its own norm": ("llm", 6, Faults(clip_each=True)),
    "decay of norm weights": ("llm", 15, Faults(decay_vectors=True)),
    "mean of the micro-batches' means": ("llm", 30, Faults(micro_means=True)),
    "another eps in Adam": ("sit", 10, Faults(eps=1e-6)),
}


@pytest.mark.parametrize(("kind", "steps", "faults"), FAULTS.values(), ids=FAULTS)
def test_planted_fault_is_found(kind: str, steps: int, faults: Faults, tmp_path: Path) -> None:
    cfg = config(kind, tmp_path)
    with pytest.raises(AssertionError):
        check(kind, plain(cfg, kind, faults, steps))


@pytest.mark.slow
def test_average_taken_before_the_step_is_found(tmp_path: Path) -> None:
    wanted = plain(config("sit", tmp_path), "sit", Faults(average_first=True))
    with pytest.raises(AssertionError):
        check("sit", wanted)
