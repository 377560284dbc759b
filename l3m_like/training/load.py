"""A model to use: from a run's checkpoint, or with the weights that a config would start from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from l3m_like.config import targets
from l3m_like.config.run_config import RunConfig
from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.meta_model import Graph, cast
from l3m_like.core.wiring import parts_of
from l3m_like.distributed.gradients import local
from l3m_like.distributed.mesh import Mesh
from l3m_like.distributed.parallelize import DTYPES, parallelize
from l3m_like.training.build import build_model
from l3m_like.training.checkpoint import Checkpointer, DamagedCheckpoint, load_full, step_of, whole_steps
from l3m_like.training.init import init_specs, initialize, materialize, random_weights
from l3m_like.training.lora import load_adapters
from l3m_like.training.start_from import load_weights

if TYPE_CHECKING:
    from l3m_like.generate.sampler import Samples

PRECISIONS = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, and what it was made from.

    Attributes:
        model: a MetaModel, or a Series of them.
        config: of the run.
        step: of the checkpoint; None: the weights that training would start from.
        ema: are these the averaged weights?
        mesh: that the model is on; None: one process.
    """

    model: nn.Module
    config: RunConfig
    step: int | None
    ema: bool = False
    mesh: Mesh | None = None

    @property
    def inference(self) -> dict[str, Graph]:
        """``{part: its inference graph}`` (one part, "", unless ``model:`` is a named dict)."""
        return {name: part.inference() for name, part in parts_of(self.model).items()}

    @torch.no_grad()
    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """``data`` plus all that the inference graph writes."""
        out = dict(data)
        for part in parts_of(self.model).values():
            out = part(out, part.inference())
        return out

    def generate(self, guide: Loaded | None = None, **overrides: Any) -> Samples:
        """Run the config's sampler, some of its settings replaced: ``loaded.generate(prompts=["To be"], temperature=0.5)``.

        Args:
            guide: a weaker model that guidance leads away from, see ``FlowODE.run``.

        Raises:
            UserError: the config has no ``sample`` section; the sampler has no such setting, or takes no guide.
        """
        if self.config.sample is None:
            raise self.config.no_sampler()
        section = targets.check({**self.config.sample, **overrides}, "sample")
        sampler = targets.instantiate(section, "sample")
        if guide is None:
            return sampler.run(self.model, process=self.processor(), mesh=self.mesh)
        if "guide" not in inspect.signature(sampler.run).parameters:
            raise UserError(f"{type(sampler).__name__} takes no guide; FlowODE and FlowSDE do.")
        theirs = sampler if guide.config.sample is None else guide.config.instantiate("sample")
        for setting in ("path", "prediction", "shape", "classes"):  # of the objects: a config may leave one to its default
            its, ours = getattr(theirs, setting, None), getattr(sampler, setting, None)
            if its != ours:
                raise UserError(
                    f"The guide's sample.{setting} is {its}, this model's {ours}: their predictions cannot be mixed. Take a "
                    "guide that was trained alike."
                )
        return sampler.run(self.model, process=self.processor(), mesh=self.mesh, guide=guide.model)

    def processor(self) -> Any:
        """The training data's processor (it reads no file until it is used); None where the dataset has no `process`."""
        train = self.config.to_dict()["data"]["train"]
        return self.config.instantiate("data.train.process") if train.get("process") is not None else None


def load(
    run_or_config: RunConfig | str | Path | Mapping[str, Any],
    step: int | None = None,
    ema: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    overrides: Sequence[str] = (),
    mesh: Mesh | None = None,
) -> Loaded:
    """Load a model for use.

    Args:
        run_or_config: a run's directory: the weights of its newest (or the asked) checkpoint, whatever mesh saved it; or one of
            its checkpoint folders, RUN/checkpoints/step_N. Or a config (file, dict, RunConfig): the weights that training would
            start from, random ones or those of ``init``.
        step: of the checkpoint; None: the newest whole one.
        ema: the averaged weights instead (what was not trained, and so not averaged, is as in the model).
        device: None: an accelerator if there is one. On a mesh it is the mesh's.
        dtype: of the weights ("bfloat16"); None: as they were saved. On a mesh: of the computation, and None is the run's.
        overrides: of the config, as on the command line: ``["sample.steps=50"]``.
        mesh: put the model on it (every rank calls this); None: the whole model in this process.

    Raises:
        UserError: no run or config there; no checkpoint, or not that step; no averaged weights; a checkpoint that does not fit.
    """
    if isinstance(run_or_config, (str, Path)) and (one := step_of(Path(run_or_config))) is not None:
        if step not in (None, one):
            raise UserError(f"load: {run_or_config} is the checkpoint of step {one}, but step {step} was asked for.")
        run_or_config, step = Path(run_or_config).parents[1], one
    cfg, checkpoints = _find(run_or_config, overrides)
    if checkpoints is None and (step is not None or ema):
        what = "ema" if ema else f"step {step}"
        raise UserError(f"load: {what} needs a run's directory (RUN/checkpoints), but a config was given, which has no weights.")
    if ema and cfg.ema is None:
        raise UserError(f"load: ema was asked for, but this run kept no average (its config has ema: null): {checkpoints}")
    if checkpoints is not None and mesh is None and step is None:
        step = _newest(checkpoints, next(iter(whole_steps(checkpoints)), None))
    kind = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if kind is not None and kind not in PRECISIONS:
        raise UserError(f"load: dtype {dtype} is not one of {', '.join(str(d).removeprefix('torch.') for d in PRECISIONS)}.")

    # ---- the model, empty ----------------------------------------------------------------------------------------
    model = build_model(cfg)
    if cfg.parallel.precision == "fp64":
        model.double()
    saved_dtypes = {name: tensor.dtype for name, tensor in _tensors(model).items()}
    parts = parts_of(model)
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")) if mesh is None else mesh.device
    specs = {name: init_specs(part) for name, part in parts.items()}
    for part in parts.values():
        if mesh is not None:
            for _, block in part.blocks():
                block.bind(mesh)
            parallelize(part, mesh, precision=PRECISIONS[kind] if kind is not None else cfg.parallel.precision)
        elif kind is not None:
            cast(part, kind)
        part.retie()  # a change of dtype on the meta device parts what is tied
        materialize(part, chosen)
        part.eval()
    if checkpoints is None:
        loaded = load_weights(model, cfg.init) if cfg.init is not None else ()
        for name, part in parts.items():
            initialize(part, cfg.seed, f"{name}." if name else "", specs[name], without=loaded)
        load_adapters(model, cfg.lora, None if cfg.init is None else cfg.init.family)
        random_weights(parts.values())  # a frozen part that nothing was loaded into, unless the config says so

    # ---- its weights ---------------------------------------------------------------------------------------------
    if checkpoints is not None:
        keys = {_saved_name(name, tensor, ema): name for name, tensor in _tensors(model).items()}
        if mesh is None:
            _fill_here(model, keys, checkpoints, step)
        else:
            step = _fill_sharded(model, keys, saved_dtypes, checkpoints, step)
    return Loaded(model, cfg, step, ema, mesh)


def _find(run_or_config: RunConfig | str | Path | Mapping[str, Any], overrides: Sequence[str]) -> tuple[RunConfig, Path | None]:
    """``(config, folder of the checkpoints or None)``."""
    if isinstance(run_or_config, (RunConfig, Mapping)):
        if overrides:
            raise UserError("load: overrides change a run's or a file's config; change a RunConfig or dict itself.")
        return RunConfig.of(run_or_config), None
    path = Path(run_or_config)
    if path.is_file():
        return RunConfig.from_file(path, overrides), None
    if not (path / "config.yaml").is_file():
        runs = [found.parent.name for found in path.parent.glob("*/config.yaml")]
        what = "holds no config.yaml" if path.is_dir() else "does not exist"
        hint = did_you_mean(path.name, runs) if runs else "Give the directory of a run (below `run.dir`), or a config."
        raise UserError(f"load: no run at {path}: it {what}. {hint}")
    return RunConfig.from_file(path / "config.yaml", overrides), path / "checkpoints"


def _newest(checkpoints: Path, step: int | None) -> int:
    if step is None:
        raise DamagedCheckpoint(f"load: {checkpoints} holds no checkpoint: the run has not saved one yet (checkpoint.every).")
    return step


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that a checkpoint holds of a model, by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _saved_name(name: str, tensor: Tensor, ema: bool) -> str:
    return f"ema/{name}" if ema and tensor.requires_grad else f"model/{name}"


@torch.no_grad()
def _fill_here(model: nn.Module, keys: Mapping[str, str], checkpoints: Path, step: int | None) -> None:
    tensors = _tensors(model)
    for key, value in load_full(checkpoints, step, keys).items():
        here = tensors[keys[key]]
        if value.shape != here.shape:
            shapes = f"{list(value.shape)} in {checkpoints}, but {list(here.shape)} in the model of the config"
            raise UserError(f"load: '{key}' is {shapes}. Load the run with its own config.yaml.")
        here.copy_(value)


@torch.no_grad()
def _fill_sharded(
    model: nn.Module, keys: Mapping[str, str], saved_dtypes: Mapping[str, torch.dtype], checkpoints: Path, step: int | None
) -> int:
    """Each rank reads its own shards; returns the step."""
    tensors = _tensors(model)
    targets = {}
    for key, name in keys.items():
        dtype = saved_dtypes[name]
        dtype = torch.promote_types(dtype, torch.float32) if key.startswith("ema/") else dtype
        tensor = tensors[name].detach()
        targets[key] = tensor if tensor.dtype == dtype else torch.empty_like(tensor, dtype=dtype)
    checkpointer = Checkpointer(checkpoints)
    try:
        step = _newest(checkpoints, checkpointer.latest()) if step is None else step
        checkpointer.load(step, targets, partial=True)
    finally:
        checkpointer.close()
    for key, name in keys.items():
        if targets[key].dtype != tensors[name].dtype:
            local(tensors[name]).copy_(local(targets[key]))
    return step
