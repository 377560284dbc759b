"""Several processes as one program: which launcher started them, and how a failure on one rank ends all of them.

The failing rank prints, once; the others hear of it through the rendezvous store and exit as well, even from within a
collective that would never return.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, MutableMapping
from typing import Any

from l3m_like.core.errors import UserError

#: seconds between two looks at the store, and that a rank which is told of a failure elsewhere has to end by itself
LOOK_S, GRACE_S = 0.5, 1.0
#: seconds that rank 0, which may host the store, waits for the others to leave
LEAVE_S = 5.0
#: seconds that other ranks leave rank 0 to report the same failure
FIRST_S = 1.0

#: (rank, processes, local rank) as other launchers than torchrun and accelerate name them
LAUNCHERS = (
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


def adopt_launcher(env: MutableMapping[str, str] | None = None) -> tuple[int, int]:
    """``(rank, world size)`` of this process; sets RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* where srun or mpirun started it.

    Raises:
        UserError: the environment is incomplete.
    """
    env = os.environ if env is None else env
    if "RANK" not in env:
        for rank, size, local in LAUNCHERS:
            if rank in env and int(env.get(size, "1")) > 1:
                env["RANK"], env["WORLD_SIZE"] = env[rank], env[size]
                env.setdefault("LOCAL_RANK", env.get(local, "0"))
                _set_master(env)
                break
    if "RANK" not in env:
        return 0, 1
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        raise UserError(
            f"RANK is set in the environment but {', '.join(missing)} is not. Start with torchrun or srun, or unset RANK."
        )
    return int(env["RANK"]), int(env["WORLD_SIZE"])


def _set_master(env: MutableMapping[str, str]) -> None:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    env.setdefault("MASTER_ADDR", first_node(nodes) if nodes else "127.0.0.1")
    # any free port that all ranks can name: jobs on one node differ in their number
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))


def first_node(nodes: str) -> str:
    """The first host of a Slurm node list: ``gpu[003-006,9],cpu1`` -> ``gpu003``."""
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    assert match is not None, nodes
    return match[1] + (match[2] or "")


class Failures:
    """The one channel on which ranks tell each other that they failed.

    Args:
        rank, world_size: of this process.
        debug: print full traces of user errors too.
    """

    def __init__(self, rank: int, world_size: int, *, debug: bool = False) -> None:
        self.rank, self.world_size, self.debug = rank, world_size, debug
        #: called once on this rank before it ends because of a failure, here or elsewhere (a sweep's table)
        self.last_words: Callable[[], None] | None = None
        self._over = threading.Event()
        self._store: Any = None
        self._watched: Any = None
        if world_size > 1:
            self._store, self._watched = self._connect(), self._connect()
            threading.Thread(target=self._watch, daemon=True, name="l3m_like-failures").start()

    def _connect(self) -> Any:
        """A client of the launcher's store (one per thread: a client is not shared). Needs the process group to be up."""
        import torch.distributed as dist

        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)
        return dist.PrefixStore(f"l3m_like/failures/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def _watch(self) -> None:
        while not self._over.wait(LOOK_S):
            try:
                failed = self._watched.check(["failed"])
            except Exception:  # rank 0 is gone, in an orderly way or not: collectives with it fail by themselves
                return
            if failed:
                if not self._over.wait(GRACE_S):
                    self._end(self._watched)
                return

    def close(self) -> None:
        """The work is done: stop watching, and leave together."""
        self._over.set()
        if self._store is not None:
            self._leave(self._store)

    def fail(self, error: BaseException) -> int:
        """Report ``error`` unless another rank did, and end this process (one of several) or return its exit code."""
        if self._store is None:
            self._print(error)
            self._speak()
            return 1
        if self._first():
            self._print(error)
        self._end(self._store)
        return 1

    def _first(self) -> bool:
        """Whether this rank is to print: rank 0 if it failed too, else whoever comes first."""
        try:
            if self.rank == 0:
                self._store.set("rank_0", "1")
            else:
                until = time.monotonic() + FIRST_S
                while time.monotonic() < until and not self._store.check(["rank_0"]):
                    time.sleep(0.05)
            first = self._store.add("count", 1) == 1
            self._store.set("failed", "1")
            return first
        except Exception:  # the store was in rank 0, which leaves last when it fails in an orderly way: so it was killed
            print(f"error: rank {self.rank} of {self.world_size} lost its connection to rank 0, which is gone", file=sys.stderr)
            return self.debug

    def _print(self, error: BaseException) -> None:
        sys.stdout.flush()
        if isinstance(error, UserError) and not self.debug:
            print(f"error: {error}", file=sys.stderr)
        else:
            where = f"rank {self.rank} of {self.world_size} failed:\n" if self.world_size > 1 else ""
            print(where + "".join(traceback.format_exception(error)), file=sys.stderr, end="")
        sys.stderr.flush()

    def _speak(self) -> None:
        words, self.last_words = self.last_words, None
        if words is not None:
            words()

    def _leave(self, store: Any) -> None:
        """Rank 0 goes last: a store that vanishes makes the others' clients print warnings."""
        with contextlib.suppress(Exception):
            store.add("left", 1)
            until = time.monotonic() + LEAVE_S
            while self.rank == 0 and store.add("left", 0) < self.world_size and time.monotonic() < until:
                time.sleep(0.05)

    def _end(self, store: Any) -> None:
        self._speak()
        self._leave(store)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # an orderly exit would wait for collectives that never return
