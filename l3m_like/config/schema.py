"""The typed sections of a run file: every setting, its type, default, unit and bounds, each written once.

``strict.build`` turns plain containers into these dataclasses and refuses what they do not name; ``table.py`` prints them
for docs/configs.md. A section has no behaviour beyond the rules that tie its own fields together (``problem``).
"""

from __future__ import annotations

import dataclasses
from dataclasses import MISSING, dataclass
from typing import Any

from l3m_like.config.strict import build, to_plain


def setting(
    default: Any = MISSING,
    doc: str = "",
    *,
    key: str | None = None,
    choices: tuple[Any, ...] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    reasons: dict[Any, str] | None = None,
    rest: bool = False,
    section: type | None = None,
) -> Any:
    """A dataclass field with its documentation and bounds.

    Args:
        default: its value when nobody gives one (a list or dict is copied, a class is called). Without one it must be given.
        doc: one line for docs/configs.md, with units.
        key: its name in the file, if that is no Python name (``global``).
        choices: the values (of a string setting) that are allowed; other types that the annotation admits pass.
        at_least, above, at_most: bounds of a number.
        reasons: ``{refused value: why, and what to write instead}``.
        section: what each entry of a named dict must be; it stays a plain dict, with its defaults filled in.
        rest: it takes the section's keys that are no setting (the named datasets of `data`).
    """
    metadata = {
        "doc": doc,
        "key": key,
        "choices": choices,
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "reasons": reasons or {},
        "rest": rest,
        "section": section,
    }
    if isinstance(default, (list, dict)):
        value = default
        return dataclasses.field(default_factory=lambda: type(value)(value), metadata=metadata)
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if default is MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class Batch:
    """How many rows make a step."""

    global_: int = setting(doc="Rows per optimizer step, over all ranks.", key="global", at_least=1)
    micro: int | None = setting(
        None, "Rows per forward pass and rank; the rest of the step is accumulated. null: no accumulation.", at_least=1
    )


@dataclass(kw_only=True)
class Data:
    """Named datasets (`train` is what is trained on), and how they are read."""

    workers: int = setting(0, "Threads per rank that read, decode and tokenize. 0: where the step is made.", at_least=0)
    lanes: int | None = setting(
        None,
        "Independent streams of samples, which alone define their order: a divisor of batch.global, a multiple of dp. "
        "null: the largest divisor of batch.global up to 256.",
        at_least=1,
    )
    prefetch: int = setting(2, "Batches prepared ahead of the step.", at_least=0)
    remainder: str = setting(
        "drop",
        "With `epochs`: rows at the end that make no whole step. drop; pad with empty rows; wrap: fill from the next epoch.",
        choices=("drop", "pad", "wrap"),
    )
    max_bad_samples: int = setting(
        0, "How many samples that cannot be read are left out (and noted in ledger.jsonl). 0: the first ends the run.", at_least=0
    )
    sets: dict[str, Any] = setting({}, "The datasets: every other key of `data`.", rest=True)

    @property
    def keeps_ledger(self) -> bool:
        """Whether samples may be left out: bad ones, or ones that are too long for their pack."""
        return self.max_bad_samples > 0 or (self.sets["train"].get("pack") or {}).get("too_long") == "drop"


@dataclass(kw_only=True)
class Group:
    """A parameter group of the optimizer."""

    params: list[str] = setting(doc="Glob patterns over parameter names (`trunk.*`).")
    lr_scale: float = setting(1.0, "Factor on optim.lr.", above=0)
    weight_decay: float | None = setting(None, "Instead of optim.weight_decay. null: the same.", at_least=0)


@dataclass(kw_only=True)
class Muon:
    """Muon on hidden matrices; AdamW, with the settings of `optim`, on everything else."""

    momentum: float = setting(0.95, "Decay of the momentum.", at_least=0)
    nesterov: bool = setting(True, "Orthogonalise gradient + momentum x M instead of M.")
    steps: int = setting(5, "Newton-Schulz steps.", at_least=1)
    scale: str = setting(
        "rms",
        "Factor on the update. rms: 0.2 sqrt(max(rows, cols)), as large as AdamW's, so that both share a learning rate; "
        "spectral: sqrt(max(1, rows / cols)).",
        choices=("rms", "spectral"),
    )
    per_head: bool = setting(False, "Orthogonalise the query, key and value matrices head by head.")
    adamw_lr: float | None = setting(None, "Peak learning rate of what AdamW trains. null: optim.lr.", at_least=0)
    include: list[str] = setting([], "Glob patterns of matrices that go to Muon although their layer says AdamW.")
    exclude: list[str] = setting([], "Glob patterns of matrices that go to AdamW.")

    def problem(self) -> str | None:
        if self.momentum >= 1:
            return f"momentum = {self.momentum}: it must be below 1."
        return None


@dataclass(kw_only=True)
class Optim:
    """The optimizer."""

    name: str = setting("adamw", "The optimizer.", choices=("adamw", "muon"))
    lr: float = setting(doc="Peak learning rate.", at_least=0)
    betas: list[float] = setting([0.9, 0.95], "Decay of the first and second moment.")
    eps: float = setting(1e-8, "Added to the root of the second moment.", above=0)
    weight_decay: float = setting(0.0, "Decoupled weight decay, scaled by the learning rate.", at_least=0)
    clip: float | None = setting(
        None,
        "Largest global norm of the gradient, over the whole mesh. null: off.",
        above=0,
        reasons={0: "0 would multiply every gradient by 0. Write null to turn clipping off"},
    )
    groups: dict[str, dict[str, Any]] = setting(
        {}, "Named parameter groups with their own lr_scale and weight_decay.", section=Group
    )
    no_decay: list[str] = setting(
        [],
        "Glob patterns of further parameters without weight decay; norms and biases (fewer than two dimensions) have none.",
    )
    layer_decay: float | None = setting(
        None,
        "Factor on the learning rate from each layer of a trunk to the one below it, for fine-tuning. null: 1.",
        above=0,
        at_most=1,
    )
    muon: Muon | None = setting(
        None, "Settings of Muon, with `name: muon`. null: its defaults. See [optimizers.md](optimizers.md)."
    )

    def __post_init__(self) -> None:
        if self.name == "muon" and self.muon is None:
            self.muon = Muon()

    def problem(self) -> str | None:
        if self.name != "muon" and self.muon is not None:
            return f"muon: optim.name is {self.name}, so nothing would read it. Remove it (muon: null), or write name: muon."
        if self.name == "muon" and self.layer_decay is not None:
            return "layer_decay is built for adamw; remove it, or write name: adamw."
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            return f"betas = {self.betas}: two numbers in [0, 1) are needed, e.g. [0.9, 0.95]."
        return None


@dataclass(kw_only=True)
class Adaptive:
    """A loss weight computed from gradients: norm(gradient of `against`) / norm(gradient of `term`) at one layer."""

    term: str = setting(doc="Name of the loss term whose weight is computed.")
    against: list[str] = setting(doc="Names of the terms that it is balanced against.")
    at: str = setting(doc="Path of the Linear layer at whose weight both gradients are taken.")
    max: float = setting(1e4, "Upper bound of the weight.", above=0)


@dataclass(kw_only=True)
class Update:
    """One optimizer step within a training step; the order in the file is the order of the updates."""

    params: list[str] | None = setting(None, "Glob patterns of the parameters that it trains. null: all.")
    parts: list[str] | None = setting(None, "Model parts that it runs. null: all.")
    inference: list[str] = setting([], "Of these parts, those that run as at inference: without noise, say.")
    terms: list[str] | None = setting(None, "Loss terms that it sums. null: all.")
    optim: dict[str, Any] = setting({}, "Settings that differ from the `optim` section.")
    start: int = setting(0, "First step (0-based) at which it runs.", at_least=0)
    every: int = setting(1, "Runs every n-th step from `start`.", at_least=1)
    adaptive: Adaptive | None = setting(None, "A loss weight computed from gradients.")

    def settings(self, optim: Optim) -> Optim:
        """The optimizer of this update: the `optim` section with what the update says otherwise."""
        return build(Optim, to_plain(optim) | self.optim, "updates.*.optim")


@dataclass(kw_only=True)
class Schedule:
    """The learning rate over the run, as a factor on optim.lr."""

    name: str = setting(
        "constant", "Shape after the warm-up.", choices=("constant", "linear", "cosine", "exponential", "wsd", "inverse_sqrt")
    )
    warmup: int | float = setting(0, "Linear rise, in steps or (below 1) as a fraction of the run.", at_least=0)
    decay: int | float | None = setting(
        None, "Length of the decay (wsd: of the last phase), likewise. null: the rest of the run (wsd: must be given).", above=0
    )
    floor: float = setting(0.0, "Smallest factor, as a fraction of optim.lr.", at_least=0, at_most=1)

    def problem(self) -> str | None:
        if self.name in ("constant", "inverse_sqrt") and self.decay is not None:
            return f"decay = {self.decay}: a {self.name} schedule has no decay length. Remove it."
        if self.name == "constant" and self.floor:
            return f"floor = {self.floor}: a constant schedule never decays. Remove it, or choose another name."
        if self.name == "wsd" and self.decay is None:
            return "decay: wsd needs the length of its last phase, in steps or as a fraction, e.g. decay: 0.1."
        if self.name == "exponential" and not self.floor:
            return "floor = 0.0: an exponential decay never reaches 0. Give the factor at its end, e.g. floor: 0.01."
        return None


@dataclass(kw_only=True)
class Offload:
    """Activations in host memory between a unit's forward and backward pass."""

    keep: int = setting(1, "The last n units' stay on the device.", at_least=1)
    every: int = setting(1, "Of every n-th unit only: where the copies take longer than the units.", at_least=1)
    smallest: int = setting(1 << 20, "Bytes; smaller tensors stay on the device.", at_least=1)


@dataclass(kw_only=True)
class Parallel:
    """The mesh, and what is done to each repeating unit on it."""

    dp_replicate: int = setting(1, "Copies of the model (HSDP); -1 takes what is left.")
    dp_shard: int = setting(
        -1, "Ranks over which parameters, gradients and optimizer state are sharded (FSDP2); -1 takes what is left."
    )
    tp: int = setting(1, "Tensor-parallel ranks.", at_least=1)
    cp: int = setting(1, "Ranks that share a sequence. Not built yet: 1.", at_least=1, at_most=1)
    pp: int = setting(1, "Pipeline stages. Not built yet: 1.", at_least=1, at_most=1)
    ep: int = setting(1, "Expert-parallel ranks. Not built yet: 1.", at_least=1, at_most=1)
    precision: str = setting(
        "fp32",
        "Of the computation; master weights, gradient reduction and optimizer state are fp32 (fp64: all fp64).",
        choices=("fp32", "bf16", "fp64"),
        reasons={"fp16": "it needs a loss scaler that all ranks agree on, and bf16 does not. Write bf16"},
    )
    checkpoint: str | int | dict[str, Any] = setting(
        "none",
        "Activation checkpointing: none, full, selective (matmuls and attention are kept), n: every n-th unit, or what is kept: "
        "{save: [...], every: n} with matmul, every_second_matmul, attention and names of operators (aten::mm).",
        choices=("none", "full", "selective"),
        at_least=1,
    )
    offload: Offload | None = setting(
        None, "Keep in host memory what units save for the backward pass. null: it stays on the device; {} takes the defaults."
    )
    compile: bool = setting(False, "torch.compile each repeating unit.")
    compile_limit: int | None = setting(
        4,
        "Graphs per kind of unit, for training and for evaluation each; one more ends the run. null: no limit.",
        at_least=1,
    )
    reshard_after_forward: bool = setting(
        True, "Free a unit's gathered parameters after its forward: less memory, more communication."
    )

    def problem(self) -> str | None:
        for axis in ("dp_replicate", "dp_shard"):
            size = getattr(self, axis)
            if size < 1 and size != -1:
                return f"{axis} = {size}: a positive number, or -1 for what is left."
        return None


#: of an operation with a Triton kernel
_VERSIONS = ("auto", "torch", "triton")


@dataclass(kw_only=True)
class Kernels:
    """Which version of each operation is used. auto: the fastest that the run's device and dtype allow."""

    rms_norm: str = setting("auto", "RMSNorm, and the residual sum before it.", choices=_VERSIONS)
    modulated_norm: str = setting("auto", "LayerNorm with adaLN modulation, and the gated residual before it.", choices=_VERSIONS)
    rope: str = setting("auto", "Norm and rotary positions of queries and keys.", choices=_VERSIONS)
    gelu: str = setting("auto", "GELU in an MLP, with the bias before it.", choices=_VERSIONS)
    swiglu: str = setting("auto", "The gated activation of the MLP.", choices=_VERSIONS)
    embedding: str = setting("auto", "The gradient of the embedding of tokens (torch's with tp).", choices=_VERSIONS)
    random: str = setting("auto", "Draws: noise, masks, initial weights. Their numbers are the same.", choices=_VERSIONS)
    attention: str = setting(
        "auto",
        "Attention. flash_attn is an installed package (extras flash4 and flash); auto takes flash-attn-4 for some long rows.",
        choices=("auto", "reference", "sdpa", "cudnn", "short", "flash", "varlen", "flex", "flash_attn"),
    )
    linear_cross_entropy: str = setting(
        "auto", "The loss over the vocabulary, without all logits at once.", choices=("auto", "reference", "torch", "triton")
    )


@dataclass(kw_only=True)
class Ema:
    """An exponential moving average of the weights, kept in fp32."""

    decay: float = setting(doc="Per step.", at_least=0, at_most=1)


@dataclass(kw_only=True)
class Checkpoint:
    """Saving and resuming."""

    every: int | None = setting(1000, "Steps between saves. null: only at the end.", at_least=1)
    keep_last: int = setting(2, "How many of the newest are kept.", at_least=1)
    keep_every: int | None = setting(None, "Also keep every checkpoint whose step is a multiple of this.", at_least=1)
    resume: str = setting(
        "auto",
        "auto: continue this run's newest checkpoint; never: refuse a folder that holds a run; else the path of one to start at.",
    )
    asynchronous: bool = setting(True, "Write in the background while training goes on.")


@dataclass(kw_only=True)
class Wandb:
    """Weights & Biases; entity, key and host come from `.wandb.yaml` or the environment."""

    project: str = setting("l3m-like", "Project.")
    entity: str | None = setting(None, "Team or user. null: from .wandb.yaml or the environment.")
    mode: str = setting("online", "online or offline.", choices=("online", "offline"))
    tags: list[str] = setting([], "Tags of the run.")


@dataclass(kw_only=True)
class Log:
    """What is reported, and how often. metrics.jsonl is always written."""

    every: int = setting(10, "Steps between logged lines.", at_least=1)
    console: bool = setting(True, "Print a line (a live one in a terminal).")
    wandb: Wandb | None = setting(None, "Report to Weights & Biases. null: off; {} takes its defaults.")
    tensorboard: bool = setting(False, "Write TensorBoard events.")
    aim: bool = setting(False, "Report to Aim.")
    refs: bool = setting(False, "Write each step's sample references into metrics.jsonl.")


@dataclass(kw_only=True)
class Eval:
    """One evaluation: terms over held-out data, or what an object of `l3m_like.evaluations` does (`run`)."""

    data: dict[str, Any] | None = setting(None, "The dataset (a `_target_`, as in `data`). With `run`: where that needs one.")
    run: dict[str, Any] | None = setting(None, "The object that evaluates (a `_target_`). null: `loss` over `data`.")
    every: int | None = setting(None, "Steps between evaluations. null: only at the end.", at_least=1)
    loss: dict[str, Any] | None = setting(None, "Losses and metrics (named, as in `loss`). null: those of the run.")
    samples: int | None = setting(None, "Rows that are read. null: the whole set.", at_least=1)

    def problem(self) -> str | None:
        if self.run is None and self.data is None:
            return "data must be given: the dataset that is evaluated on (or `run`, an object that evaluates)."
        for name in ("loss", "samples"):
            if self.run is not None and getattr(self, name) is not None:
                return f"{name} belongs to evaluations without `run`, and nothing would read it. Remove it."
        return None


@dataclass(kw_only=True)
class Init:
    """Weights to start from."""

    from_: str | None = setting(
        None,
        "A run's directory or one of its checkpoint folders; a Hugging Face folder, or the name of a model on its hub. null: of "
        "`parts` alone.",
        key="from",
    )
    parts: dict[str, str] = setting(
        {}, "`{path of a part: the same}`, for parts with weights of their own (`preprocessor.teacher: FOLDER`)."
    )
    strict: bool = setting(
        True, "Every parameter must be found there, and nothing else. false: what is not keeps its random values; it is printed."
    )
    random: list[str] = setting(
        [], "Paths of parts that begin with random weights, whatever is there for them (`[head]`: a new head, for fine-tuning)."
    )
    family: str | None = setting(
        None,
        "The name map of the folder `from`: your own, `my_module.FAMILY`, or that of a part of what it holds (`vit_mae_encoder`, "
        "`clip_vision_model`). null: the one that is known for its model_type.",
    )

    def problem(self) -> str | None:
        if self.from_ is None and not self.parts:
            return "from: nothing is given to start from. Write from or parts, or init: null."
        if self.from_ is None and self.family is not None:
            return f"family = {self.family}: it belongs to `from`, which is not given."
        return None


@dataclass(kw_only=True)
class Lora:
    """Low-rank adapters beside frozen linear layers; see [training_modes.md](training_modes.md)."""

    layers: list[str] = setting(doc="Glob patterns over paths of linear layers (`*.q_proj`) that get one.")
    rank: int = setting(8, "Of the adapters.", at_least=1)
    alpha: float = setting(16.0, "The adapters' factor is alpha / rank.", above=0)
    rank_stabilized: bool = setting(False, "The factor is alpha / sqrt(rank) instead.")
    dropout: float = setting(0.0, "Probability, on the adapters' inputs.", at_least=0, at_most=1)
    from_: str | None = setting(None, "A PEFT folder whose adapters they start as. null: as ones that do nothing.", key="from")
    train: list[str] = setting([], "Glob patterns of further parameters that are trained; everything else is frozen.")
    random_weights: bool = setting(False, "Accept that no weights are loaded into the frozen model (tests).")


@dataclass(kw_only=True)
class Mup:
    """Maximal update parametrisation; see [training_modes.md](training_modes.md)."""

    base_width: int = setting(doc="Width (`dim`) of the model on which lr and the initial deviations were found.", at_least=1)
    width: int = setting(doc="Width of this model (`${dim}`).", at_least=1)
    base_head_dim: int | None = setting(None, "Width of that model's heads. null: heads are as wide at every width.", at_least=1)


@dataclass(kw_only=True)
class Guard:
    """What happens on a step with a NaN or a spike; its update is always skipped, on all ranks."""

    spike_factor: float | None = setting(
        None,
        "A gradient norm above this factor times the window's median is a bad step. null: only NaN and infinity are.",
        above=1,
    )
    window: int = setting(100, "Steps of the median.", at_least=2)
    max_bad_steps: int = setting(10, "Bad steps in a row after which the run ends.", at_least=1)


@dataclass(kw_only=True)
class Run:
    """Where the run lives. One run is one directory and one id, equal on all ranks, kept on resume."""

    dir: str = setting("runs", "Folder of the runs, relative to the working directory.")
    name: str | None = setting(None, "Name of the run's directory. null: that of the config file.")
    id: str | None = setting(None, "Identifies the run in trackers. null: made at its first start.")
    imports: list[str] = setting(
        [], "Folders of your own modules (`_target_: my_block.MyBlock`). The config file's own folder is added."
    )


@dataclass(kw_only=True)
class Launcher:
    """The jobs of a sweep that `hydra/launcher=torchrun` starts."""

    gpus_per_job: int | None = setting(None, "GPUs that a job gets to itself. null: 1 where there are GPUs, else 0.", at_least=0)
    processes_per_job: int | None = setting(None, "Processes of a job. null: one per GPU, or one.", at_least=1)
    parallel_jobs: int | None = setting(None, "Jobs at a time. null: as many as the GPUs hold; without GPUs one.", at_least=1)
