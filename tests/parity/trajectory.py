"""Runs of the real ``train()``, and the same runs as plain loops over the reference classes.

``python tests/parity/trajectory.py`` draws both into docs/images/.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from l3m_like import load, train
from l3m_like.config import RunConfig
from l3m_like.core.random import normal, uniform
from l3m_like.data import Loader
from l3m_like.pretrained import NameMap, export_state, import_state
from l3m_like.pretrained.decoder import NAMES
from l3m_like.pretrained.dit import diffusers_names
from l3m_like.pretrained.name_map import Templates

ROOT = Path(__file__).parents[2]
STEPS = 100
#: relative tolerances: of a step's loss, of its gradient norm, of a parameter (to its largest element)
LOSS, NORM, WEIGHTS = 1e-5, 1e-4, 1e-4

#: the shipped files, smaller; clipping, decay, averaging and two micro-batches are on in both
OVERRIDES = {
    "llm": [
        "dim=64", "layers=2", "mlp_dim=128", "head_dim=16", "sequence=64", "lr=1e-3", "ema.decay=0.98", "optim.weight_decay=0.1",
        "batch.global=8", "batch.micro=4", "optim.clip=1.0",
    ],
    "sit": [
        "dim=64", "layers=2", "heads=4", "lr=1e-3", "ema_decay=0.98", "optim.weight_decay=0.1", "batch.global=16",
        "batch.micro=8", "optim.clip=1.0",
    ],
}  # fmt: skip
ALWAYS = [f"steps={STEPS}", "~evals", "log.console=false", "log.refs=true", "checkpoint.every=null"]


@dataclass
class Trajectory:
    """What a run leaves: per step its loss and gradient norm; at the end all weights and their averages."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    averages: dict[str, Tensor]


def config(kind: str, run_dir: Path) -> RunConfig:
    path = ROOT / "configs" / "experiment" / f"{kind}.yaml"
    return RunConfig.from_file(path, [*OVERRIDES[kind], *ALWAYS, f"run.dir={run_dir}"])


def ours(cfg: RunConfig) -> Trajectory:
    """``train()``, read back from what it wrote: metrics.jsonl and the last checkpoint."""
    had_group = dist.is_initialized()
    try:
        train(cfg)
    finally:
        if not had_group and dist.is_initialized():
            dist.destroy_process_group()
    rows = [json.loads(line) for line in (cfg.run_dir / "metrics.jsonl").read_text().splitlines()]
    final = [dict(load(cfg.run_dir, ema=ema).model.named_parameters()) for ema in (False, True)]
    return Trajectory([r["loss"] for r in rows], [r["grad_norm"] for r in rows], *final)


# ---- the reference -------------------------------------------------------------------------------------------------------

Batch = dict[str, Tensor]
#: (model, micro-batch) -> (sum of the loss, number of elements that it is the sum of)
LossSum = Callable[[nn.Module, Batch], tuple[Tensor, int]]


def qwen3(cfg: RunConfig) -> tuple[nn.Module, Templates, LossSum]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    k = cfg.knobs
    reference = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=k["vocab_size"], hidden_size=k["dim"], intermediate_size=k["mlp_dim"], num_hidden_layers=k["layers"],
            num_attention_heads=k["heads"], num_key_value_heads=k["kv_heads"], head_dim=k["head_dim"], rms_norm_eps=k["norm_eps"],
            max_position_embeddings=k["sequence"], tie_word_embeddings=True, attn_implementation="eager",
            rope_parameters={"rope_type": "default", "rope_theta": k["rope_theta"]},
        )
    )  # fmt: skip

    def loss_sum(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        documents, length = batch["text_document_ids"], batch["text_ids"].shape[1]
        seen = (documents[:, :, None] == documents[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min).unsqueeze(1)
        logits = model(batch["text_ids"], attention_mask=mask, position_ids=batch["text_positions"]).logits
        targets = batch["text_targets"]
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        return total, int((targets != -100).sum())

    return reference, NAMES, loss_sum


def dit(cfg: RunConfig) -> tuple[nn.Module, Templates, LossSum]:
    from diffusers import DiTTransformer2DModel

    k = cfg.knobs
    reference = DiTTransformer2DModel(
        num_attention_heads=k["heads"], attention_head_dim=k["dim"] // k["heads"], in_channels=k["channels"],
        out_channels=k["out_channels"], num_layers=k["layers"], sample_size=k["image_size"], patch_size=k["patch"],
        num_embeds_ada_norm=k["classes"], norm_type="ada_norm_zero", norm_elementwise_affine=False, norm_eps=1e-6,
        activation_fn="gelu-approximate", attention_bias=True,
    ).eval()  # fmt: skip  # in training mode it would drop labels by draws of its own
    first = reference.transformer_blocks[0].norm1.emb
    first.time_proj.downscale_freq_shift = 0  # SiT's sinusoid
    for block in reference.transformer_blocks[1:]:
        block.norm1.emb = first  # SiT has one embedding of time and label, not one per block

    def loss_sum(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        image, row = batch["image"], batch["row"]
        time = uniform(row, seed=cfg.seed, purpose="flow_noise/image/time")
        noise = normal(row, tuple(image.shape[1:]), seed=cfg.seed, purpose="flow_noise/image/noise")
        dropped = uniform(row, seed=cfg.seed, purpose="drop_label/image") < k["label_dropout"]
        label = batch["image_label"].masked_fill(dropped, k["classes"])
        t = time[:, None, None, None]
        predicted = model(t * image + (1 - t) * noise, timestep=time, class_labels=label).sample
        return F.mse_loss(predicted, image - noise, reduction="sum"), image.numel()

    return reference, diffusers_names(k["layers"], channels=k["channels"], patch=k["patch"]), loss_sum


REFERENCES = {"llm": qwen3, "sit": dit}


@dataclass(frozen=True)
class Faults:
    """What a plain loop may do wrongly, for the twins of the test; without arguments nothing."""

    schedule_shift: int = 0
    decay_vectors: bool = False
    clip_each: bool = False
    eps: float = 1e-8
    micro_means: bool = False
    average_first: bool = False


def plain(cfg: RunConfig, kind: str, faults: Faults | None = None, steps: int = STEPS) -> Trajectory:
    """The run ``cfg`` by hand: torch's AdamW and clipping, the schedule and the average as their formulas."""
    faults = faults or Faults()
    model, templates, loss_sum = REFERENCES[kind](cfg)
    start = load(cfg).model  # the random weights of the seed
    names = NameMap.of(templates, start)
    missing, unexpected = model.load_state_dict(export_state(names, dict(start.named_parameters())), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight", "pos_embed.pos_embed"}
    matrices = [p for p in model.parameters() if p.ndim >= 2 or faults.decay_vectors]
    vectors = [p for p in model.parameters() if p.ndim < 2 and not faults.decay_vectors]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": cfg.optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=cfg.optim.lr, betas=tuple(cfg.optim.betas), eps=faults.eps, foreach=False,
    )  # fmt: skip
    warmup = round(cfg.schedule.warmup * STEPS)

    def rate(step: int) -> float:
        if step < warmup:
            return cfg.optim.lr * (step + 1) / warmup
        cosine = (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup))) / 2
        return cfg.optim.lr * (cfg.schedule.floor + (1 - cfg.schedule.floor) * cosine)

    average = copy.deepcopy(model).requires_grad_(False)
    losses, norms = [], []
    for step, micro in enumerate(batches(cfg, steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate(step + faults.schedule_shift)
        sums, counts = zip(*(loss_sum(model, batch) for batch in micro), strict=True)
        if faults.micro_means:
            loss = sum(value / count for value, count in zip(sums, counts, strict=True)) / len(sums)
        else:
            loss = sum(sums) / sum(counts)
        optimizer.zero_grad()
        loss.backward()
        if faults.clip_each:
            norm = max(nn.utils.clip_grad_norm_(group["params"], cfg.optim.clip) for group in optimizer.param_groups)
        else:
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip)
        if faults.average_first:
            move(average, model, cfg.ema.decay)
        optimizer.step()
        if not faults.average_first:
            move(average, model, cfg.ema.decay)
        losses.append(loss.item())
        norms.append(norm.item())
    return Trajectory(losses, norms, *(import_state(names, m.state_dict()) for m in (model, average)))


@torch.no_grad()
def move(average: nn.Module, model: nn.Module, decay: float) -> None:
    for old, new in zip(average.parameters(), model.parameters(), strict=True):
        old.copy_(decay * old + (1 - decay) * new)


def batches(cfg: RunConfig, steps: int) -> Iterator[list[Batch]]:
    """The micro-batches of each step, as the loader of the run gives them."""
    make = partial(Loader, cfg.instantiate("data.train"), seed=cfg.seed, prefetch=0)
    loader = make(global_batch=cfg.batch.global_, micro_batch=cfg.batch.micro)
    for _ in range(steps):
        yield loader.next_step().micro


# ---- the comparison ------------------------------------------------------------------------------------------------------


def differences(found: list[float], wanted: list[float]) -> list[float]:
    """``|a - b| / |b|`` of each step."""
    assert len(found) >= len(wanted)
    return [abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=False)]


def weight_difference(found: dict[str, Tensor], wanted: dict[str, Tensor], ignored: str = "\0") -> float:
    """The largest ``max |a - b| / max |b|`` of a parameter whose name does not end with ``ignored``."""
    assert set(found) == set(wanted)
    names = [name for name in wanted if not name.endswith(ignored)]
    return max(float((found[name] - wanted[name]).detach().abs().max() / wanted[name].detach().abs().max()) for name in names)


def draw(found: Trajectory, wanted: Trajectory, names: tuple[str, str], title: str, path: Path) -> None:
    """Both loss curves, and their relative difference on a log axis, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    steps = range(1, len(found.losses) + 1)
    above.plot(steps, wanted.losses, label=names[1], color="tab:orange", linewidth=4, alpha=0.5)
    above.plot(steps, found.losses, label=names[0], color="tab:blue", linewidth=1.2)
    above.set(ylabel="loss", title=title)
    above.legend()
    # a difference of zero has no logarithm: drawn at the resolution of a float32
    floored = [max(d, 1e-9) for d in differences(found.losses, wanted.losses)]
    below.plot(steps, floored, color="tab:blue", marker=".", linewidth=0.8)
    below.axhline(LOSS, color="tab:red", linestyle="--", label="tolerance")
    below.set(yscale="log", ylim=(5e-10, 1e-4), xlabel="step", ylabel="relative difference")
    below.legend(loc="upper left")
    for axes in (above, below):
        axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(folder: Path) -> None:
    import tempfile

    labels = {"llm": "transformers Qwen3ForCausalLM", "sit": "diffusers DiTTransformer2DModel"}
    for kind, label in labels.items():
        with tempfile.TemporaryDirectory() as run_dir:
            cfg = config(kind, Path(run_dir))
            wanted, found = plain(cfg, kind), ours(cfg)
        clip = cfg.optim.clip
        print(
            f"{kind}: loss {found.losses[0]:.4f} -> {found.losses[-1]:.4f}, largest relative difference of a step "
            f"{max(differences(found.losses, wanted.losses)):.2e}, of a gradient norm "
            f"{max(differences(found.norms, wanted.norms)):.2e}; weights "
            f"{weight_difference(found.weights, wanted.weights, 'k_proj.bias'):.2e}, averages "
            f"{weight_difference(found.averages, wanted.averages, 'k_proj.bias'):.2e}; "
            f"clipped in {sum(norm > clip for norm in found.norms)} of {len(found.norms)} steps"
        )
        title = f"{kind}.yaml, smaller: {STEPS} steps in float32"
        draw(found, wanted, ("l3m-like", label), title, folder / f"trajectory_{kind}.png")


if __name__ == "__main__":
    from l3m_like.core.torchvision_ops import allow_torchvision

    allow_torchvision()
    torch.set_num_threads(1)
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images")
