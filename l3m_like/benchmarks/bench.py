"""How fast a run's training step is, where its time goes, and what it costs over a loop written by hand.

The step that is timed is the real one, inside ``train()``: the methods that the loop calls are wrapped from outside, and nothing
in the loop knows of it. A step begins and ends where the loop takes up the next batch.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.benchmarks.profile import STEPS as PROFILED
from l3m_like.benchmarks.profile import Recorder
from l3m_like.config import RunConfig
from l3m_like.core.errors import Stopped, UserError
from l3m_like.core.meta_model import MetaModel
from l3m_like.data.loader import Loader, Step
from l3m_like.distributed.mesh import Mesh, broadcast_object, build_mesh
from l3m_like.training.build import build_model
from l3m_like.training.control import Upcoming
from l3m_like.training.flops import FORMULA, StepFlops, peak_flops
from l3m_like.training.init import initialize, materialize
from l3m_like.training.metrics import short
from l3m_like.training.optim import EMA
from l3m_like.training.schedule import Schedule
from l3m_like.training.train import plan, train
from l3m_like.training.updates import Update

LOG_EVERY = 10

#: the methods that the loop calls, and the part of a step that each is (without the parts that it calls itself)
PARTS = (
    (Loader, "next_step", "data"),
    (Update, "forward_backward", "forward"),
    (Tensor, "backward", "backward"),
    (Update, "step", "optimizer"),
    (EMA, "update", "optimizer"),
)
#: the control word, records, logging
OTHER = "other"


class Progress:
    """Lines about what is going on, each with the seconds since it was made, on standard error."""

    def __init__(self, silent: bool = False) -> None:
        self.silent, self._began = silent, time.perf_counter()

    def __call__(self, text: str) -> None:
        if not self.silent:
            print(f"[{time.perf_counter() - self._began:7.1f} s] {text}", file=sys.stderr, flush=True)


def bench(
    cfg: RunConfig,
    steps: int = 20,
    *,
    warmup: int = 5,
    overhead: bool = False,
    keep_ema: bool = False,
    profile: Path | None = None,
    say: Callable[[str], None] = Progress(silent=True),  # noqa: B008  # it holds nothing
) -> dict[str, Any]:
    """Train ``cfg`` for ``warmup + steps`` steps in a folder that is deleted, and time them; every rank calls it.

    Evaluations, saves and trackers are off. On CUDA, times are those of events in the stream, so that the loop runs
    ahead of the device as always; with ``overhead`` the device is waited for between the turns of the two loops.

    Args:
        cfg: any run; it is changed.
        steps: how many are timed.
        warmup: steps before them.
        overhead: in turn with each step, the same step of a ``PlainLoop``.
        keep_ema: keep the run's averaging of weights; else it is off.
        profile: where a Chrome trace (``.json.gz``) of a few more steps is written. On several GPUs they are recorded in any
            case, to know the time of communication.
        say: told of every phase.

    Returns:
        JSON values: ``seconds`` (of a step, median), ``parts`` (seconds of a step, medians), ``units`` (of a step; their name is
        ``unit``), ``flops`` and ``hardware_flops`` (per step, the second with what is recomputed, or None), ``mfu`` and ``hfu``
        (None where the peak is not known), ``formula`` (of these), ``communication`` ({seconds, exposed} of a step on rank 0,
        from the profile, or None), ``profile`` (see ``profile.summarize``, or None), ``memory`` (peak bytes of CUDA's allocator,
        else of the process), ``parameters``, ``all_seconds`` and ``losses`` (of the timed steps) and
        ``facts``. With ``overhead``: ``plain_seconds``, ``plain_losses``, ``ratio`` (of the medians), ``ratio_of_means``,
        ``ratio_of_cpu_time`` (of the medians of this process's processor time, which others on the machine disturb less).

    Raises:
        UserError: numbers out of range; a run that ``PlainLoop`` does not cover.
    """
    if steps < 1 or warmup < 1:
        raise UserError(f"bench: {steps} steps after {warmup} of warm-up; at least 1 of each are needed.")
    if overhead and (keep_ema or profile is not None):
        raise UserError("bench --overhead: the loop written by hand has no average of weights and no profile; leave these out.")
    cfg.steps, cfg.epochs, cfg.tokens = run_length(steps, warmup), None, None
    cfg.ema = cfg.ema if keep_ema else None
    cfg.evals, cfg.checkpoint.every, cfg.checkpoint.resume = {}, None, "auto"
    cfg.log.every, cfg.log.console, cfg.log.wandb, cfg.log.tensorboard, cfg.log.aim = LOG_EVERY, False, None, False, False
    if overhead:
        cfg.data.prefetch = 0  # a thread that reads ahead would work in the other loop's turn
    mesh = build_mesh(cfg.mesh_axes())
    with tempfile.TemporaryDirectory() as folder:
        cfg.run.dir, cfg.run.name, cfg.run.id = broadcast_object(folder), "bench", None
        plain = PlainLoop(cfg, mesh, Path(folder) / "plain.jsonl") if overhead else None
        recorder = None
        if profile is not None or (mesh.device.type == "cuda" and mesh.world_size > 1):
            recorder = Recorder(
                mesh.device, profile if profile is not None and mesh.is_main else Path(folder) / f"{mesh.rank}.json.gz"
            )
        watch = Watch(mesh.device, warmup + steps, plain, recorder, say, warmup)
        say(f"building {cfg.experiment}: batch.global={cfg.batch.global_} batch.micro={cfg.batch.micro}")
        if mesh.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(mesh.device)
        with watch.attached(), contextlib.suppress(Watch.Enough):
            try:
                train(cfg)
            except Stopped:
                raise UserError("bench: stopped by a signal. A measurement leaves nothing behind to go on from.") from None
            raise UserError(f"bench: the data ended before {warmup + steps} steps; lower --steps.")
        say("reading the measurements")
        result = summary(cfg, mesh, watch, warmup)
        if recorder is not None and mesh.is_main:
            made = result["profile"] = recorder.summary()
            if made["of"] == "kernels":
                result["communication"] = {"seconds": made["communication"], "exposed": made["exposed"]}
        if plain is not None:
            plain.file.close()
            theirs = watch.plain_seconds[warmup:]
            result |= {
                "ratio": result["seconds"] / statistics.median(theirs),
                "ratio_of_means": sum(result["all_seconds"]) / sum(theirs),
                "ratio_of_cpu_time": statistics.median(watch.cpu[warmup + 1 :]) / statistics.median(watch.plain_cpu[warmup:]),
                "plain_seconds": statistics.median(theirs),
                "plain_losses": torch.stack(plain.losses[warmup:]).tolist(),
            }
            for ours, by_hand in zip(result["losses"], result["plain_losses"], strict=False):
                if not math.isclose(ours, by_hand, rel_tol=1e-3):
                    raise UserError(
                        f"bench --overhead: the loop written by hand trains another thing than this config (losses {by_hand} and "
                        f"{ours}), and a ratio would say nothing. Leave --overhead out."
                    )
    return result


def run_length(steps: int, warmup: int) -> int:
    """Steps of the run that is timed, which its schedule sees: one more, in which the last timed one is known to be over, and
    those of a profile with one that warms the profiler up."""
    return warmup + steps + 1 + PROFILED + 1


def summary(cfg: RunConfig, mesh: Mesh, watch: Watch, warmup: int) -> dict[str, Any]:
    """What ``watch`` saw after the warm-up, in the words of ``bench``."""
    run = plan(cfg, mesh.dp_size)
    flops = StepFlops(run.trace, cfg.parallel.checkpoint)
    parts = watch.parts()[warmup : watch.wanted]
    seconds = [sum(step.values()) for step in parts]
    batches = watch.batches[warmup : watch.wanted]
    units = [sum(run.dataset.units(micro) for micro in batch.micro) for batch in batches]
    work = [flops.of(batch.micro) for batch in batches]
    known = [w for w in work if w is not None]
    means = [statistics.mean(units), *(statistics.mean(column) for column in zip(*((w.model, w.hardware) for w in known)))]
    per_step, *numbers = mesh.sum(torch.tensor(means, dtype=torch.float64)).tolist()
    model, hardware = numbers or (None, None)
    middle, peak = statistics.median(seconds), peak_flops(mesh)
    return {
        "config": cfg.experiment,
        "steps": len(seconds),
        "warmup": warmup,
        "seconds": middle,
        "parts": {name: statistics.median(step.get(name, 0.0) for step in parts) for name in (*(p[2] for p in PARTS), OTHER)},
        "unit": run.dataset.unit,
        "units": per_step,
        "flops": model,
        "hardware_flops": hardware,
        "mfu": model / middle / peak if model and peak else None,
        "hfu": hardware / middle / peak if hardware and peak else None,
        "formula": FORMULA,
        "communication": None,
        "profile": None,
        "memory": peak_memory(mesh.device),
        "parameters": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "all_seconds": seconds,
        "losses": watch.losses({name: loss.weight for name, loss in run.losses.items()})[warmup : watch.wanted],
        "settings": {
            "batch.global": cfg.batch.global_,
            "batch.micro": run.micro_rows,
            "ema": cfg.ema is not None,
            **{f"parallel.{name}": getattr(cfg.parallel, name) for name in ("precision", "checkpoint", "compile")},
        },
        "facts": facts(mesh),
    }


class Watch:
    """Times the steps of ``train()`` while ``attached``, and ends it by ``Enough`` after ``steps`` of them (and those that
    ``recorder`` records)."""

    class Enough(Exception):
        """The steps are done; ``train`` is left before it saves."""

    def __init__(
        self,
        device: torch.device,
        steps: int,
        plain: Callable[[Step], None] | None,
        recorder: Recorder | None,
        say: Callable[[str], None],
        warmup: int,
    ) -> None:
        self.device, self.wanted, self.plain, self.recorder, self._say = device, steps, plain, recorder, say
        self._milestones = {0: "first step", 1: "first step done", warmup: "warm-up done", steps: f"{steps - warmup} steps timed"}
        self.batches: list[Step] = []
        self.plain_seconds: list[float] = []
        #: processor time of this process; a first entry is that of all before the first step
        self.cpu: list[float] = []
        self.plain_cpu: list[float] = []
        self._cpu_before = time.process_time()
        self._terms: list[list[Mapping[str, Tensor]]] = []
        #: per step, moments and what begins there
        self._marks: list[list[tuple[Any, str]]] = []
        self._inside: list[str] = []
        self._within_step = False

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Wrap the methods of ``PARTS`` and the loop's taking up of a batch."""
        wrapped: list[tuple[Any, str]] = [*((owner, method) for owner, method, _ in PARTS), (Upcoming, "agreed")]
        saved = [(owner, method, getattr(owner, method)) for owner, method in wrapped]
        try:
            for owner, method, name in PARTS:
                setattr(owner, method, self._timed(getattr(owner, method), name))
            Upcoming.agreed = self._between_steps(Upcoming.agreed)  # type: ignore[method-assign]
            yield
        finally:
            for owner, method, original in saved:
                setattr(owner, method, original)

    def _timed(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(name)
            self._mark(name)
            try:
                out = method(*args, **kwargs)
            finally:
                self._inside.pop()
                self._mark(self._inside[-1] if self._inside else OTHER)
            if name == "forward" and self._terms:
                self._terms[-1].append(out[0])
            return out

        return timed

    def _between_steps(self, agreed: Callable[..., Any]) -> Callable[..., Any]:
        def between(upcoming: Upcoming) -> Any:
            if self.plain is not None:
                self._wait()
            self._mark(OTHER)  # the end of the step before
            self._within_step = False  # the plain loop calls backward too
            self.cpu.append(self._cpu_seconds())
            if (milestone := self._milestones.get(len(self._marks))) is not None:
                self._say(milestone)
            if len(self._marks) >= self.wanted and (self.recorder is None or self.recorder.boundary()):
                self._wait()
                raise Watch.Enough
            batch = upcoming.batch
            if self.plain is not None:
                began = time.perf_counter()
                self.plain(batch)
                self._wait()
                self.plain_seconds.append(time.perf_counter() - began)
                self.plain_cpu.append(self._cpu_seconds())
            self.batches.append(batch)
            self._terms.append([])
            self._marks.append([])
            self._within_step = True
            self._cpu_seconds()
            self._mark(OTHER)
            return agreed(upcoming)

        return between

    def _cpu_seconds(self) -> float:
        """Processor time since the last call."""
        before, self._cpu_before = self._cpu_before, time.process_time()
        return self._cpu_before - before

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _mark(self, begins: str) -> None:
        if not self._within_step:
            return
        moment: Any = time.perf_counter()
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._marks[-1].append((moment, begins))

    def parts(self) -> list[dict[str, float]]:
        """Per step, ``{part: seconds}``; they add up to the step."""
        out = []
        for marks in self._marks:
            seconds: dict[str, float] = defaultdict(float)
            for (start, name), (end, _) in zip(marks, marks[1:], strict=False):
                seconds[name] += start.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - start
            out.append(dict(seconds))
        return out

    def losses(self, weights: Mapping[str, float | None]) -> list[float]:
        """Per step, the loss over this rank's rows: the weighted terms, each the sum over micro-batches over the global count."""
        return [
            sum(float(value) / float(count) * (weights[name] or 0.0) for terms in step for name, (value, count) in terms.items())
            for step in self._terms
        ]


# ---- the same by hand ----------------------------------------------------------------------------------------------------


class PlainLoop:
    """Training as one would write it for one model: its blocks called one after the other, no dictionary, no checks.

    Fused AdamW without decay of vectors, ``clip_grad_norm_``, the schedule, a JSONL line every ``LOG_EVERY`` steps. Weights of
    the seed and the batches that it is given: its losses are those of ``train()``. It takes a batch from the other loop's
    loader, so reading costs it nothing.

    Raises:
        UserError: the run has what is not written here: several processes, parts or losses, groups, bf16, recomputation.
    """

    def __init__(self, cfg: RunConfig, mesh: Mesh, path: Path) -> None:
        with torch.device("meta"):
            model: Any = build_model(cfg)
            losses = cfg.instantiate("loss")
        covered = {
            "one process": mesh.world_size == 1,
            "parallel.precision=fp32": cfg.parallel.precision == "fp32",
            "parallel.checkpoint=none": cfg.parallel.checkpoint == "none",
            "no updates and no optim.groups": not cfg.updates and not cfg.optim.groups and not cfg.optim.no_decay,
            "AdamW without optim.layer_decay": cfg.optim.name == "adamw" and cfg.optim.layer_decay is None,
            "neither lora nor mup": cfg.lora is None and cfg.mup is None,
            "one model and one loss": isinstance(model, MetaModel) and len(losses) == 1,
        }
        for what, holds in covered.items():
            if not holds:
                raise UserError(f"bench --overhead: the loop written by hand needs {what}; change the config, or leave it out.")
        kind = type(model.trunk).__name__
        if kind not in FORWARDS:
            raise UserError(
                f"bench --overhead: none is written by hand for the trunk {kind}; there is one for {', '.join(FORWARDS)}."
            )
        self.forward, self.count = FORWARDS[kind]
        materialize(model, mesh.device)
        initialize(model, cfg.seed)
        if cfg.parallel.compile:
            for _, block in model.blocks():
                for unit in block.shard_units():
                    unit.compile()
        self.model, self.device, self.clip, self.lr = model.train(), mesh.device, cfg.optim.clip, cfg.optim.lr
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": cfg.optim.weight_decay},
                {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=cfg.optim.lr,
            betas=(cfg.optim.betas[0], cfg.optim.betas[1]),
            eps=cfg.optim.eps,
            fused=True,
        )
        shape = cfg.schedule
        self.schedule = Schedule(shape.name, total=cfg.steps or 1, warmup=shape.warmup, decay=shape.decay, floor=shape.floor)
        self.losses: list[Tensor] = []
        self.file = path.open("w", encoding="utf-8")

    def __call__(self, batch: Step) -> None:
        """One optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.schedule.scale(len(self.losses))
        total = sum(self.count(micro) for micro in batch.micro)
        losses = []
        for micro in batch.micro:
            data = {key: value.to(self.device, non_blocking=True) for key, value in micro.items()}
            loss = self.forward(self.model, data) / total
            loss.backward()
            losses.append(loss.detach())
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(torch.stack(losses).sum())
        if len(self.losses) % LOG_EVERY == 0:
            self.file.write(json.dumps({"step": len(self.losses), "loss": self.losses[-1].item()}) + "\n")
            self.file.flush()


def _next_token(model: Any, data: Mapping[str, Tensor]) -> Tensor:
    tokens = model.preprocessor.compute(data["text_ids"])
    hidden = model.trunk.compute(tokens, data["text_positions"], data.get("text_document_ids"))
    return model.head.compute(hidden, data["text_targets"], outputs=("nll",))["nll"].sum()


def _flow(model: Any, data: Mapping[str, Tensor]) -> Tensor:
    blocks = model.preprocessor
    noised, time, target, weight = blocks["noise"].compute(data["image"], data["row"])
    condition = blocks["condition"].compute(time, blocks["drop"].compute(data["image_label"], data["row"]))
    hidden = model.trunk.compute(blocks["patches"].compute(noised), condition)
    errors = (model.head.compute(hidden, condition) - target).square().flatten(1).sum(1)
    return (weight * errors).sum()


#: trunk -> (sum of the loss over a micro-batch, elements that it is the sum of)
FORWARDS: dict[str, tuple[Callable[[Any, Mapping[str, Tensor]], Tensor], Callable[[Mapping[str, Tensor]], int]]] = {
    "Transformer": (_next_token, lambda batch: int((batch["text_targets"] != -100).sum())),
    "DiT": (_flow, lambda batch: batch["image"].numel()),
}


# ---- the report ----------------------------------------------------------------------------------------------------------


def facts(mesh: Mesh) -> dict[str, Any]:
    """Where and with what it was measured."""
    cuda = mesh.device.type == "cuda"
    device = torch.cuda.get_device_name(mesh.device) if cuda else f"{_processor()}, {torch.get_num_threads()} thread(s)"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    triton = sys.modules.get("triton")
    versions |= {"triton": triton.__version__} if triton is not None else {}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device,
        "mesh": str(mesh),
        "versions": versions,
        "commit": _commit(),
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: of CUDA's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _commit() -> str | None:
    """The commit of the clone that this file lies in, "+" if it was changed since; None outside a clone."""

    def git(*words: str) -> str:
        here = ["git", "-C", str(Path(__file__).parent)]
        return subprocess.run([*here, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def table(result: Mapping[str, Any]) -> str:
    """``result`` of ``bench`` as a short text."""
    about, seconds, unit = result["facts"], result["seconds"], result["unit"]
    share = "  ".join(f"{name} {100 * part / seconds:.1f}%" for name, part in result["parts"].items())
    rows = {
        "device": f"{about['device']}; {about['mesh']}",
        "versions": ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
        "commit": about["commit"] or "not a clone",
        "parameters": f"{result['parameters']:,}",
        "step": f"{1e3 * seconds:.1f} ms (median of {result['steps']}, after {result['warmup']} of warm-up)",
        f"{unit} per second": f"{short(result['units'] / seconds)} ({result['units']:g} per step)",
        "model FLOP/s": short(result["flops"] / seconds) if result["flops"] else "not declared",
        "MFU": f"{100 * result['mfu']:.1f}%" if result["mfu"] is not None else "the peak is not known",
        "HFU": f"{100 * result['hfu']:.1f}%" if result["hfu"] is not None else "the peak is not known",
        "recomputed": f"{100 * (result['hardware_flops'] / result['flops'] - 1):.1f}% of the model FLOPs"
        if result["flops"]
        else "-",
        "peak memory": f"{result['memory'] / 2**30:.2f} GiB",
        "settings": " ".join(f"{name}={value}" for name, value in result["settings"].items()),
        "time": share,
        "communication": _communication(result),
    }
    if "ratio" in result:
        rows["plain loop"] = f"{1e3 * result['plain_seconds']:.1f} ms"
        rows["ratio"] = f"{result['ratio']:.3f} (medians), {result['ratio_of_means']:.3f} (means)"
        rows["in CPU time"] = f"{result['ratio_of_cpu_time']:.3f} (medians)"
    width = max(map(len, rows))
    lines = [f"{result['config']}, {about['date']}", *(f"  {name.ljust(width)}  {text}" for name, text in rows.items())]
    return "\n".join([*lines, result["formula"]])


def _communication(result: Mapping[str, Any]) -> str:
    found = result["communication"]
    if found is None:
        return "not measured (--profile on a GPU; always on several)"
    return (
        f"{1e3 * found['seconds']:.2f} ms of a step, {1e3 * found['exposed']:.2f} ms with nothing else running (profiled steps)"
    )
