"""Worker processes for distributed tests: made once per world size, shared by all tests of a pytest process.

A task is a module-level function ``f(*args)`` that every rank runs inside one gloo process group; the results come back in
rank order. A task that raises on any rank fails the test with that rank's traceback, and the pool is started afresh.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from typing import Any

IMPORTED = (
    *("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "l3m_like.training.train"),
    "tests.distributed.imported",
)

_pools: dict[int, Pool] = {}


class TaskFailed(AssertionError):
    """A rank raised; the message holds its traceback."""


def _serve(rank: int, world_size: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    gc.freeze()  # what was imported before the fork: a collection need not look at it, nor copy its pages
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    while True:
        task = pipe.recv()
        if task is None:
            break
        function, args = task
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    os._exit(0)  # no destructors of a process group whose peers may be gone


def clean_forks() -> BaseContext:
    """Processes forked from a server that has imported everything and computed nothing: a fork of a process whose autograd
    threads have run cannot use autograd."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    return context


class Pool:
    """``world_size`` processes in one process group."""

    def __init__(self, world_size: int) -> None:
        context = clean_forks()
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, store, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 110.0) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        pending = dict(enumerate(self.pipes))
        while pending:
            ready = wait(list(pending.values()), timeout=timeout)
            if not ready:
                raise TaskFailed(f"{function.__name__}: ranks {sorted(pending)} did not answer within {timeout} s")
            for rank, pipe in list(pending.items()):
                if pipe in ready:
                    try:
                        good, value = pipe.recv()
                    except EOFError:
                        raise TaskFailed(f"rank {rank} of {len(self.pipes)} died in {function.__name__}") from None
                    if not good:
                        raise TaskFailed(f"rank {rank} of {len(self.pipes)} in {function.__name__}:\n{value}")
                    results[rank] = value
                    del pending[rank]
        return [results[rank] for rank in range(len(self.pipes))]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        self._folder.cleanup()


def run(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 110.0) -> list[Any]:
    """Run ``function(*args)`` on every rank of the shared pool of ``world_size`` processes; results in rank order."""
    if world_size not in _pools:
        _pools[world_size] = Pool(world_size)
    try:
        return _pools[world_size].run(function, *args, timeout=timeout)
    except TaskFailed:
        _pools.pop(world_size).close()  # the ranks that did not fail may wait for the one that did
        raise


def _answer(pipe: Connection, function: Callable[..., Any], *args: Any) -> None:
    try:
        pipe.send((True, function(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    os._exit(0)


def alone(function: Callable[..., Any], *args: Any, timeout: float = 110.0) -> Any:
    """Run ``function(*args)`` in a process of its own, without a process group; what it returns."""
    context = clean_forks()
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, *args), daemon=True)  # type: ignore[attr-defined]
    process.start()
    theirs.close()
    try:
        if not ours.poll(timeout):
            raise TaskFailed(f"{function.__name__} did not answer within {timeout} s")
        good, value = ours.recv()
    finally:
        process.kill()
        process.join()
    if not good:
        raise TaskFailed(f"{function.__name__}:\n{value}")
    return value


@atexit.register
def _close_all() -> None:
    for pool in _pools.values():
        pool.close()
