"""Loader: the lanes of one process, step by step. It takes (dp_rank, dp_size) as numbers and touches no process group."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.data.dataset import Dataset, Item
from l3m_like.data.lanes import Lane, Order, check_lanes, check_state, default_lanes, finite_rows
from l3m_like.data.packing import Piece


@dataclass(frozen=True)
class Step:
    """The data of one optimizer step on one process.

    Args:
        number: of the step, from 0.
        micro: the micro-batches, CPU tensors; ``row`` is number * global_batch + index in the global batch.
        refs: per row of this process, the samples in it: "FILE#12[256:400] + FILE#7".
        state: ``{lane: state}`` of this process's lanes *after* this step (JSON-able). Merge those of all processes to resume.
    """

    number: int
    micro: list[dict[str, Tensor]]
    refs: list[str]
    state: dict[str, dict[str, Any]]


class Loader:
    """Endless (or ``epochs``) training data of one data-parallel process.

    The samples of step n depend on the dataset, ``seed``, ``global_batch`` and ``lanes`` alone: not on the number of
    processes, micro-batches or workers, nor on a stop and resume in between.

    Args:
        dataset: what to load.
        seed: of the run.
        global_batch, micro_batch: rows per step over all processes; rows per micro-batch on one.
        dp_rank, dp_size: this process among those that take different data; it has lanes rank * L/size and following.
        lanes: L; divides global_batch, a multiple of dp_size. None: the largest divisor of global_batch up to 256.
        workers: threads that read and process samples; 0: done where the step is made.
        prefetch: steps made ahead, by a thread; 0: made when asked for.
        state: merged ``Step.state`` of all lanes: continue after that step.
        epochs: end after so many; None: never. All processes end at the same step: the last at which every lane still has full
            rows; the remainder is dropped. With packs this needs the length of every document, so all are processed once at
            the start.

    Raises:
        UserError: numbers that do not divide, a state that does not fit. From ``next_step``: a sample that cannot be read.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        lanes: int | None = None,
        workers: int = 0,
        prefetch: int = 2,
        state: Mapping[str, Mapping[str, Any]] | None = None,
        epochs: int | None = None,
    ) -> None:
        lanes = default_lanes(global_batch) if lanes is None else lanes
        check_lanes(global_batch, micro_batch, dp_size, lanes)
        if epochs is not None and epochs < 1:
            raise UserError(f"epochs is {epochs}; it is at least 1.")
        self.dataset = dataset
        self.seed = seed
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.lanes = lanes
        self._rows_per_lane = global_batch // lanes
        self._first_index = dp_rank * (global_batch // dp_size)
        self._order = Order(len(dataset), seed)  # len reads the index, before any thread runs
        self._stream = f"seed {seed}, {len(dataset)} samples from {dataset.source.reference(0)}, {lanes} lanes"
        if state is not None:
            check_state(state, lanes, self._stream)
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="data-worker") if workers else None
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="data-prefetch") if prefetch else None
        self._prefetch = prefetch
        per_rank = lanes // dp_size
        ahead = math.ceil(2 * workers / per_rank)  # enough that even a single lane keeps all workers busy
        self._lanes = [
            Lane(number, lanes, dataset.pack, self._fetch, ahead=ahead, state=None if state is None else state[str(number)])
            for number in range(dp_rank * per_rank, (dp_rank + 1) * per_rank)
        ]
        rows = self._lanes[0].rows
        if rows % self._rows_per_lane:
            raise UserError(
                f"the saved data state is {rows} rows into each of {lanes} lanes, which is no whole step of batch.global "
                f"{global_batch}. Resume with the batch.global of the saved run."
            )
        #: the number of the next step
        self.number = rows // self._rows_per_lane
        #: the number of steps in ``epochs`` epochs, None when endless
        self.total_steps = None if epochs is None else self._count_steps(epochs)
        self._made: deque[Future[Step | None]] = deque()
        self._error: Exception | None = None

    def next_step(self) -> Step | None:
        """The next step, or None after the last of finite data.

        Raises:
            UserError: a sample of this step cannot be read; the message begins with its reference.
        """
        if self._error is not None:
            raise self._error
        if self.total_steps is not None and self.number >= self.total_steps:
            return None
        try:
            if self._maker is None:
                step = self._make(self.number)
            else:
                while len(self._made) <= self._prefetch:
                    self._made.append(self._maker.submit(self._make, self.number + len(self._made)))
                step = self._made.popleft().result()
        except Exception as error:
            self._error = error  # the lanes stand in the middle of a step: nothing after this is the stream
            raise
        self.number += 1
        return step

    def close(self) -> None:
        """Stop all threads (waits for the step that is being made). The loader yields nothing after this."""
        self._error = self._error or UserError("the loader is closed.")
        for pool in (self._maker, self._workers):
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def _make(self, number: int) -> Step | None:
        """Step ``number``; called once for each, in order, by one thread."""
        if self.total_steps is not None and number >= self.total_steps:
            return None
        rows = [lane.next_row() for lane in self._lanes for _ in range(self._rows_per_lane)]
        first = number * self.global_batch + self._first_index
        return Step(
            number=number,
            micro=[
                self.dataset.collate(rows[start : start + self.micro_batch], first + start)
                for start in range(0, len(rows), self.micro_batch)
            ],
            refs=[" + ".join(map(str, row)) for row in rows],
            state={str(lane.number): lane.state() | {"stream": self._stream} for lane in self._lanes},
        )

    def _fetch(self, g: int) -> Callable[[], Item]:
        """Start the work on sample number ``g``: a function of (sample, epoch, seed), so any thread may do it."""
        epoch, index = self._order(g)
        work = functools.partial(self.dataset.item, index, epoch=epoch, seed=self.seed)
        return functools.cache(work) if self._workers is None else self._workers.submit(work).result

    def _count_steps(self, epochs: int) -> int:
        lengths = None
        if not self.dataset.pack.one_row_per_sample:
            run = map if self._workers is None else self._workers.map
            lengths = np.array(list(run(lambda index: self.dataset.item(index, seed=self.seed).size, range(len(self.dataset)))))
        return finite_rows(self._order, self.lanes, epochs, self.dataset.pack, lengths) // self._rows_per_lane


class EvalLoader:
    """One pass over a dataset in file order, the same number of batches on every process.

    Batches are dealt in turn: batch j goes to process j % dp_size. A process that has none left repeats its first (or the
    dataset's first) batch, marked as not valid, so that all processes run the same number of forwards.

    Args:
        batch: rows per batch; the last may have fewer, and the last row of packed text is padded.
        seed: for processors that draw (epoch 0).

    Yields:
        ``(batch, valid)``; ``row`` is the running number of the row in the dataset.
    """

    def __init__(self, dataset: Dataset, *, batch: int, dp_rank: int = 0, dp_size: int = 1, seed: int = 0) -> None:
        if batch < 1:
            raise UserError(f"batch is {batch}; it is at least 1.")
        self.dataset = dataset
        self.batch = batch
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], bool]]:
        filler: dict[str, Tensor] | None = None
        count = 0
        for number, rows in enumerate(self._batches()):
            mine = number % self.dp_size == self.dp_rank
            if mine or number == 0:
                batch = self.dataset.collate(rows(), number * self.batch)
                filler = batch if filler is None else filler
                if mine:
                    yield batch, True
            count = number + 1
        if count % self.dp_size and self.dp_rank >= count % self.dp_size:
            assert filler is not None  # a dataset has at least one sample
            yield filler, False

    def _batches(self) -> Iterator[Callable[[], list[list[Piece]]]]:
        """All batches of the pass; what makes the rows of one is called only by the process that needs them."""
        pack, samples = self.dataset.pack, len(self.dataset)
        if pack.one_row_per_sample:
            for start in range(0, samples, self.batch):
                yield functools.partial(self._rows_of, range(start, min(start + self.batch, samples)))
            return
        # where a row of packed text begins is known only after the rows before it: every process packs all of them
        item = functools.lru_cache(maxsize=2)(self._item)
        state, rows = pack.start(), []
        while True:
            pieces, state = pack.next(state, item)
            if pieces:
                rows.append(pieces)
            if rows and (len(rows) == self.batch or not pieces):
                yield functools.partial(list, rows)
                rows = []
            if not pieces:
                return

    def _rows_of(self, samples: range) -> list[list[Piece]]:
        return [self.dataset.pack.next({"sample": sample}, self._item)[0] for sample in samples]

    def _item(self, sample: int) -> Item | None:
        return self.dataset.item(sample, seed=self.seed) if sample < len(self.dataset) else None
