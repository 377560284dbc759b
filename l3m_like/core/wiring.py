"""The wiring check: one walk over data -> model -> losses in execution order, before a byte of accelerator memory is used.

It finds keys that nobody writes (with the nearest match), keys written twice, and keys that nobody reads; it says which
keys die after which block; and, run once on meta tensors, it gives every key its shape and dtype and every block its FLOPs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.core.block import Data, ReadWriteBlock
from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.keys import KeySpec, Limit
from l3m_like.core.meta_model import Frozen, Graph, MetaModel, Series, Step, Tower


@dataclass(frozen=True)
class Program:
    """What one update (or one evaluation) runs: parts in order, then losses."""

    name: str
    parts: Mapping[str, MetaModel]
    losses: Mapping[str, ReadWriteBlock]
    extra_reads: Mapping[str, str] = field(default_factory=dict)  # {key: who reads it}, e.g. the keys of metrics
    inference: Collection[str] = ()  # of the parts, those of which the inference graph runs


@dataclass
class Wiring:
    """The checked plan of a run."""

    programs: Sequence[Program]
    provided: Mapping[str, KeySpec]
    graphs: dict[str, dict[str, Graph]]
    carried: dict[str, tuple[str, ...]]
    warnings: list[str]

    def blocks(self, program: Program) -> list[tuple[str, ReadWriteBlock]]:
        """``(path, block)`` of everything that ``program`` runs, losses last."""
        rows = [
            (f"{name}.{step.path}" if name else step.path, step.block)
            for name in program.parts
            for step in self.graphs[program.name][name].steps
        ]
        return rows + [(f"loss.{name}", loss) for name, loss in program.losses.items()]


def parts_of(model: nn.Module) -> dict[str, MetaModel]:
    """``{name: MetaModel}``: one unnamed part, or the named ones of a Series."""
    if isinstance(model, MetaModel):
        return {"": model}
    if isinstance(model, Series):
        for name, part in model.items():
            if not isinstance(part, MetaModel):
                raise UserError(f"model.{name} is a {type(part).__name__}; a named model is a MetaModel.")
        return dict(model.items())  # type: ignore[arg-type]
    raise UserError(f"model is a {type(model).__name__}; it is a MetaModel or a named dict of MetaModels.")


def check_wiring(programs: Sequence[Program], provided: Mapping[str, KeySpec], keep: Iterable[str] = ()) -> Wiring:
    """Check that every key is written before it is read, and plan when each is dropped.

    Args:
        programs: in the order in which they run within a step; a later one may read what an earlier one wrote.
        provided: the loader's keys.
        keep: keys that stay in the data_dict to the end.

    Raises:
        UserError: a read that nobody writes, or a key written twice.
    """
    keep = tuple(keep)
    carried = _carried(programs, provided)
    read_anywhere = set(keep)
    written_by: dict[str, str] = {}
    graphs: dict[str, dict[str, Graph]] = {}
    for number, program in enumerate(programs):
        later = {key for other in programs[number + 1 :] for key in carried[other.name]}
        events = _events(program)
        available = dict.fromkeys(provided, "the data") | dict.fromkeys(carried[program.name], "an earlier update")
        for path, block, inference in events:
            _check_reads(path, block, available, inference)
            read_anywhere |= {key for key in block.reads.values() if key in available}
            _check_count(path, block, provided)
            for port, key in block.writes_in(inference).items():
                if path.startswith("loss."):
                    continue  # losses write terms, not keys
                if key in available and available[key] != "an earlier update":
                    raise UserError(
                        f"{path} ({type(block).__name__}) writes '{key}' (port '{port}'), which {available[key]} already "
                        f"wrote. No block overwrites a key: give it another name, e.g. `writes: {{{port}: {key}_2}}`."
                    )
                available[key] = path
                written_by.setdefault(key, path)
        for key, reader in program.extra_reads.items():
            if key not in available:
                raise UserError(f"{reader} reads '{key}', which nothing writes. {did_you_mean(key, available)}")
            read_anywhere.add(key)
        immortal = set(keep) | later | set(program.extra_reads)
        graphs[program.name] = _graphs(program, available, immortal)
    for key in keep:
        if key not in provided and key not in written_by:
            raise UserError(f"keep: nothing writes '{key}'. {did_you_mean(key, [*provided, *written_by])}")
    warnings = [
        f"'{key}' is written by {path} and read by nothing" for key, path in written_by.items() if key not in read_anywhere
    ]
    return Wiring(programs, provided, graphs, carried, warnings)


def _events(program: Program) -> list[tuple[str, ReadWriteBlock, bool]]:
    """``(path, block, is it run as at inference)`` in execution order, losses last."""
    events = [
        (f"{name}.{step.path}" if name else step.path, step.block, graph.inference)
        for name, graph in ((name, _graph(program, name)) for name in program.parts)
        for step in graph.steps
    ]
    return events + [(f"loss.{name}", loss, False) for name, loss in program.losses.items()]


def _graph(program: Program, name: str) -> Graph:
    part = program.parts[name]
    return part.inference() if name in program.inference else part.graph


def _carried(programs: Sequence[Program], provided: Mapping[str, KeySpec]) -> dict[str, tuple[str, ...]]:
    """The keys that each program takes from earlier programs of the same step."""
    before: set[str] = set()
    carried = {}
    for program in programs:
        written: set[str] = set()
        needed: dict[str, None] = {}
        for path, block, inference in _events(program):
            needed |= {k: None for k in block.reads.values() if k in before and k not in written and k not in provided}
            if not path.startswith("loss."):
                written |= set(block.writes_in(inference).values())
        carried[program.name] = tuple(needed)
        before |= written
    return carried


def _check_reads(path: str, block: ReadWriteBlock, available: Mapping[str, str], inference: bool) -> None:
    for port, key in block.reads.items():
        # at inference, a port that the config names may still be one that only training needs
        required = not block.ports[port] if inference and port in block.ports else port in block.required
        if required and key not in available:
            raise UserError(
                f"{path} ({type(block).__name__}) reads '{key}' for its port '{port}', which nothing before it writes. "
                f"{did_you_mean(key, available)}\nAvailable there: {', '.join(sorted(available))}."
            )


def _check_count(path: str, block: ReadWriteBlock, provided: Mapping[str, KeySpec]) -> None:
    if getattr(block, "count_late", False):
        return
    for port, key in getattr(block, "count_reads", {}).items():
        if key not in provided:
            raise UserError(
                f"{path} ({type(block).__name__}) counts on '{key}' (port '{port}'), which the data does not write. "
                f"{did_you_mean(key, provided)} A count known only in the forward needs a loss with count_late."
            )


def _graphs(program: Program, available: Mapping[str, str], immortal: set[str]) -> dict[str, Graph]:
    events = _events(program)
    last: dict[str, int] = {}
    for index, (_, block, inference) in enumerate(events):
        for key in (*block.reads.values(), *block.writes_in(inference).values()):
            last[key] = index
    graphs, index = {}, 0
    for name in program.parts:
        graph, steps = _graph(program, name), []
        for step in graph.steps:
            dead = tuple(k for k in available if last.get(k) == index and k not in immortal)
            steps.append(Step(step.path, step.block, dead))
            index += 1
        graphs[name] = Graph(tuple(steps), graph.inference)
    return graphs


# ---- shapes and FLOPs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TraceRow:
    """One block of the key table: what it reads and writes, with shapes and dtypes."""

    program: str
    path: str
    block: str
    reads: dict[str, tuple[tuple[int, ...], torch.dtype]]
    writes: dict[str, tuple[tuple[int, ...], torch.dtype]]
    flops: int | None


@dataclass(frozen=True)
class Leaf:
    """A block that computes by itself, as the trace met it: at the top, or inside a frozen part or a tower."""

    block: ReadWriteBlock
    reads: dict[str, str]
    ports: dict[str, Any]
    frozen: Frozen | None
    #: ``(key, rows)`` of the tower that it is in: FLOPs are those of so many rows
    tower: tuple[str, int] | None

    def flops(self) -> int | None:
        return self.block.flops(**self.ports)


class Trace:
    """The wiring, run once on meta tensors: shapes, dtypes and FLOPs of every block for one micro-batch.

    The model must be on the meta device (it is, before ``parallelize``).

    Raises:
        UserError: a block fails on the declared shapes; the message names block, keys and shapes.
    """

    def __init__(self, wiring: Wiring, rows: int) -> None:
        self.wiring = wiring
        self.rows: list[TraceRow] = []
        self._leaves: list[Leaf] = []
        #: of what data gives: ``{key: its tightest limit}``
        self.limits: dict[str, Limit] = {}
        data: Data = {
            key: torch.empty(spec.shape(**sizes_of(spec, rows)), dtype=spec.dtype, device="meta")
            for key, spec in wiring.provided.items()
        }
        carried: Data = {}
        for program in wiring.programs:
            carried |= self._run(program, data | {k: carried[k] for k in wiring.carried[program.name]})

    @torch.no_grad()
    def _run(self, program: Program, data: Data) -> Data:
        inference = [graph.inference for graph in self.wiring.graphs[program.name].values() for _ in graph.steps]
        for (path, block), small in zip(self.wiring.blocks(program), [*inference, *(False for _ in program.losses)], strict=True):
            reads = {port: key for port, key in block.reads.items() if key in data}
            try:
                leaves = list(_leaves(block, data))
                flops = [leaf.flops() for leaf in leaves]
                self._note_limits(path, leaves)
                after = block(data, small)
            except UserError:
                raise
            except Exception as error:
                shapes = ", ".join(f"{key} {tuple(data[key].shape)}" for key in reads.values() if isinstance(data[key], Tensor))
                raise UserError(f"{path} ({type(block).__name__}) fails on {shapes}: {type(error).__name__}: {error}") from error
            writes = {} if path.startswith("loss.") else {k: after[k] for k in block.writes_in(small).values()}
            self.rows.append(
                TraceRow(
                    program.name,
                    path,
                    type(block).__name__,
                    _shapes({k: data[k] for k in reads.values()}),
                    _shapes(writes),
                    None if None in flops else sum(n or 0 for n in flops),
                )
            )
            if not path.startswith("loss."):
                self._leaves += leaves
                data = after
        return data

    def _note_limits(self, path: str, leaves: Sequence[Leaf]) -> None:
        for leaf in leaves:
            for port, below in leaf.block.limits(**leaf.ports).items():
                key = leaf.reads.get(port, "")
                if key in self.wiring.provided and (key not in self.limits or below < self.limits[key].below):
                    self.limits[key] = Limit(below, f"{path} ({type(leaf.block).__name__})")

    def undeclared(self) -> list[str]:
        """The blocks that have parameters but do not say their FLOPs (MFU is then unknown, not 0)."""
        return [f"{row.path} ({row.block})" for row in self.rows if row.flops is None]

    def flops_by_block(self, batch: Mapping[str, Any] | None = None) -> Iterator[tuple[ReadWriteBlock, int]]:
        """``(block, forward FLOPs of one micro-batch)``; with ``batch`` (CPU tensors), by its real document lengths.

        What is inside a frozen part comes with that part as its block; what is inside a tower counts by the rows that the
        tower has in ``batch`` (none: its dummy is not counted).
        """
        for leaf in self._leaves:
            block = leaf.frozen or leaf.block
            if batch is None:
                yield block, leaf.flops() or 0
            elif leaf.tower is not None and leaf.tower[0] in self.wiring.provided:
                key, traced = leaf.tower
                yield block, (leaf.flops() or 0) * (len(batch[key]) if key in batch else 0) // traced
            else:
                real = {port: batch[key] for port, key in leaf.reads.items() if key in batch}
                yield block, leaf.block.flops(**(leaf.ports | real)) or 0


def _leaves(
    block: ReadWriteBlock, data: Data, frozen: Frozen | None = None, tower: tuple[str, int] | None = None
) -> Iterator[Leaf]:
    """The blocks that compute, in ``block`` or below it. ``data`` holds meta tensors."""
    if not isinstance(block, (Frozen, Tower)):
        reads = {port: key for port, key in block.reads.items() if key in data}
        yield Leaf(block, reads, {port: data[key] for port, key in reads.items()}, frozen, tower)
        return
    if isinstance(block, Frozen):
        frozen = block
    elif block.optional_inputs:
        data = block.dummy(torch.device("meta")) | data
        tower = block.optional_inputs[0], len(data[block.optional_inputs[0]])
    for _, inner in block.model.blocks():
        yield from _leaves(inner, data, frozen, tower)
        data = inner(data)


def sizes_of(spec: KeySpec, rows: int) -> dict[str, int]:
    """A number for each symbol of ``spec``: the rows for B, and any two of what only the data knows (documents ...)."""
    return {dim: 2 for dim in spec.dims if isinstance(dim, str)} | {"B": rows}


def _shapes(data: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {key: (tuple(value.shape), value.dtype) for key, value in data.items() if isinstance(value, Tensor)}
