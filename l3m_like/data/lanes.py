"""Lanes: the order of samples, apart from the work on them and from who does it.

Global order: the sample number g = epoch * N + position is the source's sample ``permutation(seed, epoch)[position]``. Lane i
of L takes g = i, i + L, i + 2L, ... and packs what it takes into rows. So what a lane yields is a function of the data, the
seed and L alone. Step n takes the next global_batch / L rows of each lane, in lane order; which process holds which lanes, in
how many micro-batches it runs them and how many threads read samples makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from l3m_like.core.errors import UserError
from l3m_like.core.random import key_of
from l3m_like.data.dataset import Item
from l3m_like.data.packing import Packer, Piece


class Order:
    """The global order: sample number g -> (epoch, index in the source)."""

    #: lanes drift apart by a few documents, so that two epochs are in use around a border
    EPOCHS_HELD = 3

    def __init__(self, samples: int, seed: int) -> None:
        self.samples = samples
        self.seed = seed
        self._epochs: dict[int, np.ndarray] = {}  # least recently used first

    def __call__(self, g: int) -> tuple[int, int]:
        epoch, position = divmod(g, self.samples)
        return epoch, int(self.permutation(epoch)[position])

    def permutation(self, epoch: int) -> np.ndarray:
        """[samples] integers. Sorting raw Philox words: numpy promises those for ever, but not ``Generator.permutation``."""
        if epoch in self._epochs:
            self._epochs[epoch] = self._epochs.pop(epoch)
            return self._epochs[epoch]
        low, high = key_of(self.seed, f"order/{epoch}")
        words = np.random.Philox(key=high << 32 | low).random_raw(self.samples)
        self._epochs[epoch] = np.argsort(words, kind="stable").astype(np.int32 if self.samples < 2**31 else np.int64)
        if len(self._epochs) > self.EPOCHS_HELD:
            self._epochs.pop(next(iter(self._epochs)))
        return self._epochs[epoch]


class Lane:
    """One lane: takes its samples in order and packs them.

    Args:
        number, lanes: lane ``number`` of ``lanes``.
        pack: the packer.
        fetch: starts the work on sample number g and returns a function that waits for its result.
        ahead: how many samples to start before they are needed.
        state: of this lane, as ``state()`` gave it; None: the beginning.
    """

    def __init__(
        self,
        number: int,
        lanes: int,
        pack: Packer,
        fetch: Callable[[int], Callable[[], Item]],
        *,
        ahead: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.number = number
        self.lanes = lanes
        self.rows = 0
        self._pack = pack
        self._fetch = fetch
        self._ahead = ahead
        self._position = pack.start()
        self._started: dict[int, Callable[[], Item]] = {}
        if state is not None:
            self.rows = int(state["rows"])
            self._position = {name: int(state[name]) for name in self._position}

    def next_row(self) -> list[Piece]:
        """The pieces of the lane's next row."""
        pieces, self._position = self._pack.next(self._position, self._item)
        self._started = {k: wait for k, wait in self._started.items() if k >= self._position["sample"]}
        self.rows += 1
        return pieces

    def state(self) -> dict[str, int]:
        """Where the lane stands: numbers of its samples and rows, no data."""
        return {"rows": self.rows, **self._position}

    def _item(self, k: int) -> Item:
        """The k-th sample of this lane."""
        for each in range(k, k + self._ahead + 1):
            if each not in self._started:
                self._started[each] = self._fetch(self.number + each * self.lanes)
        return self._started[k]()


def default_lanes(global_batch: int) -> int:
    """The largest divisor of the global batch that is at most 256."""
    return max(number for number in range(1, min(global_batch, 256) + 1) if global_batch % number == 0)


def finite_rows(order: Order, lanes: int, epochs: int, pack: Packer, lengths: np.ndarray | None) -> int:
    """Rows that *every* lane can fill from ``epochs`` epochs: the smallest number over the lanes.

    Only full rows count (one closed by ``max_documents`` is full). For a packer that cuts samples, ``lengths`` [samples] are
    their sizes; the packer itself runs, over arrays of those lengths that take no memory.
    """
    if pack.one_row_per_sample or lengths is None:
        return epochs * order.samples // lanes
    sizes = np.concatenate([lengths[order.permutation(epoch)] for epoch in range(epochs)])
    return min(_full_rows(sizes[number::lanes], pack) for number in range(lanes))


class _Ended(Exception):
    """The lane has no further sample."""


def _full_rows(sizes: np.ndarray, pack: Packer) -> int:
    def item(k: int) -> Item:
        if k >= len(sizes):
            raise _Ended
        return Item("", {"ids": np.broadcast_to(np.int64(0), sizes[k])})

    state, rows = pack.start(), 0
    try:
        while True:
            _, state = pack.next(state, item)
            rows += 1
    except _Ended:
        return rows


def check_lanes(global_batch: int, micro_batch: int, dp_size: int, lanes: int) -> None:
    """Raise a UserError, with values that fit, unless the numbers divide each other."""
    if global_batch % (dp_size * micro_batch):
        per_rank = global_batch // dp_size
        unit = dp_size * micro_batch
        near = [number for number in (global_batch // unit * unit, (global_batch // unit + 1) * unit) if number]
        fits = [f"batch.global {' or '.join(map(str, near))}"]
        if global_batch % dp_size == 0:
            micros = sorted((m for m in range(1, per_rank + 1) if per_rank % m == 0), key=lambda m: (abs(m - micro_batch), m))[:2]
            fits.append(f"batch.micro {' or '.join(map(str, sorted(micros)))}")
        raise UserError(
            f"batch.global is {global_batch}, which is not a multiple of batch.micro {micro_batch} x {dp_size} data-parallel "
            f"processes = {unit}. Fits: {', or '.join(fits)}."
        )
    if global_batch % lanes or lanes % dp_size:
        divisors = [number for number in range(1, global_batch + 1) if global_batch % number == 0 and number % dp_size == 0]
        near = sorted(sorted(divisors, key=lambda number: (abs(number - lanes), number))[:3])
        raise UserError(
            f"data.lanes is {lanes}; it must divide batch.global {global_batch} and be a multiple of the {dp_size} data-parallel "
            f"processes. Fits: {', '.join(map(str, near))}. (It defines the order of samples: choose it once per run.)"
        )


def check_state(state: Mapping[str, Mapping[str, Any]], lanes: int, stream: str) -> None:
    """Raise a UserError unless ``state`` is the merged state of all lanes of this stream."""
    if set(state) != {str(number) for number in range(lanes)}:
        raise UserError(
            f"the saved data state has {len(state)} lanes, but data.lanes is {lanes}. The number of lanes defines the order of "
            f"samples, so another number would repeat some and skip others. Set data.lanes: {len(state)}."
        )
    for number, lane in state.items():
        if lane["stream"] != stream:
            raise UserError(
                f"the saved data state is of another stream: it has '{lane['stream']}', this run has '{stream}' (lane {number}). "
                "Use the same data, seed and lanes, or begin a new run."
            )
    if len({lane["rows"] for lane in state.values()}) != 1:
        raise UserError("the saved data state mixes lanes of different steps: it is not the state of one step.")
