"""What all ranks agree on before a step: one small vector, summed on the CPU group while the device still works on the
previous step."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l3m_like.core.random import key_of
from l3m_like.data.loader import Loader, Step
from l3m_like.distributed.mesh import Mesh
from l3m_like.training.evaluate import to_device
from l3m_like.training.updates import Update


class Signals:
    """SIGTERM, SIGUSR1 and Ctrl-C ask for a save and an end at the next step; a second Ctrl-C ends at once. ``restore`` gives the
    old handlers back."""

    def __init__(self) -> None:
        self.asked = False
        self._old: dict[int, Any] = {}
        try:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._old[number] = signal.signal(number, self._ask)
        except ValueError:  # not in the main thread (a notebook, a test): the default handlers stay
            pass

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


@dataclass
class Upcoming:
    """The next step's batch, and what all ranks said of it."""

    batch: Step
    word: Tensor
    names: list[str]
    #: seconds waited for it, and for that of the slowest rank
    data_wait: float

    def agreed(self) -> tuple[Step, dict[str, float], bool]:
        """``(batch, {term: global count}, stop)``."""
        _, stop, *counts = self.word.tolist()
        return self.batch, dict(zip(self.names, counts, strict=True)), stop > 0


def fetch(loader: Loader, updates: Sequence[Update], signals: Signals, mesh: Mesh) -> Upcoming | None:
    """Take the next batch, and sum the control word over all ranks: (has a batch, wants to stop, count of each term).

    None, on all ranks, if some rank has no batch: the data is over.
    """
    began = time.perf_counter()
    batch = loader.next_step()
    losses = {name: loss for update in updates for name, loss in update.losses.items() if not loss.count_late}
    counts = [sum(float(loss.count_of(micro)) for micro in batch.micro) if batch else 0.0 for loss in losses.values()]
    # float64 holds counts exactly up to 2^53
    word = torch.tensor([float(batch is not None), float(signals.asked), *counts], dtype=torch.float64)
    # a signal may reach one rank alone, also one that does not speak for its rows
    if mesh.world_size > 1 and not mesh.speaks_for_rows:
        word[[0, *range(2, len(word))]] = 0.0
    mesh.sum_all(word)
    if int(word[0]) < mesh.dp_size:
        return None
    assert batch is not None
    return Upcoming(batch, word, list(losses), time.perf_counter() - began)


def micro_batch(
    batch: Step, carried: Sequence[Mapping[str, Tensor]], seed: int, step: int, mesh: Mesh, number: int
) -> dict[str, Any]:
    """Micro-batch ``number`` on the device, with what earlier updates wrote; and torch's own generators (dropout inside layers)
    seeded for it.

    The seed is a function of (seed, step, micro-batch, rows), so that a second forward of a micro-batch and a resumed run repeat
    its draws, and there is no generator state to save. Ranks that hold the same rows agree.
    """
    low, high = key_of(seed, f"step/{step}/{number}/{mesh.dp_rank}")
    torch.manual_seed((high << 31) ^ low)
    return {**to_device(batch.micro[number], mesh.device), **carried[number]}
