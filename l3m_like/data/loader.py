"""Loader: the lanes of one process, step by step. It takes (dp_rank, dp_size) as numbers and touches no process group."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.data.dataset import BadSample, Dataset, Item, Part
from l3m_like.data.lanes import Lane, check_lanes, check_state, count_rows, default_lanes
from l3m_like.data.packing import Piece

log = logging.getLogger(__name__)

REMAINDERS = ("drop", "pad", "wrap")
#: how long a thread may keep the interpreter from others that ask for it
_SWITCH_SECONDS = 1e-5


@dataclass(frozen=True)
class Step:
    """The data of one optimizer step on one process.

    Args:
        number: of the step, from 0.
        micro: the micro-batches, CPU tensors; ``row`` is the running number of the row in the run.
        refs: per row of this process, the samples in it: "FILE#12[256:400] + FILE#7".
        state: ``{lane: state}`` of this process's lanes *after* this step (JSON-able). Merge those of all processes to resume.
        left_out: samples that were bad or too long, met since the step before: ``{"sample", "error", "dropped"}``.
    """

    number: int
    micro: list[dict[str, Tensor]]
    refs: list[str]
    state: dict[str, dict[str, Any]]
    left_out: list[dict[str, Any]] = field(default_factory=list)


class Loader:
    """The training data of one data-parallel process, step by step; endless, or finite.

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
        pin: put batches into pinned memory, from which an accelerator copies them asynchronously.
        state: merged ``Step.state`` of all lanes: continue after that step (``global_batch`` may differ).
        step: the number of the next step.
        epochs: end after so many passes (no mixture and no stream: those say in `mix.epochs` what they have); None: endless.
            All processes end at the same step. With packs all samples are processed once at the start, for their sizes.
        remainder: of finite data, rows that do not make up a step: ``drop`` them; ``pad`` the step with empty rows (packs of
            text); ``wrap``: fill it from the next epoch.
        most_bad: bad samples that may be left out (``Step.left_out``); 0: the first one is an error.

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
        pin: bool = False,
        state: Mapping[str, Mapping[str, Any]] | None = None,
        step: int = 0,
        epochs: int | None = None,
        remainder: str = "drop",
        most_bad: int = 0,
    ) -> None:
        lanes = default_lanes(global_batch) if lanes is None else lanes
        check_lanes(global_batch, micro_batch, dp_size, lanes)
        check_remainder(dataset, epochs, remainder)
        dataset.check_processors()
        self.dataset = dataset
        self.seed = seed
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.lanes = lanes
        self._rows_per_lane = global_batch // lanes
        self._first_index = dp_rank * (global_batch // dp_size)
        self._pin = pin
        self._pad = remainder == "pad"
        self._stream = f"seed {seed}, {dataset.describe()}, {lanes} lanes"  # reads the indices, before any thread runs
        for part in dataset.parts.values():
            if not part.indexed and (shards := len(part.source.shards())) < lanes and dp_rank == 0:
                times = -(-lanes // shards)
                log.warning(
                    "%s has %d shards for %d lanes, so each is read %d times over. Set data.lanes: %d or less, or write more "
                    "shards.", part.source.path, shards, lanes, times, shards,
                )  # fmt: skip
        if state is not None:
            check_state(state, lanes, self._stream)
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="data-worker") if workers else None
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="data-prefetch") if prefetch else None
        if workers or prefetch:
            # every operation of torch gives up the interpreter and asks for it back; a thread that reads data would keep it for
            # 5 ms each time, and the accelerator would run dry. It stays so: other loaders may read on when this one is closed
            sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_SECONDS))
        self._prefetch = prefetch
        per_rank = lanes // dp_size
        self._lanes = [
            Lane(
                number,
                lanes,
                dataset,
                seed,
                self._start,
                ahead=math.ceil(2 * workers / per_rank),  # enough that even a single lane keeps all workers busy
                epochs=None if remainder == "wrap" else epochs,
                most_bad=most_bad,
                state=None if state is None else state[str(number)],
            )
            for number in range(dp_rank * per_rank, (dp_rank + 1) * per_rank)
        ]
        #: the number of the next step
        self.number = step
        self._rows = self._lanes[0].rows
        #: the number of the last step of ``epochs`` epochs + 1, None where it is not known
        self.total_steps = None if epochs is None else step + self._count_steps(epochs, remainder)
        if self.total_steps == 0:
            raise UserError(
                f"{epochs} epochs of {dataset.describe()} make no whole step of batch.global {global_batch}. Lower it, or set "
                "data.remainder: wrap."
            )
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
        if step is not None:
            self.number += 1
        return step

    def close(self, wait: bool = True) -> None:
        """Stop all threads, and with ``wait`` wait for the step that is being made. The loader yields nothing after this."""
        self._error = self._error or UserError("the loader is closed.")
        for pool in (self._maker, self._workers):
            if pool is not None:
                pool.shutdown(wait=wait, cancel_futures=True)

    def _make(self, number: int) -> Step | None:
        """Step ``number``; called once for each, in order, by one thread. None: some lane has no more rows."""
        if self.total_steps is not None and number >= self.total_steps:
            return None
        first = self._rows * self.lanes + self._first_index
        rows = [lane.next_row() for lane in self._lanes for _ in range(self._rows_per_lane)]
        if self._pad:
            for lane in self._lanes:
                lane.rows = self._rows + self._rows_per_lane  # empty rows count
        elif any(row is None for row in rows):
            return None
        self._rows += self._rows_per_lane
        filled = [row or [] for row in rows]
        micro = [
            self.dataset.collate(filled[start : start + self.micro_batch], first + start)
            for start in range(0, len(filled), self.micro_batch)
        ]
        if self._pin:
            micro = [{key: value.pin_memory() for key, value in batch.items()} for batch in micro]
        left_out = [entry for lane in self._lanes for entry in lane.left_out]
        for lane in self._lanes:
            lane.left_out = []
        return Step(
            number=number,
            micro=micro,
            refs=[" + ".join(map(str, row)) for row in filled],
            state={str(lane.number): lane.state() | {"stream": self._stream} for lane in self._lanes},
            left_out=left_out,
        )

    def _start(self, work: Callable[[], Item]) -> Callable[[], Item]:
        """Start the work on a sample: a function of (sample, epoch, seed), so any thread may do it."""
        return functools.cache(work) if self._workers is None else self._workers.submit(work).result

    def left_out(self) -> list[dict[str, Any]]:
        """After the end: what was left out since the last step."""
        return [entry for lane in self._lanes for entry in lane.left_out]

    def _count_steps(self, epochs: int, remainder: str) -> int:
        """Steps that are left of ``epochs`` epochs."""
        sizes = None
        if not self.dataset.pack.one_row_per_sample:
            run = map if self._workers is None else self._workers.map
            sizes = {
                name: np.array(
                    [
                        list(run(functools.partial(self._size, part, epoch), range(len(part.source))))
                        for epoch in range(epochs if part.sizes_vary else 1)
                    ]
                )
                for name, part in self.dataset.parts.items()
            }
        counts = count_rows(self.dataset, self.lanes, self.seed, epochs, sizes)
        rows = (min(counts) if remainder == "drop" else max(counts)) - self._rows
        return rows // self._rows_per_lane if remainder == "drop" else -(-rows // self._rows_per_lane)

    def _size(self, part: Part, epoch: int, index: int) -> int:
        read = functools.partial(part.source.read, index)
        try:
            return part.work(part.source.reference(index), read, epoch=epoch, seed=self.seed).size
        except BadSample:
            return -1  # met again, and reported, when its turn comes


def check_remainder(dataset: Dataset, epochs: int | None, remainder: str) -> None:
    """Raise a UserError unless this dataset can end after ``epochs`` with this policy for what is left."""
    if remainder not in REMAINDERS:
        raise UserError(f"data.remainder is '{remainder}'. {did_you_mean(remainder, REMAINDERS)}")
    if epochs is None:
        if remainder != "drop":
            raise UserError(f"data.remainder: {remainder} belongs to `epochs`; this run has another length. Remove it.")
        return
    if epochs < 1:
        raise UserError(f"epochs is {epochs}; it is at least 1.")
    if dataset.mix is not None:
        raise UserError("epochs: a mixture has no passes of its own. Give `steps`, and mix.epochs for sources that end.")
    if not dataset.indexed:
        raise UserError(f"epochs: {dataset.source.path} is a stream, whose length is not known. Give `steps`.")
    if remainder == "pad" and not dataset.pack.may_be_empty:
        raise UserError(f"data.remainder: {type(dataset.pack).__name__} cannot make an empty row. Use drop or wrap.")


class EvalLoader:
    """One pass over a dataset in file order, the same number of batches on every process.

    Batches are dealt in turn: batch j goes to process j % dp_size. A process that has none left repeats its first (or the
    dataset's first) batch, marked as not valid, so that all processes run the same number of forwards.

    Args:
        batch: rows per batch; the last may have fewer, and the last row of packed text is padded.
        seed: for processors that draw (epoch 0).
        limit: end after so many rows (None: at the end of the dataset).

    Yields:
        ``(batch, valid)``; ``row`` is the running number of the row in the dataset.
    """

    def __init__(
        self, dataset: Dataset, *, batch: int, dp_rank: int = 0, dp_size: int = 1, seed: int = 0, limit: int | None = None
    ) -> None:
        if batch < 1:
            raise UserError(f"batch is {batch}; it is at least 1.")
        self.dataset = dataset
        self.batch = batch
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.seed = seed
        self.limit = limit

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], bool]]:
        self.dataset.check_processors()
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
        dataset = self.dataset
        if dataset.pack.one_row_per_sample and dataset.indexed:
            end = len(dataset) if self.limit is None else min(len(dataset), self.limit)
            for start in range(0, end, self.batch):
                yield functools.partial(self._rows_of, range(start, min(start + self.batch, end)))
            return
        # where a row of packed text begins is known only after the rows before it: every process packs all of them
        rows = itertools.islice(dataset.rows(dataset.items(self.seed)), self.limit)
        while batch := list(itertools.islice(rows, self.batch)):
            yield functools.partial(list, batch)

    def _rows_of(self, samples: range) -> list[list[Piece]]:
        items = (self.dataset.item(sample, seed=self.seed) for sample in samples)
        return [[Piece(item, 0, item.size)] for item in items]
