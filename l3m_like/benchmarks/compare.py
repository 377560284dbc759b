"""Ours and theirs on the same work: the same sizes, initial weights, batches, rows per step and optimizer, one GPU, in turn.

Each side runs at its own best micro-batch, theirs also as its fastest variant. What was tried is printed with what was chosen.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.benchmarks.bench import bench, peak_memory, run_length
from l3m_like.benchmarks.peers import Batch, Decoder, Diffusion, Peer, Variant, chosen_variants, sizes_of, versions
from l3m_like.config import RunConfig
from l3m_like.core.errors import UserError
from l3m_like.data.loader import Loader
from l3m_like.distributed.mesh import Mesh, build_mesh
from l3m_like.pretrained import NameMap, export_state
from l3m_like.training.flops import FORMULA, peak_flops
from l3m_like.training.init import initialize, materialize
from l3m_like.training.metrics import short
from l3m_like.training.schedule import Schedule
from l3m_like.training.train import Plan, plan

#: is told of every phase
Say = Callable[[str], None]


@dataclass(frozen=True)
class Reference:
    """What a peer reached on a device before: if it does not come near that here, the comparison is not fair."""

    device: str
    parameters: int
    #: tokens of a row; None: images
    sequence: int | None
    per_second: float
    what: str


#: one H200 (989 TFLOP/s dense bf16), torch 2.11+cu130, bf16 autocast, fused AdamW, gradient clipping, 2026-11-21
REFERENCES = (
    Reference("H200", 596_049_920, 4096, 52_808, "transformers compiled, 4 rows of 4096"),
    Reference("H200", 1_720_574_976, 4096, 31_124, "transformers compiled, 2 rows of 4096"),
    Reference("H200", 1_720_574_976, 8192, 23_443, "transformers compiled, 1 row of 8192"),
    Reference("H200", 674_834_720, None, 502, "SiT's code, bf16, compiled, batch 64"),
)
#: of a reference, below which a comparison is void
ENOUGH = 0.95
SPENT = "out of memory"


def compare(
    cfg: RunConfig,
    steps: int,
    *,
    warmup: int,
    micro: Sequence[int] | None,
    rows: int | None,
    variants: Sequence[str] | None,
    rounds: int,
    say: Say,
) -> dict[str, Any]:
    """Measure ``cfg`` and its peers.

    Args:
        cfg: a run that a peer exists for (see ``peers.sizes_of``).
        steps, warmup: of every measurement.
        micro: micro-batches to try. None: the usual ones of the kind of model.
        rows: per optimizer step, the same on both sides. None: the largest of ``micro``.
        variants: of the peer. None: all usual ones that are installed.
        rounds: the search is the first; in each further one ours and the peer's best run again, in turn.
        say: told of every phase.

    Returns:
        JSON values; see ``report``. ``void``: the peer is slower than its reference figure for this device, and so the ratio
        says nothing.

    Raises:
        UserError: a run without a peer, several processes, numbers that do not fit.
    """
    mesh = build_mesh(cfg.mesh_axes())
    if mesh.world_size > 1:
        raise UserError(f"--compare runs in one process, and {mesh.world_size} were started. Start it without torchrun.")
    if rounds < 1 or steps < 1 or warmup < 1:
        raise UserError(f"--compare: {rounds} rounds of {steps} steps after {warmup} of warm-up; at least 1 of each are needed.")
    cfg.batch.global_, cfg.batch.micro, cfg.data.lanes = 1, 1, None
    sizes = sizes_of(cfg, plan(cfg, 1))
    sizes_to_try = sorted(set(micro or sizes.micro))
    rows = max(sizes_to_try) if rows is None else rows
    for size in sizes_to_try:
        if size < 1 or rows < 1:
            raise UserError(f"--compare: micro-batches of {size} rows and {rows} rows per step; at least 1 of each are needed.")
        if rows % size:
            raise UserError(
                f"--compare: {rows} rows per step are no multiple of the micro-batch {size}. Both sides must step after equally "
                "many rows: change --rows or --micro."
            )
    cfg.batch.global_, cfg.batch.micro = rows, rows
    chosen, skipped = chosen_variants(sizes, variants)
    say(f"comparing {cfg.experiment}: {rows} rows per step, micro-batches {sizes_to_try}, peers {', '.join(chosen)}")

    def ours_at(size: int, tell: Say) -> dict[str, Any]:
        mine = copy.deepcopy(cfg)
        mine.batch.micro = size
        return bench(mine, steps, warmup=warmup, keep_ema=True, say=tell)

    ours = _search("ours", sizes_to_try, ours_at, mesh, say)
    if not any(isinstance(found, dict) for found in ours.values()):
        raise UserError(f"--compare: ours ran at none of the micro-batches: {ours}. Try smaller ones (--micro).")
    work = Work.of(cfg, mesh, sizes, steps, warmup, say)
    tried = {
        name: _search(name, sizes_to_try, functools.partial(work.measure, variant), mesh, say, forgiving=True)
        for name, variant in chosen.items()
    }
    theirs = {
        (name, size): found for name, by_size in tried.items() for size, found in by_size.items() if isinstance(found, dict)
    }
    if not theirs:
        raise UserError(f"--compare: no variant of the peer ran: {tried}. Try smaller micro-batches (--micro).")
    best = min((size for size, found in ours.items() if isinstance(found, dict)), key=lambda size: ours[size]["seconds"])
    name, their_best = min(theirs, key=lambda key: theirs[key]["seconds"])
    turns: dict[str, list[Any]] = {"ours": [ours[best]], "peer": [theirs[name, their_best]]}
    again = functools.partial(work.measure, chosen[name])
    for number in range(2, rounds + 1):
        say(f"round {number} of {rounds}")
        turns["ours"] += _search("ours", [best], ours_at, mesh, say).values()
        turns["peer"] += _search(name, [their_best], again, mesh, say, forgiving=True).values()
    turns = {side: [found for found in measured if isinstance(found, dict)] for side, measured in turns.items()}
    say("done")
    return _result(cfg, mesh, work, {"ours": ours} | tried, turns, (best, name, their_best), skipped)


def _search(
    name: str, sizes: Sequence[int], run: Callable[[int, Say], dict[str, Any]], mesh: Mesh, say: Say, *, forgiving: bool = False
) -> dict[int, Any]:
    """``{micro-batch: what run gave, or why it gave nothing}``, up to the first that does not fit into memory.

    ``forgiving``: whatever a library raises is such a reason, so that the others are still measured.
    """
    found: dict[int, Any] = {}
    for size in sizes:
        tell = functools.partial(_tell, say, f"{name}, micro-batch {size}")
        why = ""
        held = torch.cuda.memory_allocated(mesh.device) if mesh.device.type == "cuda" else 0
        try:
            found[size] = run(size, tell)
            found[size]["memory"] -= held  # what is left of the variants before, which the compiler keeps, is not this one's
        except UserError:
            raise
        except Exception as error:
            if not _is_out_of_memory(error) and not forgiving:
                raise
            lines = str(error).strip().splitlines()
            why = SPENT if _is_out_of_memory(error) else f"failed: {type(error).__name__}: {lines[0] if lines else ''}"
        _free(mesh)  # after the handler: the error holds the frames, and they hold the model
        if why:
            found[size] = why
            tell(why)
            if why == SPENT:
                break  # so would the larger ones be
    return found


def _tell(say: Say, who: str, text: str) -> None:
    say(f"{who}: {text}")


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(
        word in str(error).lower() for word in ("out of memory", "alloc_failed", "alloc failed")
    )


def _free(mesh: Mesh) -> None:
    """Give back what the run before held, compiled code included: the next has other shapes, and would be compiled for any."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()


# ---- the peer's training ---------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """What both sides do: the run's batches, initial weights and optimizer."""

    cfg: RunConfig
    mesh: Mesh
    sizes: Decoder | Diffusion
    steps: int
    warmup: int
    #: one batch per step, with all its rows
    batches: list[Batch]
    #: our initial parameters, on the CPU
    weights: dict[str, Tensor]
    documents: bool

    @classmethod
    def of(cls, cfg: RunConfig, mesh: Mesh, sizes: Decoder | Diffusion, steps: int, warmup: int, say: Say) -> Work:
        say("the peer's batches and weights")
        run = plan(cfg, 1)
        rows = cfg.batch.global_
        loader = Loader(
            run.dataset, seed=cfg.seed, global_batch=rows, micro_batch=rows, prefetch=0, pin=mesh.device.type == "cuda"
        )
        with contextlib.closing(loader):
            made = [loader.next_step() for _ in range(warmup + steps)]
        batches: list[Batch] = [{key: step.micro[0][key] for key in sizes.keys} for step in made if step is not None]
        if len(batches) < warmup + steps:
            raise UserError(f"--compare: the data ended before {warmup + steps} steps; lower --steps.")
        weights = _weights(cfg, run, mesh)
        _free(mesh)
        return cls(cfg, mesh, sizes, steps, warmup, batches, weights, isinstance(sizes, Decoder) and _several(batches))

    def peer(self, variant: Variant) -> Peer:
        """The variant with our initial weights."""
        peer = variant.make(self.sizes, self.mesh.device, self.documents)
        names = NameMap(peer.names, self.weights)
        missing, unexpected = peer.module.load_state_dict(export_state(names, self.weights), strict=False)
        left = [key for key in missing if key in dict(peer.module.named_parameters())]
        if left or unexpected:
            raise RuntimeError(f"the peer's parameters are not ours: {left} have no value, {unexpected} no place")
        return peer

    def measure(self, variant: Variant, micro: int, say: Say) -> dict[str, Any]:
        """Train the variant on all batches, in micro-batches of so many rows. Returns ``seconds`` (of a step, median),
        ``all_seconds``, ``losses`` (of the timed steps), ``memory`` (peak bytes) and ``flags``."""
        device = self.mesh.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        say("building")
        peer = self.peer(variant)
        with contextlib.ExitStack() as closing:
            closing.callback(peer.close)
            closing.enter_context(peer.kernels())
            train = PeerTraining(self.cfg, peer, device, micro, run_length(self.steps, self.warmup))
            collecting = gc.isenabled()
            gc.collect()
            gc.disable()  # as in our loop
            closing.callback(gc.enable if collecting else gc.disable)
            moments = []
            for number, batch in enumerate(self.batches):
                if number in (0, 1, self.warmup):
                    say({0: "first step", 1: "first step done"}.get(number, "warm-up done"))
                moments.append(_now(device))
                train.step(batch)
            moments.append(_now(device))
            losses = torch.stack(train.losses).tolist()  # waits for the device
            say(f"{self.steps} steps timed")
        seconds = [_between(start, end) for start, end in zip(moments, moments[1:], strict=False)][self.warmup :]
        return {
            "seconds": statistics.median(seconds),
            "all_seconds": seconds,
            "losses": losses[self.warmup :],
            "memory": peak_memory(device),
            "parameters": sum(p.numel() for p in peer.module.parameters()),
            "flags": f"{peer.flags}; {train.flags}",
        }


class PeerTraining:
    """The plain training loop of one peer: autocast, fused AdamW, clipping, schedule, average of weights."""

    def __init__(self, cfg: RunConfig, peer: Peer, device: torch.device, micro: int, steps: int) -> None:
        self.peer, self.device, self.micro, self.clip, self.lr = peer, device, micro, cfg.optim.clip, cfg.optim.lr
        self.bf16 = cfg.parallel.precision == "bf16"
        self.parameters = list(peer.module.parameters())
        decay = cfg.optim.weight_decay
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        betas = (cfg.optim.betas[0], cfg.optim.betas[1])
        self.optimizer = torch.optim.AdamW(groups, lr=cfg.optim.lr, betas=betas, eps=cfg.optim.eps, fused=True)
        shape = cfg.schedule
        self.schedule = Schedule(shape.name, total=steps, warmup=shape.warmup, decay=shape.decay, floor=shape.floor)
        self.decay = cfg.ema.decay if cfg.ema is not None else None
        self.average = [p.detach().clone() for p in self.parameters] if cfg.ema is not None else []
        self.targets: list[Tensor] = list(self.parameters)
        self.losses: list[Tensor] = []
        self.flags = ", ".join(
            [
                "fp32 weights",
                "bf16 autocast" if self.bf16 else "no autocast",
                "fused AdamW",
                f"clip_grad_norm_ {self.clip}" if self.clip is not None else "no clipping",
                f"EMA {self.decay} (foreach)" if self.decay is not None else "no EMA",
            ]
        )

    def step(self, batch: Batch) -> None:
        """One optimizer step over the rows of ``batch`` (on the CPU)."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.schedule.scale(len(self.losses))
        rows = len(next(iter(batch.values())))
        # a fill: a copy from the host would wait for the device
        count = torch.full((), float(self.peer.count(batch)), device=self.device)
        losses = []
        for start in range(0, rows, self.micro):
            data = {key: value[start : start + self.micro].to(self.device, non_blocking=True) for key, value in batch.items()}
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss = self.peer.loss(data, count)
            loss.backward()
            losses.append(loss.detach())
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.decay is not None:
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.targets, 1.0 - self.decay)
        self.losses.append(torch.stack(losses).sum())


def _weights(cfg: RunConfig, run: Plan, mesh: Mesh) -> dict[str, Tensor]:
    model: Any = run.model
    materialize(model, mesh.device)
    initialize(model, cfg.seed)
    return {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}


def _several(batches: Sequence[Batch]) -> bool:
    """Whether rows hold several documents or padding: positions do not simply run on."""
    return any(bool((batch["text_positions"].diff(dim=1) != 1).any()) for batch in batches)


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


# ---- the answer ------------------------------------------------------------------------------------------------------------


def _result(
    cfg: RunConfig,
    mesh: Mesh,
    work: Work,
    tried: Mapping[str, Mapping[int, Any]],
    turns: Mapping[str, Sequence[Mapping[str, Any]]],
    best: tuple[int, str, int],
    skipped: Mapping[str, str],
) -> dict[str, Any]:
    first = turns["ours"][0]
    units, flops, peak = first["units"], first["flops"], peak_flops(mesh)

    def side(measured: Sequence[Mapping[str, Any]], micro: int) -> dict[str, Any]:
        seconds = statistics.median(one["seconds"] for one in measured)
        return {
            "micro": micro,
            "seconds": seconds,
            "rounds": [one["seconds"] for one in measured],
            "per_second": units / seconds,
            "mfu": flops / seconds / peak if flops and peak else None,
            "memory": max(one["memory"] for one in measured),
            "loss": measured[0]["losses"][-1],
        }

    ours = side(turns["ours"], best[0]) | {"hfu": first["hfu"], "flags": first["settings"]}
    peer = side(turns["peer"], best[2]) | {"variant": best[1], "flags": turns["peer"][0]["flags"]}
    reference = _reference(mesh, work, first["parameters"])
    share = peer["per_second"] / reference.per_second if reference is not None else None
    return {
        "config": cfg.experiment,
        "unit": first["unit"],
        "units": units,
        "rows": cfg.batch.global_,
        "steps": work.steps,
        "warmup": work.warmup,
        "flops": flops,
        "formula": FORMULA,
        "parameters": first["parameters"],
        "ours": ours,
        "peer": peer,
        "ratio": ours["per_second"] / peer["per_second"],
        "reference": None if reference is None else {"per_second": reference.per_second, "what": reference.what},
        "share_of_reference": share,
        "void": share is not None and share < ENOUGH,
        "tried": {name: {str(size): found for size, found in by_size.items()} for name, by_size in tried.items()},
        "skipped": dict(skipped),
        "facts": first["facts"] | {"versions": first["facts"]["versions"] | versions()},
    }


def _reference(mesh: Mesh, work: Work, parameters: int) -> Reference | None:
    if mesh.device.type != "cuda" or work.documents:
        return None
    sequence = work.batches[0]["text_ids"].shape[1] if isinstance(work.sizes, Decoder) else None
    name = torch.cuda.get_device_name(mesh.device)
    same = (r for r in REFERENCES if r.device in name and (r.parameters, r.sequence) == (parameters, sequence))
    return next(same, None)


def report(result: Mapping[str, Any]) -> str:
    """``compare``'s answer as a page of text."""
    about, unit = result["facts"], result["unit"]
    lines = [
        f"{result['config']} against its peers, {about['date']}",
        f"  device      {about['device']}; {about['mesh']}",
        f"  versions    {', '.join(f'{name} {version}' for name, version in about['versions'].items())}",
        f"  commit      {about['commit'] or 'not a clone'}",
        f"  work        {result['parameters']:,} parameters; {result['rows']} rows = {result['units']:g} {unit} a step, each",
        "",
        f"  {'':16} {'micro':>5} {f'{unit}/s':>12} {'peak memory':>13}",
    ]
    for name, by_size in result["tried"].items():
        for size, found in by_size.items():
            row = found
            if not isinstance(found, str):
                row = f"{result['units'] / found['seconds']:12,.1f} {found['memory'] / 2**30:9.2f} GiB"
            lines.append(f"  {name:16} {size:>5} {row}")
    lines += [f"  {name:16} skipped: {why}" for name, why in result["skipped"].items()]
    lines += ["", f"  best of each side, {len(result['ours']['rounds'])} rounds in turn (the search is the first), medians:"]
    for name in ("ours", "peer"):
        side = result[name]
        mfu = f"MFU {100 * side['mfu']:.1f}%" if side["mfu"] is not None else "MFU not known"
        which = f" ({side['variant']})" if name == "peer" else ""
        speed = f"{side['per_second']:,.1f} {unit}/s, {1e3 * side['seconds']:.1f} ms per step"
        lines.append(
            f"  {name + which:16} micro {side['micro']}: {speed}, "
            f"{mfu}, {side['memory'] / 2**30:.2f} GiB, loss after all steps {side['loss']:.4f}"
        )
    settings = " ".join(f"{name}={value}" for name, value in result["ours"]["flags"].items())
    lines += [f"  ours        {settings}", f"  peer        {result['peer']['flags']}"]
    lines.append(f"  ratio       {result['ratio']:.3f} (ours / peer)")
    reference = result["reference"]
    if reference is None:
        lines.append(
            "  reference   no figure is known for this model, data and device: whether the peer is well set up is not shown"
        )
    else:
        lines.append(
            f"  reference   {reference['per_second']:,} {unit}/s ({reference['what']}); the peer reaches "
            f"{100 * result['share_of_reference']:.1f}% of it"
        )
    if result["void"]:
        lines.append(
            f"VOID: the peer reaches less than {ENOUGH:.0%} of its reference figure for this device: it is not at its best here, "
            "and the ratio says nothing. Look for what slows it down (versions, another process on the GPU) and repeat."
        )
    if result["flops"]:
        lines.append(f"{result['formula']}; both sides: {short(result['flops'])} model FLOPs per step")
    return "\n".join(lines)
