"""What holds for every file of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture(autouse=True, scope="module")
def no_process_group_is_left() -> Iterator[None]:
    """A group that a file made in this process would be taken by the next file for one of its own."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
