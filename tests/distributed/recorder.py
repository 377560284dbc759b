"""Real trainings, recorded: ``recorded(...)`` runs ``train()`` on every rank of a pool and hands back what it did.

What runs is the loop itself. The recorder looks on, perturbs the weights before the first step, and, for the twin of a test,
lets one fault be planted.
"""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tests.distributed import pool

ROOT = Path(__file__).parents[2]
Fault = Callable[[], AbstractContextManager[Any]]

_SIZE = ["dim=16", "layers=2", "heads=4", "batch={global: 8, micro: null}"]
#: an even vocabulary, which tensor parallelism cuts
_WORDS = ["vocab_size=258", "data.train.process.vocab_size=257"]
_TEXT = [
    *(*_SIZE, *_WORDS, "kv_heads=2", "head_dim=8", "mlp_dim=24", "sequence=32"),
    *("model.trunk.layer.mixer.bias=true", "data.train.pack.max_documents=2"),
]
_IMAGE = ["patch=7", "image_size=14"]
_MOE = [*_WORDS, "kv_heads=2", "head_dim=8", "mlp_dim=12", "sequence=32", "experts=4", "loss.balance.weight=1.0"]
#: experiments on text that differ from `llm` in their noise
TEXTS = ("llm", "dllm", "block_diffusion")
#: tiny experiments, two layers: QK-norm, biases, grouped heads and (text) tied embeddings are on
TINY = {
    **dict.fromkeys(TEXTS, _TEXT),
    "sit": [
        *(*_SIZE, "patch=7", "image_size=14"),
        *("model.trunk.layer.mixer.qk_norm=true", "model.trunk.layer.mixer.num_kv_heads=2"),
    ],
    # experts as in Qwen3-MoE, and as in DeepSeek-V3, whose bias moves far enough to change what is chosen
    "moe": [*_SIZE, *_MOE, "loss.balance._target_=l3m_like.losses.LoadBalance"],
    "deepseek": [
        *(*_SIZE, *_WORDS, "sequence=32", "experts=4", "mlp_dim=12", "dense_mlp_dim=24", "shared_mlp_dim=8"),
        *("groups=2", "kept_groups=1", "kv_rank=8", "q_rank=12", "nope_dim=4", "rope_dim=4", "v_dim=6", "bias_rate=0.2"),
        *("loss.balance.weight=1.0", "loss.router_z.weight=0.1"),
    ],
    "clip": [*_SIZE, *_IMAGE, *_WORDS, "text_dim=16", "text_layers=1", "embed_dim=8", "max_tokens=6"],
    "vit": [*_SIZE, *_IMAGE, "classes=10", "drop_path=0.3", "mixed=1.0"],
    "mae": [*_SIZE, *_IMAGE, "ratio=0.5", "decoder_dim=16", "decoder_layers=1", "decoder_heads=2"],
    "aimv1": [*_SIZE, *_IMAGE, "head_layers=1", "head_dim=24"],
    "aimv2": [
        *(*_SIZE, *_IMAGE, *_WORDS, "mlp_dim=24", "max_tokens=6"),
        *("decoder_dim=16", "decoder_layers=1", "decoder_heads=2", "decoder_mlp_dim=24"),
    ],
    # two updates; the discriminator begins at the second of three steps
    "rae": [
        *(*_SIZE, "patch=7", "image_size=14", "latent_channels=8", "latent_size=2", "mlp_dim=24"),
        *("noise=0.5", "critic_start=1", "fool_start=1"),
        "encoder_arguments={img_size: 14, patch_size: 7, embed_dim: 8, depth: 1, num_heads: 2}",
    ],
    # as it is shipped: without QK-norm
    "sit_shipped": [*_SIZE, "patch=7", "image_size=14"],
}
_PICTURES = {
    "data.sets.train.source": {"_target_": "tests.distributed.toys.Pictures"},
    "data.sets.train.process": {"_target_": "tests.distributed.toys.AsPicture"},
}
_PAIRS = {
    "data.sets.train.source": {"_target_": "tests.distributed.toys.Pairs"},
    "data.sets.train.process": {"_target_": "tests.distributed.toys.AsPair"},
}
_TEXTS = {"data.sets.train.source": {"_target_": "tests.distributed.toys.Texts"}}
DATA = {
    **dict.fromkeys((*TEXTS, "moe", "deepseek"), _TEXTS),
    "sit": _PICTURES,
    **dict.fromkeys(("vit", "mae", "aimv1", "rae"), _PICTURES),
    **dict.fromkeys(("clip", "aimv2"), _PAIRS),
    "sit_shipped": _PICTURES,
}
#: three steps in float64, with clipping, weight decay and a schedule that moves; a line per step
SHORT = {
    "steps": 3, "evals": {}, "log.every": 1, "log.console": False, "checkpoint.every": None, "data.prefetch": 0,
    "parallel.precision": "fp64", "schedule.warmup": 0, "optim.clip": 0.1,
}


@dataclass
class Record:
    """One rank's view of a run; tensors are whole, whatever the mesh (and pieces until ``recorded`` returns)."""

    weights: dict[str, Tensor] = field(default_factory=dict)  # as initialised
    start: dict[str, Any] = field(default_factory=dict)  # perturbed: at the first step
    gradients: list[dict[str, Any]] = field(default_factory=list)  # per optimizer step, before clipping
    stepped: list[float] = field(default_factory=list)  # per optimizer step, the norm of what the optimizer got
    trail: list[dict[str, Any]] = field(default_factory=list)  # weights after each step, where there is an average
    average: dict[str, Any] = field(default_factory=dict)  # EMA after the last step
    final: dict[str, Any] = field(default_factory=dict)  # weights after the last step
    draws: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # (key, row) -> what a block wrote for that row
    rows: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl
    state: dict[str, dict[str, Any]] = field(default_factory=dict)  # of each update's optimizer, after the last step

    def column(self, name: str) -> list[Any]:
        return [row[name] for row in self.rows if name in row]


def whole(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@dataclass
class Piece:
    """This rank's part of a tensor. Wholes are put together by the test process: a gather per tensor and step is slow."""

    local: Tensor
    index: list[Tensor] | None  # per dimension, which part it is; None: all of it
    shape: torch.Size

    @classmethod
    def of(cls, tensor: Tensor) -> Piece:
        from torch.distributed.tensor import DTensor

        from l3m_like.distributed.gradients import local
        from l3m_like.training.init import shard_index

        return cls(local(tensor).detach().clone(), shard_index(tensor) if isinstance(tensor, DTensor) else None, tensor.shape)

    def write(self, into: Tensor) -> None:
        if self.index is None:
            into.copy_(self.local)
        elif self.local.numel():
            into[torch.meshgrid(*self.index, indexing="ij")] = self.local


def assemble(ranks: Sequence[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """Per rank: every tensor whole, from the pieces of all ranks, its own on top (so that copies that differ are seen)."""
    assert all(set(pieces) == set(ranks[0]) for pieces in ranks)
    views: list[dict[str, Tensor]] = [{} for _ in ranks]
    for name, first in ranks[0].items():
        base = torch.full(first.shape, torch.nan, dtype=first.local.dtype)
        for pieces in ranks:
            pieces[name].write(base)
        for view, pieces in zip(views, ranks, strict=True):
            view[name] = base.clone()
            pieces[name].write(view[name])
    return views


@torch.no_grad()
def perturb(parameters: Mapping[str, nn.Parameter]) -> None:
    """Add N(0, 0.1) to every weight, so that no zero-initialised layer hides what is behind it. The same on every mesh."""
    from l3m_like.core.init import Normal
    from l3m_like.distributed.gradients import local
    from l3m_like.training.init import shard_index

    for name, p in parameters.items():
        if p.numel():
            local(p).add_(Normal(0.1).draw(1, f"perturb/{name}", shard_index(p), tuple(p.shape)).to(p.dtype))


@contextmanager
def recording(into: Record, drawn: Sequence[str] = ()) -> Iterator[None]:
    """Watch the one run that is made inside. ``drawn``: keys whose values are kept per row."""
    from l3m_like.training import optim, updates

    prepare, norm = updates.Update.prepare, updates.gradient_norm
    optimizer_step, average = optim.AdamW.step, optim.EMA.update
    made: list[Any] = []
    parameters: dict[str, nn.Parameter] = {}

    def prepare_and_perturb(self: Any, mesh: Any, guard: Any) -> None:
        into.weights |= {name: whole(p) for name, p in self.parameters.items()}
        perturb(self.parameters)
        into.start |= {name: Piece.of(p) for name, p in self.parameters.items()}
        parameters.update(self.parameters)
        made.append(self)
        for part in self.parts.values() if drawn else ():
            for _, block in part.blocks():
                block.register_forward_hook(watch)
        prepare(self, mesh, guard)

    def watch(block: Any, args: Any, out: dict[str, Tensor]) -> None:
        for key in set(drawn) & set(block.writes.values()):
            into.draws |= {(key, row): value.clone() for row, value in zip(out["row"].tolist(), out[key], strict=True)}

    def recorded_norm(gradients: Any) -> Tensor:
        into.gradients.append({name: Piece.of(p.grad) for name, p in parameters.items() if p.grad is not None})
        return norm(gradients)

    def recorded_step(self: Any, found_inf: Any = None, grad_scale: Any = None) -> Any:
        total = float(norm([p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]))
        into.stepped.append(total if grad_scale is None else total / float(grad_scale))
        return optimizer_step(self, found_inf, grad_scale)

    def recorded_average(self: Any, *args: Any) -> None:
        average(self, *args)
        into.trail.append({name: Piece.of(p) for name, p in self.parameters.items()})
        into.average = {name: Piece.of(value) for name, value in self.average.items()}

    with (
        mock.patch.object(updates.Update, "prepare", prepare_and_perturb),
        mock.patch.object(updates, "gradient_norm", recorded_norm),
        mock.patch.object(optim.AdamW, "step", recorded_step),
        mock.patch.object(optim.EMA, "update", recorded_average),
        mock.patch("l3m_like.training.report.write_report", lambda *args: None),  # a second of matplotlib
    ):
        yield
    into.final = {name: Piece.of(p) for name, p in parameters.items()}
    into.state = {update.name: {k: Piece.of(v) for k, v in update.optimizer.named_state().items()} for update in made}


def run_one(cfg: Any, fault: Fault | None = None, drawn: Sequence[str] = (), *, saves: bool = False) -> Record:
    """On one rank: ``train(cfg)``, recorded, with a fault if there is one; without checkpoints unless ``saves``."""
    from l3m_like.training.checkpoint import Checkpointer
    from l3m_like.training.train import train

    record = Record()
    unsaved = nullcontext() if saves else mock.patch.object(Checkpointer, "save", lambda self, *args: None)
    with fault() if fault is not None else nullcontext(), recording(record, drawn), unsaved:
        train(cfg)
    if int(torch.distributed.get_rank()) == 0:
        record.rows = [json.loads(line) for line in (cfg.run_dir / "metrics.jsonl").read_text().splitlines()]
    return record


@functools.cache
def _experiment(name: str) -> Any:
    from l3m_like.config import RunConfig

    cfg = RunConfig.from_file(ROOT / "configs" / "experiment" / f"{name.removesuffix('_shipped')}.yaml", TINY[name])
    return change(cfg, SHORT | DATA[name])


def change(cfg: Any, settings: Mapping[str, Any]) -> Any:
    """``cfg`` with sections' values changed by their dotted names; much faster than composing it anew."""
    for path, value in settings.items():
        owner = cfg
        *above, leaf = path.split(".")
        for part in above:
            owner = owner[part] if isinstance(owner, dict) else getattr(owner, part)
        if isinstance(owner, dict):
            owner[leaf] = value
        else:
            assert hasattr(owner, leaf), path
            setattr(owner, leaf, value)
    return cfg


def experiment(name: str, **settings: Any) -> Any:
    """The shipped experiment, tiny, for three steps in float64; ``tp``, ``dp_shard`` ... and ``micro`` over it."""
    return change(copy.deepcopy(_experiment(name)), {path_of(key): value for key, value in settings.items()})


def toy(tree: Mapping[str, Any], **settings: Any) -> Any:
    """A run from a plain dict, in float64, with ``settings`` as in ``experiment``."""
    from l3m_like.config import RunConfig

    tree = {"steps": 3, "batch": {"global": 8}, "optim": {"lr": 0.01, "clip": 0.1}, "run": {"name": "toy"}} | dict(tree)
    short = {path: value for path, value in SHORT.items() if path not in ("steps", "optim.clip")}
    return change(RunConfig.from_dict(tree), short | {path_of(key): value for key, value in settings.items()})


def path_of(setting: str) -> str:
    """``tp`` -> ``parallel.tp``: the short names that tests use."""
    parallel = ("dp_shard", "dp_replicate", "tp", "precision", "checkpoint", "compile", "offload")
    return {"micro": "batch.micro", **{name: f"parallel.{name}" for name in parallel}}.get(setting, setting)


def world_size(settings: Mapping[str, Any]) -> int:
    return settings.get("dp_shard", 1) * settings.get("dp_replicate", 1) * settings.get("tp", 1)


def run_twice(cfg: Any, fault: Fault | None = None, drawn: Sequence[str] = ()) -> Record:
    """On one rank: the run up to its last step but one, then the same command again."""
    short = copy.deepcopy(cfg)
    short.steps -= 1
    run_one(short, saves=True)
    return run_one(cfg, fault, drawn, saves=True)


def recorded(
    cfg: Any,
    world: int,
    *,
    task: Callable[..., Record] = run_one,
    fault: Fault | None = None,
    drawn: Sequence[str] = (),
    timeout: float = 55.0,
) -> list[Record]:
    """``train(cfg)`` on ``world`` processes, in a folder of its own: one record per rank."""
    with tempfile.TemporaryDirectory() as folder:
        cfg.run.dir = folder
        records = pool.run(world, task, cfg, fault, tuple(drawn), timeout=timeout)
    for name in ("start", "final", "average"):
        for record, view in zip(records, assemble([getattr(record, name) for record in records]), strict=True):
            setattr(record, name, view)
    for name in ("gradients", "trail"):
        for step in range(len(getattr(records[0], name))):
            views = assemble([getattr(record, name)[step] for record in records])
            for record, view in zip(records, views, strict=True):
                getattr(record, name)[step] = view
    for update in records[0].state:
        for record, view in zip(records, assemble([record.state[update] for record in records]), strict=True):
            record.state[update] = view
    return records


@functools.cache
def _trained(name: str, settings: tuple[tuple[str, Any], ...], drawn: tuple[str, ...]) -> list[Record]:
    return recorded(experiment(name, **dict(settings)), world_size(dict(settings)), drawn=drawn)


def trained(name: str, drawn: Sequence[str] = (), **settings: Any) -> list[Record]:
    """The record of ``experiment(name, **settings)`` without fault, run once per pytest process."""
    return _trained(name, tuple(sorted(settings.items())), tuple(drawn))
