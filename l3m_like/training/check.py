"""``--check``: everything short of training, on a machine without an accelerator, at full size and in seconds.

It runs what training runs, in training's order, on the meta device and a process group that does nothing: whatever raises a
UserError there raises it here. What it prints is what a run is going to do: mesh and batch, wiring and keys, parameters,
memory per rank, FLOPs.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from l3m_like.config import RunConfig
from l3m_like.config.strict import to_plain
from l3m_like.core.diagram import Diagram, shape_text
from l3m_like.core.errors import UserError
from l3m_like.core.meta_model import MetaModel
from l3m_like.core.wiring import Program, Trace, check_wiring, sizes_of
from l3m_like.data.lanes import check_lanes, default_lanes
from l3m_like.data.paths import DataMissing
from l3m_like.distributed.activations import refuse_hidden
from l3m_like.distributed.mesh import AXES, Mesh, axis_sizes, build_mesh
from l3m_like.distributed.parallelize import apply_tensor_parallel, parallelize
from l3m_like.generate.sampler import Inference
from l3m_like.pretrained.folder import FolderMissing
from l3m_like.training.checkpoint import refuse_other_model
from l3m_like.training.evaluate import Evaluations
from l3m_like.training.flops import FORMULA, StepFlops
from l3m_like.training.init import init_specs, materialize, random_weights
from l3m_like.training.memory import Activations, become_local, measure_activations, sharding, static_bytes
from l3m_like.training.optim import Route, groups_of, listing, routes
from l3m_like.training.schedule import Schedule
from l3m_like.training.start_from import find_checkpoint, starts
from l3m_like.training.train import Plan, plan
from l3m_like.training.updates import assign_parameters

#: exit code where the data, or anything else that lies on another machine, could not be looked at
NOT_CHECKED = 2
ABSENT = f"not checked, because it is not on this machine (exit code {NOT_CHECKED})"


@dataclass(frozen=True)
class Section:
    """A heading, and rows of cells or plain lines below it."""

    title: str
    rows: Sequence[Sequence[str]] = ()
    head: Sequence[str] = ()
    notes: Sequence[str] = ()
    #: numbers of the columns that are aligned right
    right: Sequence[int] = ()


@dataclass
class Report:
    """What ``check`` found. ``str`` of it is the plain text; ``show`` draws tables in a terminal."""

    sections: list[Section]
    #: what could not be checked here: ``{what: path}``
    missing: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    #: exact numbers, for callers: parameters, trainable, memory (bytes by term), flops_per_step, flops_per_unit,
    #: computed (FLOPs of a step on this rank, recomputation included: ``Activations.flops``)
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def code(self) -> int:
        """0, or 2: something could not be checked."""
        return NOT_CHECKED if self.missing else 0

    def __str__(self) -> str:
        return "\n".join(_plain(section) for section in self.sections)

    def show(self) -> None:
        """Print it: as tables if standard output is a terminal."""
        from rich.console import Console

        console = Console(highlight=False)
        if not console.is_terminal:
            print(self)
            return
        for section in self.sections:
            _rich(console, section)


def check(cfg: RunConfig, *, model_only: bool = False, processes: int | None = None) -> int:
    """Check ``cfg``, print the report (on rank 0) and return the exit code: 0, or 2 if data could not be checked.

    Under a launcher every rank calls it. Raises the UserErrors that training would raise.
    """
    report = examine(cfg, model_only=model_only, processes=processes)
    if not dist.is_initialized() or dist.get_rank() == 0:
        report.show()
    return report.code


def examine(cfg: RunConfig, *, model_only: bool = False, processes: int | None = None) -> Report:
    """The report of a run; see ``check``.

    Args:
        model_only: leave the data alone.
        processes: how many run it. None: WORLD_SIZE where a launcher set it, else the product of the axes in ``parallel``.
    """
    processes = world_size(cfg) if processes is None else processes
    sizes = axis_sizes(cfg.mesh_axes(), processes)
    dp_size = sizes["dp_replicate"] * sizes["dp_shard"]
    lanes = default_lanes(cfg.batch.global_) if cfg.data.lanes is None else cfg.data.lanes
    check_lanes(cfg.batch.global_, cfg.batch.micro or max(1, cfg.batch.global_ // dp_size), dp_size, lanes)
    with fake_mesh(cfg, processes) as mesh:
        run = plan(cfg, dp_size)
        made = _check_optimizer(cfg, run)
        if cfg.parallel.offload is not None:
            refuse_hidden(cfg.parallel.checkpoint, compiled=cfg.parallel.compile)
        sharded = _check_mesh(cfg, run, mesh)
        inference = _check_sampler(cfg, run.model)
        evaluations = Evaluations(cfg, run.model, run.losses, mesh, run.micro_rows, run.trace.limits)
        reasons: list[str] = []
        data, missing = _check_data(cfg, run, evaluations, reasons, skip=model_only)
        left: list[str] = []
        missing |= _check_start(cfg, run.model, left, reasons)
        flops, flops_numbers = _flops_section(cfg, run, dp_size)
        become_local(run.model, sharded, cfg.parallel.precision)
        trace = Trace(run.wiring, run.micro_rows)  # once more: plan's is in the dtype of the master weights
        _trace_evaluations(cfg, run, evaluations)
        shards = sharding(
            sharded,
            run_roots(sharded, run.parts),
            precision=cfg.parallel.precision,
            reshard_after_forward=cfg.parallel.reshard_after_forward,
            accumulation=run.accumulation,
        )
        meta = {
            key: torch.empty(spec.shape(**sizes_of(spec, run.micro_rows)), dtype=spec.dtype, device="meta")
            for key, spec in run.wiring.provided.items()
        }
        activations = measure_activations(
            run.model,
            run.updates,
            meta,
            checkpointing=cfg.parallel.checkpoint,
            offload=to_plain(cfg.parallel.offload),
            shards=shards,
            mesh=replace(mesh, world_size=1),
        )
    muon = {route.name for route in made if route.to == "muon"}
    static = static_bytes(sharded, ema=cfg.ema is not None, muon=muon)
    memory, memory_numbers = _memory_section(cfg, run, static, activations, sharded, processes)
    parameters, parameter_numbers = _parameter_section(sharded)
    warnings = [*run.wiring.warnings, *left, *_directory(cfg)]
    sections = [
        _run_section(cfg, run, sizes, processes, lanes, inference),
        Section("data", [(line,) for line in data]),
        *_wiring_sections(trace),
        Section("warnings", notes=warnings or ["none"]),
        parameters,
        *([Section("optimizers", [row[:-1] for row in listing(made)], right=(3,))] if muon else []),
        memory,
        flops,
        *([Section(ABSENT, notes=reasons)] if missing else []),
    ]
    return Report(sections, missing, warnings, {**parameter_numbers, **memory_numbers, **flops_numbers})


def world_size(cfg: RunConfig) -> int:
    """How many processes run ``cfg``: WORLD_SIZE, else the product of its mesh axes (an open one counts 1)."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return math.prod(size for size in cfg.mesh_axes().values() if size > 0)


@contextlib.contextmanager
def fake_mesh(cfg: RunConfig, processes: int) -> Iterator[Mesh]:
    """The mesh of ``processes`` processes, seen from rank 0: of the launcher's group if there is one, else of a group that
    moves no data and ends here."""
    if dist.is_initialized():
        yield build_mesh(cfg.mesh_axes(), torch.device("cpu"))
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield build_mesh(cfg.mesh_axes(), torch.device("cpu"))
    finally:
        dist.destroy_process_group()


# ---- the checks ----------------------------------------------------------------------------------------------------


def _check_optimizer(cfg: RunConfig, run: Plan) -> list[Route]:
    """Every parameter in one update and one group; a schedule that fits the run. The routes, where there is Muon."""
    assign_parameters(run.updates, {name: p for name, p in run.model.named_parameters() if p.requires_grad})
    made: list[Route] = []
    for update in run.updates:
        optim = update.settings
        groups_of(update.parameters, optim, optim.lr)
        if optim.muon is not None:
            made += routes(update.parameters, update.parts, optim.muon)
    shape = cfg.schedule
    # with `epochs` the data decides how long the run is: what is then a number of steps cannot be compared
    total = run.steps or max([2, *(2 * int(n) + 2 for n in (shape.warmup, shape.decay or 0) if n >= 1)])
    Schedule(shape.name, total=total, warmup=shape.warmup, decay=shape.decay, floor=shape.floor)
    return made


def _check_mesh(cfg: RunConfig, run: Plan, mesh: Mesh) -> nn.Module:
    """A copy of the model put on the mesh as training does it, with every plan name checked also where tp is 1."""
    sharded = copy.deepcopy(run.model)
    for name in run.parts:
        part = _part(sharded, name)
        init_specs(part)
        if mesh.size("tp") == 1:
            apply_tensor_parallel(copy.deepcopy(part), mesh)
        for _, block in part.blocks():
            block.bind(mesh)
        parallelize(
            part,
            mesh,
            precision=cfg.parallel.precision,
            checkpointing=cfg.parallel.checkpoint,
            reshard_after_forward=cfg.parallel.reshard_after_forward,
        )
        materialize(part, torch.device("meta"))
    if cfg.init is None:
        random_weights(run.parts.values())
    return sharded


def _part(model: nn.Module, name: str) -> MetaModel:
    return model.get_submodule(name) if name else model  # type: ignore[return-value]


def run_roots(model: nn.Module, names: Mapping[str, Any]) -> list[nn.Module]:
    """The parts of ``model`` with these names ("": the model itself)."""
    return [_part(model, name) for name in names]


def _check_sampler(cfg: RunConfig, model: nn.Module) -> str:
    """The inference graph against what the sampler supplies and takes."""
    if cfg.sample is None:
        return "no sampler (the `sample` section is not given)"
    sampler = cfg.instantiate("sample")
    name = type(sampler).__name__
    graph = Inference(model)
    if not hasattr(sampler, "check"):
        return f"{name} has no check(graph): its keys are compared when it runs"
    sampler.check(graph)
    return f"{name} over {', '.join(path for path, _ in graph.blocks)}"


def _check_data(
    cfg: RunConfig, run: Plan, evaluations: Evaluations, reasons: list[str], *, skip: bool
) -> tuple[list[str], dict[str, str]]:
    """One real sample of every dataset against its declaration: lines for the report, and ``{dataset: path not found}``, with
    ``reasons``."""
    datasets = {"data.train": run.dataset} | {f"evals.{name}.data": found for name, found in evaluations.datasets.items()}
    datasets |= {f"data.{name}": cfg.instantiate(f"data.{name}") for name in cfg.data.sets if name != "train"}
    lines, missing = [], {}
    for name, dataset in datasets.items():
        if skip:
            lines.append(f"{name}: left out (--check=model)")
            continue
        try:
            sample = dataset.check()
            lines.append(f"{name}: {len(dataset):,} samples in {dataset.source.path}; a row is as declared ({len(sample)} keys)")
        except DataMissing as error:
            missing[name] = error.path
            lines.append(f"{name}: NOT CHECKED ({error.path})")
            reasons.append(f"{name}: {error}")
            with contextlib.suppress(DataMissing):  # the tokenizer's file may be here though the text is not
                dataset.process.check()
    for name in evaluations.objects:
        try:
            evaluations.check(name)
        except DataMissing as error:
            missing[f"evals.{name}.run"] = error.path
            lines.append(f"evals.{name}.run: NOT CHECKED ({error.path})")
            reasons.append(str(error))
    return lines, missing


def _check_start(cfg: RunConfig, model: nn.Module, warnings: list[str], reasons: list[str]) -> dict[str, str]:
    """Weights and the checkpoint to start from must fit the model; ``{setting: place}`` of those that are not on this machine,
    with ``reasons``."""
    missing = {}
    for start in starts(model, cfg.init) if cfg.init is not None else ():
        try:
            warnings += [f"{start.setting}: {line}" for line in start.fit(download=False).left]
        except FolderMissing as error:
            missing[start.setting] = start.where
            reasons.append(str(error))
    where = cfg.checkpoint.resume
    if where not in ("auto", "never"):
        try:
            refuse_other_model(*find_checkpoint(where, "checkpoint.resume"), model)
        except FolderMissing as error:
            missing["checkpoint.resume"] = where
            reasons.append(str(error))
    return missing


def _trace_evaluations(cfg: RunConfig, run: Plan, evaluations: Evaluations) -> None:
    """The shapes of every evaluation's graph that differs from training's."""
    for name, (losses, _) in evaluations.plans.items():
        dataset = evaluations.datasets[name]
        if cfg.evals[name].loss is not None or dataset.keys() != run.wiring.provided:
            Trace(check_wiring([Program(f"evals.{name}", run.parts, losses)], dataset.keys(), cfg.keep), run.micro_rows)


def _directory(cfg: RunConfig) -> list[str]:
    """A warning if the run's directory holds a run of another configuration (training would refuse to start there)."""
    from l3m_like.config.run_dir import first_difference

    saved = cfg.run_dir / "config.yaml"
    if cfg.debug or not saved.is_file():
        return []
    try:
        difference = first_difference(RunConfig.from_file(saved), cfg)
    except UserError as error:
        return [f"{cfg.run_dir} already holds a run whose config.yaml cannot be read: {error}"]
    if difference is None:
        return []
    return [f"{cfg.run_dir} already holds a run with another {difference[0]} ({difference[1]!r}): give this one a run.name"]


# ---- the sections of the report ------------------------------------------------------------------------------------


def _run_section(cfg: RunConfig, run: Plan, sizes: Mapping[str, int], processes: int, lanes: int, inference: str) -> Section:
    dp = sizes["dp_replicate"] * sizes["dp_shard"]
    axes = " x ".join(f"{axis} {sizes[axis]}" for axis in AXES if sizes[axis] > 1) or "no parallelism"
    global_batch = cfg.batch.global_
    fits = [n for n in range(1, lanes + 1) if lanes % n == 0 and not global_batch % (n * (cfg.batch.micro or 1))]
    parallel = cfg.parallel
    length = f"{run.steps:,} steps" if run.steps else f"{cfg.epochs} epochs (the data decides how many steps)"
    step = f"{global_batch} rows"
    if run.dataset.pack.units_per_row > 1:
        step += f" = {global_batch * run.dataset.pack.units_per_row:,} {run.dataset.unit}"
    batch = f"{global_batch} global = {run.micro_rows} micro x {run.accumulation} accumulation x {dp} data-parallel"
    compute = f"{parallel.precision}, activation checkpointing {parallel.checkpoint}"
    compute += ", compiled units" if parallel.compile else ""
    compute += "" if parallel.offload is None else f", activations offloaded but for the last {parallel.offload.keep}"
    rows = [
        ("mesh", f"{processes} process{'es' if processes > 1 else ''}: {axes}"),
        ("batch", f"{batch}; a step is {step}"),
        ("lanes", f"{lanes}; with this batch, data-parallel sizes that fit: {_listed(fits)}"),
        ("length", f"{length}; {cfg.schedule.name} schedule, peak lr {cfg.optim.lr:g}, {cfg.optim.name}"),
        ("compute", compute),
        ("updates", "; ".join(f"{u.name}: {len(u.parameters)} parameters, terms {', '.join(u.losses)}" for u in run.updates)),
        ("evals", ", ".join(cfg.evals) or "none"),
        ("sampling", inference),
    ]
    return Section(f"run {cfg.run.name}", rows)


def _listed(numbers: Sequence[int], most: int = 9) -> str:
    return ", ".join(map(str, numbers[:most])) + (f", ... {numbers[-1]}" if len(numbers) > most else "")


def _wiring_sections(trace: Trace) -> list[Section]:
    """The diagram and the key table of every update."""
    sections = []
    for program in trace.wiring.programs:
        of = f" of update {program.name}" if len(trace.wiring.programs) > 1 else ""
        sections.append(Section(f"wiring{of}", [(line,) for line in Diagram.of(trace, program.name).text().split("\n")]))
        rows: list[tuple[str, str, str]] = []
        for row in (row for row in trace.rows if row.program == program.name):
            reads = [f"{key} {shape_text(*value)}" for key, value in row.reads.items()]
            writes = [f"{key} {shape_text(*value)}" for key, value in row.writes.items()]
            lines = max(len(reads), len(writes), 2)
            sides = (side + [""] * (lines - len(side)) for side in ([row.path, f"  {row.block}"], reads, writes))
            rows += zip(*sides, strict=True)
        sections.append(Section(f"keys{of} (one micro-batch on one rank)", rows, ("block", "reads", "writes")))
    return sections


def _parameter_section(model: nn.Module) -> tuple[Section, dict[str, int]]:
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():  # a tied one counts once
        part = name.split(".")[0]
        row = counts.setdefault(part, [0, 0])
        row[0] += parameter.numel()
        row[1] += parameter.numel() if parameter.requires_grad else 0
    total, trainable = (sum(row[i] for row in counts.values()) for i in (0, 1))
    rows = [
        (part, f"{size:,}", f"{size / max(total, 1):.1%}", "" if trained == size else f"{size - trained:,} frozen")
        for part, (size, trained) in counts.items()
    ]
    frozen = "all trained" if trainable == total else f"{trainable:,} trained, {total - trainable:,} frozen"
    rows.append(("total", f"{total:,}", "", frozen))
    return Section("parameters", rows, right=(1, 2)), {"parameters": total, "trainable": trainable}


def _memory_section(
    cfg: RunConfig, run: Plan, static: Mapping[str, int], activations: Activations, sharded: nn.Module, processes: int
) -> tuple[Section, dict[str, Any]]:
    worst = activations.worst
    shards = "parallel.dp_shard (more ranks, smaller shards)"
    whole = run.accumulation > 1 and worst.gradients > static["gradients"] and processes > 1
    fewer = ["batch.micro", "parallel.tp"]
    fewer += [] if cfg.parallel.checkpoint == "full" else [f"parallel.checkpoint ({cfg.parallel.checkpoint}; full keeps least)"]
    elsewhere = "" if worst.activations == activations.peak else f"; at another moment {_gb(activations.peak)}"
    terms = [
        ("parameters", static["parameters"], "master weights, this rank's shard", shards),
        ("optimizer", static["optimizer"], _state_kept(run), shards),
        *([("average", static["ema"], "fp32 average of the trained weights", f"{shards}, ema: null")] if "ema" in static else []),
        (
            "gradients",
            worst.gradients,
            "whole, not sharded, while micro-batches accumulate" if whole else f"all of them: {_gb(static['gradients'])}",
            "batch.micro so large that nothing accumulates" if whole else shards,
        ),
        ("activations", worst.activations, f"{_gb(activations.saved)} are kept by the forward pass{elsewhere}", ", ".join(fewer)),
        ("gathered", worst.gathered, "weights put together for computing, gradients being reduced", "parallel.tp"),
    ]
    total = sum(size for _, size, _, _ in terms)
    largest = sorted(terms, key=lambda term: -term[1])[:3]
    rows = [term[:1] + (_gb(term[1]), term[2]) for term in terms]
    rows.append(("total", _gb(total), f"at the worst moment, {worst.name}; an accelerator's context (1 GB) comes on top"))
    notes = [
        *(f"less {name}: {knob}" for name, _, _, knob in largest),
        "Parameters and optimizer are exact. The rest is followed tensor by tensor through a forward and backward of one "
        "micro-batch on the meta device: eager (compiled units need no more), fused attention, FSDP by its rules.",
    ]
    numbers = {name: size for name, size, _, _ in terms} | {"saved": activations.saved, "total": total}
    title = f"memory per rank ({processes} process{'es' if processes > 1 else ''})"
    return Section(title, rows, notes=notes, right=(1,)), {"memory": numbers, "computed": activations.flops * run.accumulation}


def _state_kept(run: Plan) -> str:
    muon = [update.settings.muon is not None for update in run.updates]
    return "two moments of every trained weight" + (", one of what Muon trains" if any(muon) else "")


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def _flops_section(cfg: RunConfig, run: Plan, dp_size: int) -> tuple[Section, dict[str, Any]]:
    per_step = StepFlops(run.trace, cfg.parallel.checkpoint)
    if per_step.unknown:
        note = f"not known: {per_step.unknown}. MFU will not be reported."
        return Section("FLOPs", notes=[note]), {"flops_per_step": None, "flops_per_unit": None}
    work = per_step.of([{}])
    assert work is not None
    micro = work.model
    units = run.micro_rows * run.dataset.pack.units_per_row
    step = micro * run.accumulation * dp_size
    unit = run.dataset.unit.removesuffix("s")
    rows = [(f"per {unit}", f"{micro / units:.4g}"), ("per step", f"{step:.4g}  (all ranks)")]
    if work.recomputed:
        rows.append(("recomputed", f"{work.recomputed / work.model:.1%} more (parallel.checkpoint: {cfg.parallel.checkpoint})"))
    if run.steps:
        rows.append(("run", f"{step * run.steps:.4g}"))
    note = "" if run.dataset.pack.one_row_per_sample else " Here every row counts as one document; shorter ones need less."
    return Section("FLOPs", rows, notes=[FORMULA + "." + note]), {"flops_per_step": step, "flops_per_unit": micro / units}


# ---- printing ------------------------------------------------------------------------------------------------------


def _plain(section: Section) -> str:
    lines = [section.title]
    table = [*([section.head] if section.head else []), *section.rows]
    if table:
        widths = [max(len(row[i]) for row in table if i < len(row)) for i in range(len(table[0]))]
        for row in table:
            sides = [str.rjust if i in section.right else str.ljust for i in range(len(row))]
            lines.append("  " + "  ".join(side(cell, w) for side, cell, w in zip(sides, row, widths, strict=False)).rstrip())
    lines += [textwrap.fill(note, 126, initial_indent="  ", subsequent_indent="  ") for note in section.notes]
    return "\n".join([*lines, ""])


def _rich(console: Any, section: Section) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console.print(Text(section.title, style="bold cyan"))
    if section.rows:
        table = Table(box=box.SIMPLE_HEAD if section.head else None, show_header=bool(section.head), padding=(0, 1))
        for number in range(len(section.rows[0])):
            head = section.head[number] if section.head else ""
            style = "bold" if number == 0 and len(section.rows[0]) > 1 else None
            table.add_column(head, justify="right" if number in section.right else "left", style=style, no_wrap=number == 0)
        for row in section.rows:
            table.add_row(*(Text(cell, style="yellow" if "NOT CHECKED" in cell else "") for cell in row))
        console.print(table)
    for note in section.notes:
        console.print(Text(f"  {note}"))
    console.print()
