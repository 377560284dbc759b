"""Tests for a machine with an NVIDIA GPU: ``python -m pytest -m gpu tests/gpu``. Without a GPU they are skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator

# cuBLAS reads it when it starts; without it two of its streams may share a workspace, and deterministic mode refuses
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Undo what a run sets for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="session", autouse=True)
def last() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
