"""Lanes: the order of samples, apart from the work on them and from who does it.

Global order: the sample number g = epoch * N + position of a source is the sample ``permutation(seed, source, epoch)[position]``.
Lane i of L takes g = i, i + L, i + 2L, ... of every source, in the rhythm of the mixture, and packs what it takes into rows.
So what a lane yields is a function of the data, the seed and L alone. A step takes the next global_batch / L rows of each lane,
in lane order; which process holds which lanes, in how many micro-batches it runs them and how many threads read samples makes
no difference. A stream's *shards* are dealt in the same way; where there are fewer shards than lanes, several lanes share one,
each taking every m-th sample of it.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from l3m_like.core.errors import UserError
from l3m_like.data.dataset import BadSample, Dataset, Item, Part, given
from l3m_like.data.order import Order, permuted, round_keys
from l3m_like.data.packing import Piece, Ref

#: work on one sample, started: wait for its result
Handle = Callable[[], Item]
#: starts work
Start = Callable[[Callable[[], Item]], Handle]


class IndexFeed:
    """One lane's share of a source with an index: its k-th sample at once."""

    BLOCK = 256  # numbers computed together

    def __init__(self, part: Part, number: int, lanes: int, seed: int, *, shuffle: bool, epochs: int | None) -> None:
        self.part, self.number, self.lanes = part, number, lanes
        self._order = Order(len(part.source), seed, part.name, shuffle=shuffle)
        self._limit = None if epochs is None else epochs * self._order.samples
        if self._limit is not None and self._limit < lanes:
            raise UserError(
                f"{part.source.path} has {self._order.samples} samples x {epochs} passes, fewer than the {lanes} lanes, so some "
                f"would have none of it. Set data.lanes to {self._limit} or less."
            )
        self._block = -1

    def get(self, k: int) -> tuple[str, int, Callable[[], Any]] | None:
        """``(reference, epoch, read)`` of the k-th sample; None: the epochs are over."""
        g = self.number + k * self.lanes
        if self._limit is not None and g >= self._limit:
            return None
        block, at = divmod(k, self.BLOCK)
        if block != self._block:
            numbers = self.number + (np.arange(self.BLOCK) + block * self.BLOCK) * self.lanes
            self._epochs, self._indices = self._order.at(numbers)
            self._block = block
        index = int(self._indices[at])
        return self.part.source.reference(index), int(self._epochs[at]), functools.partial(self.part.source.read, index)

    def state(self, k: int) -> dict[str, int]:
        """What is needed to give the samples from the k-th on again."""
        return {}


class StreamFeed:
    """One lane's share of a source without an index: samples come in order, shuffled within blocks.

    The state says where the oldest block that is still needed begins; resuming opens that shard and skips to the place.
    """

    def __init__(
        self,
        part: Part,
        number: int,
        lanes: int,
        seed: int,
        *,
        shuffle: bool,
        epochs: int | None,
        block: int,
        state: Mapping[str, int] | None,
    ) -> None:
        self.part, self.number, self.lanes, self.seed = part, number, lanes, seed
        self._block = block if shuffle else 1
        self._shuffle = shuffle
        self._shards = part.source.shards()
        self._cuts = -(-lanes // len(self._shards))  # lanes that share a shard
        self._order = Order(len(self._shards) * self._cuts, seed, f"{part.name}/shards", shuffle=shuffle)
        self._epochs = epochs
        state = state or {"k": 0, "turn": 0, "skip": 0}
        #: (number of the first sample, turn and skip where the block begins, its samples)
        self._blocks: deque[tuple[int, int, int, list[tuple[str, int, Callable[[], Any]]]]] = deque()
        self._next = state["k"], state["turn"], state["skip"]
        self._reader = self._read(state["turn"], state["skip"])

    def get(self, k: int) -> tuple[str, int, Callable[[], Any]] | None:
        while k >= self._next[0]:
            if not self._read_block():
                return None
        for first, _, _, samples in reversed(self._blocks):
            if k >= first:
                return samples[k - first]
        raise RuntimeError(f"sample {k} of {self.part.source.path} was given up")  # a fault of the lane

    def state(self, k: int) -> dict[str, int]:
        while k > self._next[0] and self._read_block():
            pass  # after a resume: up to the block of the k-th sample, so that the state is that of a run without a stop
        while self._blocks and self._blocks[0][0] + len(self._blocks[0][3]) <= k:
            self._blocks.popleft()
        first, turn, skip = self._blocks[0][:3] if self._blocks else self._next
        return {"k": first, "turn": turn, "skip": skip}

    def _read_block(self) -> bool:
        first, turn, skip = self._next
        samples = []
        for sample, turn_after, skip_after in self._reader:
            samples.append(sample)
            self._next = first + len(samples), turn_after, skip_after
            if len(samples) == self._block:
                break
        if not samples:
            return False
        if self._shuffle:
            keys = round_keys(self.seed, f"block/{self.part.name}/{self.number}/{first}")
            samples = [samples[i] for i in permuted(np.arange(len(samples)), len(samples), keys)]
        self._blocks.append((first, turn, skip, samples))
        return True

    def _read(self, turn: int, skip: int) -> Iterator[tuple[tuple[str, int, Callable[[], Any]], int, int]]:
        """Samples from the ``turn``-th shard of this lane on, and where the next one is."""
        fruitless = 0
        while True:
            epoch, share = (int(values[0]) for values in self._order.at(np.array([self.number + turn * self.lanes])))
            if self._epochs is not None and epoch >= self._epochs:
                return
            shard, cut = divmod(share, self._cuts)
            number, taken = skip, 0
            try:
                for number, (reference, raw) in enumerate(self.part.source.open(shard, skip), start=skip):
                    if number % self._cuts == cut:
                        taken += 1
                        yield (reference, epoch, functools.partial(given, raw)), turn, number + 1
            except UserError as error:  # it counts as one bad sample
                taken += 1
                bad = functools.partial(_raise, BadSample(self._shards[shard], f"{error} The rest of the shard is lost."))
                yield (self._shards[shard], epoch, bad), turn + 1, 0
            turn, skip = turn + 1, 0
            fruitless = 0 if taken else fruitless + 1
            if fruitless > self._order.samples:
                raise UserError(f"{self.part.source.path}: lane {self.number} finds no sample in any shard.")


def _raise(error: Exception) -> Any:
    raise error


class Lane:
    """One lane: draws samples in the rhythm of the mixture, and packs them.

    Args:
        number, lanes: lane ``number`` of ``lanes``.
        dataset: what is read.
        seed: of the run.
        start: starts the work on a sample and returns a function that waits for its result.
        ahead: how many samples to start before they are needed.
        epochs: passes over a dataset that is no mixture; None: endless.
        most_bad: bad samples within one row after which the lane gives up (0: at the first).
        state: of this lane, as ``state()`` gave it; None: the beginning.
    """

    def __init__(
        self,
        number: int,
        lanes: int,
        dataset: Dataset,
        seed: int,
        start: Start = lambda work: functools.cache(work),
        *,
        ahead: int = 0,
        epochs: int | None = None,
        most_bad: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.number = number
        self.rows = 0
        self._dataset, self._seed, self._start = dataset, seed, start
        self._most_bad = most_bad
        self._pack, self._mix = dataset.pack, dataset.mix
        self._pack_state = dataset.pack.start()
        self._taken = dict.fromkeys(dataset.parts, 0)  # samples of each source
        self._given = dict.fromkeys(dataset.parts, 0)  # in the mixture's unit
        #: what was left out since this was last emptied: {"sample", "error", "dropped"}
        self.left_out: list[dict[str, Any]] = []
        #: samples in a row that are left out before it is clear that none will do: all that the lane sees of an epoch
        self._most_fruitless = 0
        self._fruitless = 0
        if state is not None:
            self.rows = int(state["rows"])
            self._pack_state = state["pack"]
            self._taken = {name: int(state["taken"][name]) for name in self._taken}
            self._given = {name: int(state["given"][name]) for name in self._given}
        feeds = {} if state is None else state["feeds"]
        self._feeds: dict[str, IndexFeed | StreamFeed] = {}
        for name, part in dataset.parts.items():
            limit = epochs if self._mix is None else self._mix.epochs.get(name)
            self._most_fruitless += len(part.source) // lanes + 1 if part.indexed else 100_000
            common: dict[str, Any] = {"shuffle": dataset.shuffle, "epochs": limit}
            self._feeds[name] = (
                IndexFeed(part, number, lanes, seed, **common)
                if part.indexed
                else StreamFeed(part, number, lanes, seed, **common, block=dataset.block, state=feeds.get(name))
            )
        if self._mix is not None:
            unit = dataset.pack.units_per_row if self._mix.by == "tokens" else 1
            self._phase = self._mix.phases(seed, number, unit)
            total = sum(self._mix.weights.values())
            self._ahead = {name: math.ceil(ahead * weight / total) for name, weight in self._mix.weights.items()}
        else:
            self._ahead = {"": ahead}
        self._started: dict[Ref, Handle] = {}
        self._ended: set[str] = set()

    def next_row(self) -> list[Piece] | None:
        """The pieces of the lane's next row; None: the data is over."""
        self._bad_in_row = 0
        pieces, self._pack_state = self._pack.next(self._pack_state, self._draw, lambda ref: self._handle(ref)())
        if not pieces:
            return None
        held = set(self._pack.held(self._pack_state))
        self._started = {r: wait for r, wait in self._started.items() if r in held or r[1] >= self._taken[r[0]]}
        self.rows += 1
        return pieces

    def state(self) -> dict[str, Any]:
        """Where the lane stands: numbers of its samples and rows, no data."""
        needed = dict(self._taken)
        for name, k in self._pack.held(self._pack_state):
            needed[name] = min(needed[name], k)
        feeds = {name: feed.state(needed[name]) for name, feed in self._feeds.items()}
        return {
            "rows": self.rows,
            "pack": self._pack_state,
            "taken": dict(self._taken),
            "given": dict(self._given),
            "feeds": {name: state for name, state in feeds.items() if state},
        }

    def _draw(self) -> tuple[Ref, Item] | None:
        while (name := self._choose()) is not None:
            ref = (name, self._taken[name])
            wait = self._handle(ref)
            for k in range(ref[1] + 1, ref[1] + 1 + self._ahead[name]):
                if (name, k) not in self._started and self._handle((name, k)) is _over:
                    break
            if wait is _over:
                self._ended.add(name)
                continue
            self._taken[name] += 1
            try:
                item = wait()
            except BadSample as error:
                self._leave_out(error.reference, error.message)
                continue
            if (why := self._pack.too_large(item)) is not None:
                if self._pack.too_long != "drop":
                    raise BadSample(item.reference, f"{why}. {self._pack.advice}")
                self._leave_out(item.reference, why, dropped=True)
                continue
            self._fruitless = 0
            self._given[name] += item.size if self._mix is not None and self._mix.by == "tokens" else 1
            return ref, item
        return None

    def _choose(self) -> str | None:
        """The source of the next sample; None: the data is over."""
        if self._mix is None:
            return None if self._ended else ""
        if self._ended and self._mix.over(self._ended):
            return None
        mix = self._mix
        left = [name for name in self._taken if name not in self._ended]
        return min(left, key=lambda name: (self._given[name] + self._phase[name]) / mix.weights[name])

    def _handle(self, ref: Ref) -> Handle:
        """The work on a sample, started at the first call."""
        if ref not in self._started:
            name, k = ref
            found = self._feeds[name].get(k)
            if found is None:
                return _over
            reference, epoch, read = found
            work = functools.partial(self._dataset.parts[name].work, reference, read, epoch=epoch, seed=self._seed)
            self._started[ref] = self._start(work)
        return self._started[ref]

    def _leave_out(self, reference: str, error: str, *, dropped: bool = False) -> None:
        self._fruitless += 1
        if self._fruitless > self._most_fruitless:
            raise BadSample(reference, f"{error}. None of the {self._fruitless} samples before it could be used either.")
        if not dropped:
            self._bad_in_row += 1
            if self._bad_in_row > self._most_bad:
                raise BadSample(reference, error)
        self.left_out.append({"sample": reference, "error": error, "dropped": dropped})


def _over() -> Item:
    raise RuntimeError("the data is over")  # a fault of the lane: this is only compared


def default_lanes(global_batch: int) -> int:
    """The largest divisor of the global batch that is at most 256."""
    return max(number for number in range(1, min(global_batch, 256) + 1) if global_batch % number == 0)


def count_rows(dataset: Dataset, lanes: int, seed: int, epochs: int, sizes: Mapping[str, np.ndarray] | None) -> list[int]:
    """Rows that each lane makes of ``epochs`` epochs (all samples are used, the last row may be padded).

    ``sizes`` (None where every row is one sample): ``{source: [epochs, or 1 if all are alike, samples]}``, the tokens of each, -1
    of one that is left out. The packer itself runs, over arrays of those sizes that take no memory.
    """
    if sizes is None:
        samples = epochs * len(dataset)
        return [len(range(number, samples, lanes)) for number in range(lanes)]
    parts = {name: _Sizes(part, sizes[name]) for name, part in dataset.parts.items()}
    measured = Dataset.__new__(Dataset)
    measured.__dict__ |= dataset.__dict__ | {"parts": {n: Part(n, source, source) for n, source in parts.items()}}  # type: ignore[arg-type]
    counts = []
    for number in range(lanes):
        lane = Lane(number, lanes, measured, seed, epochs=epochs, most_bad=len(dataset) * epochs)
        rows = 0
        while lane.next_row() is not None:
            rows += 1
        counts.append(rows)
    return counts


class _Sizes:
    """Source and processor of samples of which only the size is known."""

    def __init__(self, part: Part, sizes: np.ndarray) -> None:
        self.path, self.sizes, self.reference = part.source.path, sizes, part.source.reference

    def __len__(self) -> int:
        return self.sizes.shape[1]

    def read(self, index: int) -> int:
        return index

    def keys(self) -> Any: ...

    def check(self) -> None: ...

    def __call__(self, index: Any, visit: Any) -> dict[str, np.ndarray]:
        size = int(self.sizes[visit.epoch % len(self.sizes), index])
        if size < 0:
            raise UserError("left out")
        return {"ids": np.broadcast_to(np.int64(0), size)}


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
        said = f"{lanes}, its default for this batch" if lanes == default_lanes(global_batch) else str(lanes)
        raise UserError(
            f"data.lanes is {said}; it must divide batch.global {global_batch} and be a multiple of the {dp_size} data-parallel "
            f"processes. Set data.lanes; what fits: {', '.join(map(str, near))}. (It defines the order of samples, whatever the "
            "number of processes is: choose it once per run.)"
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
