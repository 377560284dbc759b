"""What samplers share: the inference graph of a live model, and rows dealt over the mesh.

A sampler is a plain object with settings. ``run(model, process=, mesh=)`` may be called at any time, also between two steps
of training on the sharded model; every rank calls it, and every rank gets all samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from l3m_like.core.block import Data, ReadWriteBlock
from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.meta_model import Graph, Step
from l3m_like.core.wiring import parts_of
from l3m_like.distributed.compiled import Graphs
from l3m_like.distributed.mesh import Mesh, gather_objects
from l3m_like.distributed.parallelize import reshard

T = TypeVar("T")


class Samples(Protocol):
    """What a sampler returns. ``str(samples)`` is for people to read."""

    #: of the file that ``save`` writes
    suffix: str

    def save(self, path: str | Path) -> Path:
        """Write them to ``path`` and return it."""


class Sampler(Protocol):
    """What the ``sample`` section of a run builds."""

    def run(self, model: nn.Module, *, process: Any = None, mesh: Mesh | None = None) -> Samples:
        """Sample from ``model`` as it is now.

        Args:
            model: a MetaModel or Series, on ``mesh`` or in one process.
            process: the processor of the data (``dataset.process``), for what is not a tensor: a tokenizer.
            mesh: its data-parallel ranks share the rows. None: every process computes all rows.

        Returns:
            All samples, equal on every rank, in the order of their row numbers.
        """


class Inference:
    """The inference graph of a model, whose parts run one after the other. Make it with ``sampling``."""

    def __init__(self, model: nn.Module, graphs: Mapping[str, Graph] | None = None) -> None:
        parts = parts_of(model)
        self.model = model
        self.graphs = {name: part.inference() for name, part in parts.items()} if graphs is None else dict(graphs)
        self.parts = {name: parts[name] for name in self.graphs}
        #: ``(path, block)`` of all that runs
        self.blocks: list[tuple[str, ReadWriteBlock]] = [
            (f"{name}.{step.path}" if name else step.path, step.block)
            for name, graph in self.graphs.items()
            for step in graph.steps
        ]
        #: of these, the blocks that make a key/value cache
        self.cached: list[tuple[str, Any]] = [(path, block) for path, block in self.blocks if hasattr(block, "make_cache")]
        #: the repeating units of all of them
        self.units: list[nn.Module] = [unit for _, block in self.blocks for unit in block.shard_units()]
        parameter = next(model.parameters())
        self.device = parameter.device
        self.dtype = parameter.dtype

    def __call__(self, data: Data) -> Data:
        for name, part in self.parts.items():
            data = part(data, self.graphs[name])  # the root's forward: the one way into a sharded model
        return data

    def around(self, key: str) -> tuple[Inference, Inference]:
        """What runs before the block that writes ``key``, and that block with what follows: the second may then run several
        times on what the first one wrote."""
        steps = [(name, step) for name, graph in self.graphs.items() for step in graph.steps]
        at = next(number for number, (_, step) in enumerate(steps) if key in step.block.writes_in(True).values())
        return self._of(steps[:at]), self._of(steps[at:])

    def _of(self, steps: Sequence[tuple[str, Step]]) -> Inference:
        parts = dict.fromkeys(name for name, _ in steps)
        graphs = {name: Graph(tuple(step for part, step in steps if part == name), inference=True) for name in parts}
        return Inference(self.model, graphs)

    def reads(self, key: str) -> bool:
        """Whether some block reads ``key``."""
        return any(key in block.reads.values() for _, block in self.blocks)

    @property
    def gathers(self) -> bool:
        """Whether some block holds weights that FSDP gathers each time it is called, beside those of the root."""
        return any(isinstance(module, FSDPModule) for _, block in self.blocks for module in block.modules())

    def requires(self, key: str) -> bool:
        """Whether some block cannot do without ``key``."""
        return any(block.reads[port] == key for _, block in self.blocks for port in block.required)

    def check(self, sampler: str, supplied: Sequence[str], needed: Sequence[str], result: str) -> None:
        """Check that the graph reads the keys that a sampler supplies, and writes what it wants.

        Args:
            sampler: its name, for errors.
            supplied: the keys that it puts into the data.
            needed: of these, those that some block must read.
            result: the key that it takes from the data.

        Raises:
            UserError: a block reads a key that nobody supplies; nothing reads a needed key or writes the result.
        """
        available, read = set(supplied), set()
        for path, block in self.blocks:
            for port, key in block.reads.items():
                # a port that training names may be one that only training needs (a head's targets)
                if port in block.required and not block.ports[port] and key not in available:
                    raise UserError(
                        f"{sampler}: {path} ({type(block).__name__}) reads '{key}' for its port '{port}', which the sampler does "
                        f"not supply. {did_you_mean(key, available)} Set the sampler's `stream`, or mark blocks that only "
                        "training needs with `training_only: true`."
                    )
                read.add(key)
            available |= set(block.writes_in(True).values())
        for key in needed:
            if key not in read:
                raise UserError(f"{sampler}: no block of the inference graph reads '{key}'. {did_you_mean(key, read)}")
        if result not in available:
            written = available - set(supplied)
            raise UserError(f"{sampler}: no block of the inference graph writes '{result}'. {did_you_mean(result, written)}")


@contextmanager
def forwards(units: Sequence[nn.Module], graphs: Graphs | None = None) -> Iterator[None]:
    """The units' own ``forward`` for a while, without what training put around it (checkpointing, compilation, offload);
    compiled by ``graphs``, if there are any."""
    kept = [vars(unit).pop("forward", None) for unit in units]
    if graphs is not None:
        graphs.compile(units)
    try:
        yield
    finally:
        for unit, forward in zip(units, kept, strict=True):
            vars(unit).pop("forward", None)
            if forward is not None:
                unit.forward = forward


@contextmanager
def sampling(model: nn.Module, *, eager: bool = False) -> Iterator[Inference]:
    """The inference graph of ``model`` for a while: no gradients, evaluation mode; the model is left as it was found.

    Args:
        eager: do not compile (shapes that are not those of training would be compiled anew).
    """
    graph = Inference(model)
    modes = [(part, part.training) for part in graph.parts.values()]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if eager:
            stack.enter_context(forwards(graph.units))
        reshard(model)
        for part, _ in modes:
            part.eval()
        try:
            yield graph
        finally:
            for part, mode in modes:
                part.train(mode)
            reshard(model)


def deal(total: int, batch: int, mesh: Mesh | None) -> Iterator[tuple[list[int], bool]]:
    """This rank's rows of ``0 .. total - 1`` in chunks of at most ``batch``: ``(row numbers, do they count)``.

    The number of chunks is the same on every rank; a rank without rows computes row 0, which does not count.
    """
    size, rank = (mesh.dp_size, mesh.dp_rank) if mesh is not None else (1, 0)
    own = range(rank, total, size)
    for start in range(0, -(-total // size), batch):
        rows = list(own[start : start + batch])
        yield rows or [0], bool(rows)


def collect(found: Mapping[int, T], mesh: Mesh | None) -> list[T]:
    """``{row: sample}`` of every rank -> all samples in row order, on every rank."""
    merged = dict(found)
    if mesh is not None:
        for part in gather_objects(merged if mesh.speaks_for_rows else {}):
            merged |= part
    return [merged[row] for row in sorted(merged)]
