"""What holds for every file of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture(autouse=True)
def no_group_of_ranks_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that makes a process group of several ranks in this process ends it: another's run would wait for them."""
    before = dist.is_initialized()
    yield
    if not before and dist.is_initialized() and (ranks := dist.get_world_size()) > 1:
        dist.destroy_process_group()
        pytest.fail(f"{request.node.nodeid} leaves a process group of {ranks} ranks; end it with dist.destroy_process_group().")


@pytest.fixture(autouse=True, scope="module")
def each_file_has_its_own_group() -> Iterator[None]:
    """A run in this process makes a group of one rank, which all runs of the file share, and leaves it: a process has one."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
