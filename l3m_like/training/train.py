"""THE loop. Every experiment runs through this file; what makes one differ from another is its blocks, losses and data.

Read it top to bottom. ``plan`` builds and checks everything without touching memory; ``train`` puts it on the mesh and loops.
A step is: the control word (all ranks agree on whether there is a batch, on every term's global count, and on signals), then
for each update the micro-batches forward and backward, clip, step. Nothing waits for the accelerator but the lines that log,
evaluate and save.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.config import RunConfig, start_run
from l3m_like.config.strict import to_plain
from l3m_like.core.diagram import Diagram
from l3m_like.core.errors import Stopped, UserError
from l3m_like.core.meta_model import MetaModel
from l3m_like.core.wiring import Trace, Wiring, check_wiring, parts_of
from l3m_like.data.lanes import check_lanes, default_lanes
from l3m_like.data.loader import Loader
from l3m_like.distributed.compiled import Graphs
from l3m_like.distributed.gradients import set_gradient_sync
from l3m_like.distributed.mesh import build_mesh, gather_objects
from l3m_like.distributed.parallelize import parallelize
from l3m_like.kernels.select import in_use
from l3m_like.training.build import build_model
from l3m_like.training.checkpoint import Checkpointer
from l3m_like.training.control import Signals, fetch, micro_batch
from l3m_like.training.debug import Debug
from l3m_like.training.evaluate import Evaluations
from l3m_like.training.flops import StepFlops, peak_flops
from l3m_like.training.init import init_specs, initialize, materialize, random_weights
from l3m_like.training.lora import load_adapters, none_bypassed, refuse_random_base
from l3m_like.training.optim import EMA, Guard
from l3m_like.training.record import StepRecord, flush, watch_bad_samples, watch_bad_steps
from l3m_like.training.report import Reporter
from l3m_like.training.schedule import Schedule
from l3m_like.training.start_from import find_checkpoint, frozen_parts, load_weights, restore_sources
from l3m_like.training.state import state_tensors
from l3m_like.training.updates import (
    Update,
    add_source_metrics,
    assign_parameters,
    plan_updates,
    refuse_gaps,
    refuse_split,
    refuse_state,
    refuse_untied,
)

log = logging.getLogger(__name__)


@dataclass
class Plan:
    """A run before a byte of accelerator memory is used: the model on the meta device, wired and checked."""

    model: nn.Module
    parts: Mapping[str, MetaModel]
    losses: Mapping[str, Any]
    updates: list[Update]
    wiring: Wiring
    trace: Trace
    dataset: Any
    steps: int | None  # None: `epochs`, which the data decides
    micro_rows: int
    accumulation: int


def plan(cfg: RunConfig, dp_size: int) -> Plan:
    """Instantiate and check everything that needs no weights. ``--check`` prints what comes back; ``train`` trains it."""
    model = build_model(cfg)
    with torch.device("meta"):
        losses = cfg.instantiate("loss")
    parts = parts_of(model)
    refuse_state(losses)
    refuse_untied(parts)
    if cfg.init is None and cfg.checkpoint.resume in ("auto", "never"):
        random_weights(parts.values())  # a frozen part that nothing would be loaded into
    refuse_random_base(cfg)
    check_lanes(cfg.batch.global_, cfg.batch.micro or 1, dp_size, cfg.data.lanes or default_lanes(cfg.batch.global_))
    updates = plan_updates(cfg, parts, losses)
    rows = cfg.batch.global_ // dp_size
    micro_rows = cfg.batch.micro or rows
    refuse_split(updates, rows // micro_rows, cfg.parallel.pp)
    dataset = cfg.instantiate("data.train")
    add_source_metrics(updates, {name: dataset.pack.source_key(name) for name in dataset.names})
    wiring = check_wiring([update.program for update in updates], dataset.keys(), cfg.keep)
    for number, update in enumerate(updates):
        update.graphs = wiring.graphs[update.name]
        ran = [(step.block, graph.inference) for graph in update.graphs.values() for step in graph.steps]
        written = {key for block, inference in ran for key in block.writes_in(inference).values()}
        later = dict.fromkeys(key for other in updates[number + 1 :] for key in wiring.carried[other.name])
        update.keep = tuple(key for key in later if key in written)
    refuse_gaps(updates, wiring.carried)
    with none_bypassed(model):
        trace = Trace(wiring, micro_rows)
    dataset.limits = trace.limits
    if cfg.tokens is not None and dataset.unit != "tokens":
        raise UserError(f"tokens: {cfg.tokens}: this data is counted in {dataset.unit}. Give `steps` or `epochs` instead.")
    steps = cfg.steps if cfg.tokens is None else -(-cfg.tokens // (cfg.batch.global_ * dataset.pack.units_per_row))
    return Plan(model, parts, losses, updates, wiring, trace, dataset, steps, micro_rows, rows // micro_rows)


def train(cfg: RunConfig | str | Path | Mapping[str, Any]) -> dict[str, float]:
    """Train what ``cfg`` describes and return the final metrics (``loss``, one entry per evaluation, ...).

    Raises:
        UserError: bad input, with the fix. Stopped: SIGTERM or SIGUSR1 came, and the run was saved.
    """
    with contextlib.ExitStack() as closing:
        return _train(RunConfig.of(cfg), closing)


def _train(cfg: RunConfig, closing: contextlib.ExitStack) -> dict[str, float]:
    # ---- mesh, model, weights ------------------------------------------------------------------------------------
    if cfg.deterministic != torch.are_deterministic_algorithms_enabled():  # the call imports the compiler, which takes seconds
        torch.use_deterministic_algorithms(cfg.deterministic)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    mesh = build_mesh(cfg.mesh_axes())
    kernels = in_use(dataclasses.asdict(cfg.kernels), mesh.device.type, cfg.parallel.precision)
    run = plan(cfg, mesh.dp_size)
    run_dir = start_run(cfg)
    updates, parts = run.updates, run.parts
    checkpointer = Checkpointer(
        run_dir / "checkpoints",
        keep_last=cfg.checkpoint.keep_last,
        keep_every=cfg.checkpoint.keep_every,
        asynchronous=cfg.checkpoint.asynchronous,
    )
    closing.push(lambda failed, *_: checkpointer.close(quiet=failed is not None))
    resumes = checkpointer.latest() is not None or cfg.checkpoint.resume not in ("auto", "never")
    for loss in run.losses.values():
        loss.bind(mesh)
    graphs = Graphs(cfg.parallel.compile_limit)
    offload = to_plain(cfg.parallel.offload)
    specs = {name: init_specs(part) for name, part in parts.items()}
    for part in parts.values():
        for _, block in part.blocks():
            block.bind(mesh)
        parallelize(
            part,
            mesh,
            precision=cfg.parallel.precision,
            checkpointing=cfg.parallel.checkpoint,
            compile_units=graphs if cfg.parallel.compile else False,
            offload=offload,
            reshard_after_forward=cfg.parallel.reshard_after_forward,
        )
        materialize(part, mesh.device)
        part.train()
    if not resumes:
        loaded = load_weights(run.model, cfg.init) if cfg.init is not None else ()
        for name, part in parts.items():
            initialize(part, cfg.seed, f"{name}." if name else "", specs[name], without=loaded)
        load_adapters(run.model, cfg.lora, None if cfg.init is None else cfg.init.family)

    # ---- optimizers, state, data ---------------------------------------------------------------------------------
    trainable = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    assign_parameters(updates, trainable)
    for update in updates:
        update.prepare(mesh, Guard(mesh.device, spike=cfg.guard.spike_factor, window=cfg.guard.window))
    ema = EMA(trainable, cfg.ema.decay) if cfg.ema is not None else None
    tensors = state_tensors(run.model, updates, ema)
    saved: dict[str, Any] = {"step": 0, "data": None, "bad_steps": 0, "bad_samples": 0, "final": {}}
    if resumes:
        saved = resume(checkpointer, cfg.checkpoint.resume, tensors)
        restore_sources(run.model, saved["frozen"])
    checkpointer.clean()
    step, bad_steps, bad_samples = saved["step"], saved["bad_steps"], saved["bad_samples"]
    loader = Loader(
        run.dataset,
        seed=cfg.seed,
        global_batch=cfg.batch.global_,
        micro_batch=run.micro_rows,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        lanes=cfg.data.lanes,
        workers=cfg.data.workers,
        prefetch=cfg.data.prefetch,
        pin=mesh.device.type == "cuda",
        state=saved["data"],
        step=step,
        epochs=cfg.epochs,
        remainder=cfg.data.remainder,
        most_bad=cfg.data.max_bad_samples,
    )
    closing.push(lambda failed, *_: loader.close(wait=failed is None))
    steps: int = run.steps or loader.total_steps  # type: ignore[assignment]  # one of them is given
    shape = cfg.schedule
    schedule = Schedule(shape.name, total=steps, warmup=shape.warmup, decay=shape.decay, floor=shape.floor)
    flops = StepFlops(run.trace, cfg.parallel.checkpoint)
    evaluations = Evaluations(cfg, run.model, run.losses, mesh, run.micro_rows, run.trace.limits)
    for name in evaluations.objects:
        evaluations.check(name)
    stamp = cfg.facts() | {"mesh": str(mesh), "random_weights": random_weights(parts.values())}
    stamp["parameters"] = sum(p.numel() for p in trainable.values())
    peak = peak_flops(mesh)
    reporter = Reporter(cfg.log, run_dir, mesh.is_main, step, stamp, total=steps, peak_flops=peak, run_id=cfg.run.id)
    reporter.say(kernels)
    if step >= steps:
        reporter.say(f"{run_dir} is at step {step} of {steps}: nothing to train (steps=N goes on, run.name=NAME begins another).")
    elif step > 0:
        reporter.say(f"continuing {run_dir} at step {step} of {steps}")
    if mfu := flops.describe(peak):
        reporter.say(mfu)

    if mesh.is_main:
        Diagram.of(run.trace).save(run_dir / "diagram.svg")
    if cfg.debug:
        closing.callback(Debug(parts, run_dir, rank=mesh.rank).close)

    # ---- the loop ------------------------------------------------------------------------------------------------
    signals = Signals()
    closing.callback(signals.restore)
    upcoming = fetch(loader, updates, signals, mesh) if step < steps else None
    over = upcoming is None
    pending: list[StepRecord] = []
    final: dict[str, float] = saved["final"]

    def evaluate(last: bool) -> None:
        for name, found in evaluations.run(step, ema, last=last):
            reporter.evaluation(step, name, found)
            final.update({f"{name}/{key}": value for key, value in found.values.items()})

    if saved.get("owed"):  # the run was asked to stop at a step that has an evaluation
        evaluate(last=False)
    began = time.perf_counter()
    gc.collect()
    gc.disable()  # ranks that collect at different moments wait for each other
    closing.callback(gc.enable)
    while upcoming is not None:
        batch, totals, stop = upcoming.agreed()
        scale = schedule.scale(step)
        sums: dict[str, Tensor] = {}
        norms: dict[str, tuple[Tensor, Tensor]] = {}
        carried: list[dict[str, Tensor]] = [{} for _ in batch.micro]
        for update in updates:
            if not update.active(step):
                continue
            update.train_only_own(updates)
            micro = functools.partial(micro_batch, batch, carried, cfg.seed, step, mesh)
            shares = update.whole_batch(len(batch.micro), micro, totals, mesh, step)
            for number, share in enumerate(shares):
                set_gradient_sync(update.parts.values(), number == len(batch.micro) - 1)
                terms, kept = update.forward_backward(micro(number), totals, mesh, step, share)
                carried[number] |= kept
                for name, (value, count) in terms.items():
                    earlier, counted = sums.get(name, (0, 0))
                    late = update.losses[name].count_late  # its count is that of the micro-batch
                    sums[name] = torch.stack((value + earlier, count + counted if late else count))
            norms[update.name] = update.step(mesh, scale)
        if ema is not None:
            ema.update(torch.stack([skipped for _, skipped in norms.values()]).amax())
        rates = {update.name: update.settings.lr * scale for update in updates if update.name in norms}
        units = {name: sum(run.dataset.units(micro, name) for micro in batch.micro) for name in (None, *run.dataset.names)}
        work = flops.of(batch.micro)
        step += 1
        graphs.after_step()
        # a run that stops waits for no more data: that may be slow, or fail
        leaves = stop and step < steps
        upcoming = fetch(loader, updates, signals, mesh) if step < steps and not leaves else None
        waited = 0.0 if upcoming is None else upcoming.data_wait
        pending.append(StepRecord(step - 1, sums, norms, batch, rates, waited, units, work))
        over = upcoming is None and not leaves  # on all ranks
        ending = over or leaves

        # ---- log, evaluate, save: the only lines that wait for the device
        saving = ending or (cfg.checkpoint.every is not None and step % cfg.checkpoint.every == 0)
        if saving or step % cfg.log.every == 0 or evaluations.due(step):
            rows = flush(pending, updates, mesh, began, unit=run.dataset.unit, refs=cfg.log.refs, ledger=cfg.data.keeps_ledger)
            rows[-1] |= graphs.news()
            reporter.attention(block for part in parts.values() for _, block in part.blocks())
            reporter.steps(rows)
            bad_steps = watch_bad_steps(rows, bad_steps, cfg.guard.max_bad_steps)
            bad_samples = watch_bad_samples(rows, bad_samples, cfg.data.max_bad_samples)
            final |= {"step": step, "loss": rows[-1]["loss"]}
            pending.clear()
            if not leaves:
                evaluate(last=over)
            if saving:
                lanes = {lane: state for states in gather_objects(batch.state) for lane, state in states.items()}
                counted = {"bad_steps": bad_steps, "bad_samples": bad_samples}
                owed = leaves and bool(evaluations.due(step))
                state = {"step": step, "data": lanes, **counted, "final": final, "owed": owed, "config": cfg.to_dict()}
                state["frozen"] = {path: part.loaded_from for path, part in frozen_parts(run.model).items()}
                checkpointer.save(step, tensors, state)
            began = time.perf_counter()
        if step % cfg.gc_every == 0:
            gc.collect()
        if ending:
            break

    # ---- the end -------------------------------------------------------------------------------------------------
    checkpointer.wait()
    if cfg.parallel.compile:
        reporter.stamp["graphs"] = str(graphs)
    reporter.close(final)
    if over and step < steps:
        if mesh.is_main:
            log.warning("the data ended after step %d of %d", step, steps)
        if cfg.data.keeps_ledger:
            reporter.left_out(step + 1, [entry for entries in gather_objects(loader.left_out()) for entry in entries])
    if not over:
        raise Stopped(f"stopped by a signal after step {step} of {steps}; saved. The same command goes on from there.")
    return final


def resume(checkpointer: Checkpointer, where: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Load this run's newest checkpoint into ``tensors``; if it has none, the one that ``checkpoint.resume`` names."""
    found = checkpointer.resume(tensors)
    if found is not None:
        return found[1]
    folder, step = find_checkpoint(where, "checkpoint.resume")
    with contextlib.closing(Checkpointer(folder)) as other:
        return other.load(step, tensors)
