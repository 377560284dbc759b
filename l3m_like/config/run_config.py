"""RunConfig: a whole run, typed and checked. The boundary between the config files and the training loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from l3m_like.config import targets
from l3m_like.config.compose import (
    COMMAND_LINE,
    ORIGINS_FILE,
    Composed,
    Origins,
    add_imports,
    compose,
    overlap,
    references,
    unresolved,
)
from l3m_like.config.schema import (
    Batch,
    Checkpoint,
    Data,
    Ema,
    Eval,
    Guard,
    Init,
    Kernels,
    Launcher,
    Log,
    Lora,
    Mup,
    Optim,
    Parallel,
    Run,
    Schedule,
    Update,
    setting,
)
from l3m_like.config.strict import at, build, join, settings, to_plain, unknown_key
from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.kernels.select import selecting

RUN_LENGTHS = ("steps", "epochs", "tokens")


@dataclass(kw_only=True)
class RunConfig:
    """A run. Make it with ``from_file`` or ``from_dict``; both check everything that can be checked without building."""

    seed: int = setting(0, "Of every random draw.", at_least=0)
    steps: int | None = setting(None, "Run length in optimizer steps (one of steps, epochs, tokens).", at_least=1)
    epochs: int | None = setting(None, "Run length in passes over data.train.", at_least=1)
    tokens: int | None = setting(None, "Run length in tokens: places in rows, padding included.", at_least=1)
    batch: Batch = setting(doc="Rows per step.")
    data: Data = setting(doc="What is read.")
    model: dict[str, Any] = setting(doc="A MetaModel, or a named dict of them that run in series.")
    loss: dict[str, Any] = setting(doc="Named loss blocks; the names are those of the terms.")
    updates: dict[str, Update] = setting({}, "Named updates, run in this order. None given: one, `main`, that trains everything.")
    optim: Optim = setting(doc="The optimizer.")
    schedule: Schedule = setting(Schedule, "The learning rate over the run.")
    parallel: Parallel = setting(Parallel, "The mesh.")
    kernels: Kernels = setting(Kernels, "Which version of each operation is used.")
    ema: Ema | None = setting(None, "Average of the weights. null: none.")
    checkpoint: Checkpoint = setting(Checkpoint, "Saving and resuming.")
    log: Log = setting(Log, "Reports.")
    evals: dict[str, Eval] = setting({}, "Named evaluations.")
    sample: dict[str, Any] | None = setting(None, "The sampler that run/sample.py uses. null: none.")
    init: Init | None = setting(None, "Weights to start from. null: random ones.")
    lora: Lora | None = setting(None, "Train low-rank adapters instead of the model. null: train the model.")
    mup: Mup | None = setting(None, "Scale initial weights and learning rates with the width. null: as they are given.")
    keep: list[str] = setting([], "Keys that stay in the data_dict to its end (others go after their last reader).")
    guard: Guard = setting(Guard, "NaN and spikes.")
    run: Run = setting(Run, "Where the run lives.")
    deterministic: bool = setting(False, "Deterministic algorithms only: the same mesh gives the same bits. Slower.")
    debug: bool = setting(
        False, "No compile, workers or tracker; a folder of its own; gradient anomaly check; full traces (`--debug`)."
    )
    launcher: Launcher = setting(Launcher, "Jobs of a sweep.")
    gc_every: int = setting(100, "Steps between Python's garbage collections, at the same step on all ranks.", at_least=1)

    #: the config file's stem
    experiment: str = dataclasses.field(default="run", compare=False)
    #: ``{knob: value}`` of the file (in the sections they are written out already)
    knobs: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    #: ``{path of a value: where it was written, and as which expression}``
    origins: dict[str, str] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    # ---- making one ------------------------------------------------------------------------------------------------

    @classmethod
    def from_file(cls, path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
        """The run that ``path`` and Hydra ``overrides`` ("optim.lr=1e-3") describe.

        Raises:
            UserError: anything that is wrong with it, with the place, the value and the fix.
        """
        return cls._check(compose(path, overrides))

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], name: str = "run") -> RunConfig:
        """The run that a plain nested dict describes (``${...}`` may be used). Raises as ``from_file``."""
        composed = Composed(OmegaConf.create(dict(tree)), name=name)
        for path in _leaves(tree):
            composed.origins.record(path, "given in Python")
        return cls._check(composed)

    @classmethod
    def _check(cls, composed: Composed) -> RunConfig:
        tree, origins = composed.tree, composed.origins
        raw = unresolved(tree)
        sections = settings(cls)
        knobs = [str(key) for key in raw if key not in sections]
        _check_knobs(raw, knobs, sections, composed)
        plain = _resolve(OmegaConf.merge(_defaults(), tree), origins)  # `${seed}` works where the file leaves seed out
        expressions = {path: text for path, text in _leaves(raw).items() if isinstance(text, str) and references(text)}
        origins.expressions = expressions  # not before they were resolved: one could read itself
        given = {key: value for key, value in plain.items() if key in sections}
        if isinstance(given.get("run", {}), Mapping):
            imports = given.get("run", {}).get("imports", [])
            given["run"] = {**given.get("run", {}), "imports": [*imports, *(i for i in composed.imports if i not in imports)]}
        made = build(cls, given, "", origins)
        made.knobs = {key: plain[key] for key in knobs}
        add_imports(made.run.imports)
        made.experiment = composed.name
        made.run.name = made.run.name or composed.name
        made._check_length(origins)
        made._check_sections(origins)
        if made.debug:
            made._apply_debug(origins)
        made.origins = {path: origins(path) for path in _leaves(to_plain(made))}
        return made

    def _check_length(self, origins: Origins) -> None:
        given = [name for name in RUN_LENGTHS if getattr(self, name) is not None]
        if not given:
            raise UserError(f"The run's length is missing: give one of {', '.join(RUN_LENGTHS)} (e.g. steps: 1000).")
        if len(given) > 1:
            listed = " and ".join(f"{name} = {getattr(self, name)} ({origins(name)})" for name in given)
            raise UserError(f"{listed} are both given; a run has one length. Set the other to null, e.g. {given[0]}=null.")

    def _check_sections(self, origins: Origins) -> None:
        """The sections of constructors: their names, then every `_target_` in them."""
        sets = self.data.sets
        for key, value in sets.items():
            if not (isinstance(value, Mapping) and "_target_" in value):
                raise unknown_key("data", key, value, [*settings(Data), "train"], origins)
        if "train" not in sets:
            raise UserError(f"data.train must be given: the dataset that is trained on. {did_you_mean('train', sets)}")
        self.data.sets = {key: targets.check(value, f"data.{key}", origins, supplied=True) for key, value in sets.items()}
        self.model = targets.check(self.model, "model", origins)
        self.loss = _named_targets(self.loss, "loss", origins)
        for name, evaluation in self.evals.items():
            if evaluation.data is not None:
                _need_target(evaluation.data, f"evals.{name}.data", origins)
                evaluation.data = targets.check(evaluation.data, f"evals.{name}.data", origins, supplied=True)
            if evaluation.run is not None:
                _need_target(evaluation.run, f"evals.{name}.run", origins)
                evaluation.run = targets.check(evaluation.run, f"evals.{name}.run", origins, supplied=evaluation.data is not None)
            if evaluation.loss is not None:
                evaluation.loss = _named_targets(evaluation.loss, f"evals.{name}.loss", origins)
        if self.sample is not None:
            if "_target_" not in self.sample:
                raise self.no_sampler(f"{at('sample', self.sample, origins)}: ")
            self.sample = targets.check(self.sample, "sample", origins, supplied=True)
        for name, update in self.updates.items():
            build(Optim, to_plain(self.optim) | update.optim, f"updates.{name}.optim", origins)
            for term in update.terms or ():
                if term not in self.loss:
                    raise UserError(
                        f"{at(f'updates.{name}.terms', update.terms, origins)}: there is no loss '{term}'. "
                        f"{did_you_mean(term, self.loss)}"
                    )

    def _apply_debug(self, origins: Origins) -> None:
        self.parallel.compile, self.parallel.offload = False, None
        self.data.workers = 0
        self.log.wandb, self.log.tensorboard, self.log.aim = None, False, False
        for path in ("parallel.compile", "parallel.offload", "data.workers", "log.wandb", "log.tensorboard", "log.aim"):
            origins.record(path, "debug")

    # ---- using it --------------------------------------------------------------------------------------------------

    @classmethod
    def of(cls, cfg: RunConfig | str | Path | Mapping[str, Any]) -> RunConfig:
        """``cfg`` itself, or the run of a config file or a plain dict."""
        if isinstance(cfg, RunConfig):
            return cfg
        return cls.from_dict(cfg) if isinstance(cfg, Mapping) else cls.from_file(cfg)

    def instantiate(self, path: str, **supplied: Any) -> Any:
        """Build what is at ``path`` ("model", "loss", "data.train", "evals.heldout.data", "sample").

        Args:
            supplied: further arguments of the outermost constructor.

        Raises:
            UserError: there is nothing at ``path``, or a constructor raised (with its path and origin).
        """
        node: Any = self.to_dict()
        for i, part in enumerate(path.split(".")):
            if not isinstance(node, Mapping) or node.get(part) is None:
                above = ".".join(path.split(".")[:i]) or "the config"
                raise UserError(
                    f"{path}: there is no '{part}' in {above}. {did_you_mean(part, node if isinstance(node, Mapping) else ())}"
                )
            node = node[part]
        from l3m_like.core.random import draw_by  # here, as the config alone imports no torch

        draw_by(self.kernels.random)
        with selecting(dataclasses.asdict(self.kernels)):
            return targets.instantiate(node, path, Origins(self.origins), **supplied)

    def no_sampler(self, said: str = "") -> UserError:
        """The error for a run that nothing can be sampled from; it begins with what was ``said``."""
        terms = ", ".join(sorted({str(loss.get("_target_")).rpartition(".")[2] for loss in self.loss.values()}))
        return UserError(
            f"{said}{self.run.name} has no sampler (no `sample` section); it is trained for {terms}. Language models (llm, dllm) "
            "and models of images (sit, dit_dh) have one: sample: {_target_: l3m_like.generate.Autoregressive, ...}, or "
            "MaskedDiffusion, FlowODE, FlowSDE."
        )

    @property
    def run_dir(self) -> Path:
        """The run's directory."""
        return Path(self.run.dir) / (self.run.name or self.experiment)

    def mesh_axes(self) -> dict[str, int]:
        """The mesh axes of the `parallel` section, outermost first."""
        return {axis: getattr(self.parallel, axis) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")}

    def facts(self) -> dict[str, Any]:
        """What identifies the run in reports (JSON values)."""
        return {"run": self.run.name, "id": self.run.id, "seed": self.seed, **self.knobs}

    def to_dict(self) -> dict[str, Any]:
        """Plain containers with every default; ``from_dict`` of it is this run again."""
        return to_plain(self)

    def save(self, folder: str | Path) -> None:
        """Write `config.yaml` (resolved, relaunchable) and `config_origins.yaml` (each value's origin) into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / ORIGINS_FILE, yaml.safe_dump(self.origins, sort_keys=False, width=1000))
        _write(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(_escape(self.to_dict()))))


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all: a run that is killed here can be relaunched."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _defaults() -> dict[str, Any]:
    """Every setting that has a default."""
    fields = settings(RunConfig).items()
    made = {key: field.default_factory() for key, field in fields if field.default_factory is not dataclasses.MISSING}
    plain = {key: field.default for key, field in fields if field.default is not dataclasses.MISSING}
    return to_plain(plain | made)


def _named_targets(section: Mapping[str, Any], path: str, origins: Origins) -> dict[str, Any]:
    section = {name: value for name, value in section.items() if value is not None}  # null: not this one of a file's defaults
    for name, value in section.items():
        if name == "_target_":
            raise UserError(
                f"{at(join(path, name), value, origins)}: `{path}` holds named blocks, "
                f"e.g. {path}: {{next_token: {{_target_: ...}}}}."
            )
        _need_target(value, join(path, name), origins)
    return targets.check(section, path, origins)


def _need_target(value: Any, path: str, origins: Origins) -> None:
    if not isinstance(value, Mapping) or "_target_" not in value:
        hint = did_you_mean("_target_", value) if isinstance(value, Mapping) and value else ""
        raise UserError(f"{at(path, value, origins)}: it needs a `_target_`, the dotted name of what is built. {hint}".rstrip())


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """``{dotted path: value}`` of everything that is no (filled) dict or list."""
    if isinstance(value, Mapping) and value:
        return {p: v for key, entry in value.items() for p, v in _leaves(entry, join(path, key)).items()}
    if isinstance(value, (list, tuple)) and value:
        return {p: v for i, entry in enumerate(value) for p, v in _leaves(entry, join(path, i)).items()}
    return {path: value}


def _check_knobs(raw: Mapping[str, Any], knobs: list[str], sections: Mapping[str, Any], composed: Composed) -> None:
    """A root key is a section or a knob, and a knob that nothing reads does nothing.

    A file's knob may have lost its reader to an override (`optim.lr=...` over `optim: {lr: "${lr}"}`); one that the command
    line gives must have one left.
    """
    leaves = _leaves(raw)
    left = {name for value in leaves.values() if isinstance(value, str) for name in references(value)}
    for knob in knobs:
        for path in _leaves(raw[knob], knob) if isinstance(raw[knob], Mapping) else [knob]:
            origin = composed.origins(path)
            reads = left if origin == COMMAND_LINE else left | composed.reads
            if any(overlap(path, read) for read in reads):
                continue
            options = [*sections, *(read for read in reads if "." not in read)]
            shadowed = " (what read it was overridden)" if path in composed.reads else ""
            raise UserError(
                f"{at(path, leaves.get(path, raw[knob]), composed.origins)}: this is no section, "
                f"and no `${{{path}}}` reads it{shadowed}. "
                f"{did_you_mean(path, options) if not shadowed else 'Give one of the two.'}"
            )


def _resolve(tree: Any, origins: Origins) -> dict[str, Any]:
    try:
        return OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        raise UserError(
            f"{error.full_key} = ??? ({origins(str(error.full_key))}): it must be given, e.g. {error.full_key}=VALUE."
        ) from error
    except InterpolationKeyError as error:
        value = unresolved(tree)
        leaves = _leaves(value)
        text = leaves.get(str(error.full_key), "")
        known = {name: None for path in leaves for name in _above(path)}
        missing = next((name for name in references(str(text)) if name not in known), str(text))
        roots = [name for name in known if name.count(".") == missing.count(".")]
        raise UserError(
            f"{error.full_key} = {text} ({origins(str(error.full_key))}): there is no '{missing}'. {did_you_mean(missing, roots)}"
        ) from error
    except OmegaConfBaseException as error:
        place = str(error.full_key or "")
        raise UserError(f"{place} ({origins(place)}): {str(error.msg or error).splitlines()[0]}") from error


def _above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def _escape(value: Any) -> Any:
    """Strings with a literal `${`, as OmegaConf reads them back."""
    if isinstance(value, Mapping):
        return {key: _escape(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_escape(entry) for entry in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
