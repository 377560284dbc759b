"""Starting weights, straight into the sharded model: of another run's checkpoint, or of a Hugging Face folder."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from l3m_like.config.schema import Init
from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.meta_model import Frozen, MetaModel, Tower
from l3m_like.distributed.gradients import local
from l3m_like.pretrained.families import family
from l3m_like.pretrained.folder import FolderMissing, find_folder
from l3m_like.pretrained.name_map import ADAPTERS
from l3m_like.pretrained.wrapped import wrapped_family
from l3m_like.training.checkpoint import Checkpointer, step_of, stored_tensors, whole_steps
from l3m_like.training.hugging_face import Fit, fit, listed
from l3m_like.training.lora import adapter_names

log = logging.getLogger(__name__)


def find_checkpoint(where: str, setting: str) -> tuple[Path, int]:
    """``(checkpoints folder, step)`` of a run's directory (its newest) or of one checkpoint folder in it.

    Raises:
        FolderMissing: there is no checkpoint there.
        DamagedCheckpoint: there are some, but not one is whole.
    """
    path = Path(where).expanduser()
    one = step_of(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not folder.is_dir():
        raise FolderMissing(
            f"{setting} = {where}: no such folder. Name a run's directory, or a folder checkpoints/step_... in it."
        )
    if one is not None:
        return path.parent, one
    if dist.is_initialized() and dist.get_backend() == "fake":  # `--check`: one process looks, and has no one to agree with
        step = next(iter(whole_steps(folder)), None)
    else:
        with contextlib.closing(Checkpointer(folder)) as checkpointer:
            step = checkpointer.latest()
    if step is None:
        raise FolderMissing(f"{setting} = {where}: there is no checkpoint in {folder}. Name the directory of a run that has one.")
    return folder, step


@dataclass(frozen=True)
class Start:
    """Where the weights of a part of the model come from; the part "" is the model itself.

    Attributes:
        setting: that says so, for messages.
        without: paths below ``module`` that have weights of their own.
        random: paths below ``module`` of what keeps its random weights.
        family: of the folder (None: that of its ``model_type``).
    """

    module: nn.Module
    path: str
    where: str
    setting: str
    strict: bool
    without: tuple[str, ...] = ()
    family: str | None = None
    random: tuple[str, ...] = ()

    def fit(self, *, download: bool = True) -> Fit | CheckpointFit:
        """The source compared with the part, which may be on any device, meta too.

        Args:
            download: a model that is not in the hub's cache is fetched.

        Raises:
            FolderMissing: there is nothing. UserError: it does not fit.
        """
        folder = find_folder(self.where, self.setting, download=download)
        if folder is None:
            return self._fit_checkpoint()
        of = family(self.family) if self.family else wrapped_family(self.module) or family(folder.model_type)
        return fit(self.module, folder, of, self.setting, strict=self.strict, without=self.without, random=self.random)

    def load(self) -> Collection[str]:
        """Fill the part's (materialised, sharded) parameters and buffers; the names of those that were there."""
        found = self.fit()
        found.fill(self.module)
        if found.left and (not dist.is_initialized() or dist.get_rank() == 0):
            lines = "".join(f"\n  {line}" for line in found.left)
            log.warning("%s = %s was not taken as a whole:%s", self.setting, self.where, lines)
        for path, part in frozen_parts(self.module).items():
            if all(f"{path}.{name}" in found.loaded for name, _ in part.named_parameters()):
                part.loaded_from = self.where
        return found.loaded

    def _fit_checkpoint(self) -> CheckpointFit:
        directory, step = find_checkpoint(self.where, self.setting)
        stored = stored_tensors(directory, step)
        stored = {name.removeprefix("model/"): entry for name, entry in stored.items() if name.startswith("model/")}
        tensors = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        apart = tuple(f"{path}." for path in (*self.without, *self.random))
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(apart)}
        lacking = [name for name in stored if name.endswith(ADAPTERS) and name not in tensors and not name.startswith(apart)]
        if lacking:
            raise UserError(
                f"{self.setting} = {self.where} was tuned with adapters ('{lacking[0]}' ...), which this model has not: it "
                "would be the untuned one. Give the same `lora` section, or start from its merged export (convert.py to-hf)."
            )
        begin_here = adapter_names(self.module) - set(stored)
        loaded, wrong = [], []
        for name, tensor in tensors.items():
            if name in begin_here:
                continue
            if name not in stored:
                wrong.append(f"it holds no '{name}'.")
            elif stored[name].shape != tuple(tensor.shape):
                wrong.append(f"'{name}' is {list(stored[name].shape)} there and {list(tensor.shape)} here.")
            else:
                loaded.append(name)
        unexpected = [name for name in stored if name not in tensors and not name.startswith(apart)]
        wrong += [f"it holds '{name}', for which the model has no place." for name in unexpected]
        if wrong and self.strict:
            raise UserError(
                f"{self.setting} = {self.where} does not fit the model (init.random names parts that begin anew; "
                f"init.strict: false takes what fits):{listed(wrong)}"
            )
        if not loaded:
            raise UserError(f"{self.setting} = {self.where}: none of the model's parameters is there.{listed(wrong)}")
        return CheckpointFit(directory, step, {name: stored[name].dtype for name in loaded}, wrong)


@dataclass(frozen=True)
class CheckpointFit:
    """What of a run's checkpoint goes into a model.

    Attributes:
        directory, step: of the checkpoint.
        loaded: our names of what does, and the dtype that it has there.
        left: what does not, in words.
    """

    directory: Path
    step: int
    loaded: dict[str, torch.dtype]
    left: list[str]

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        """Read this rank's shards of ``model``'s parameters and buffers, cast to their dtype."""
        tensors: dict[str, Tensor] = {name: parameter.detach() for name, parameter in model.named_parameters()}
        tensors |= dict(model.named_buffers())
        read = {}
        for name, dtype in self.loaded.items():  # a frozen part may have another dtype than the run that trained it
            read[name] = tensors[name] if tensors[name].dtype == dtype else torch.empty_like(tensors[name], dtype=dtype)
        with contextlib.closing(Checkpointer(self.directory)) as checkpointer:
            checkpointer.load(self.step, {f"model/{name}": tensor for name, tensor in read.items()}, partial=True)
        for name, tensor in read.items():
            if tensor is not tensors[name]:
                local(tensors[name]).copy_(local(tensor))


def starts(model: nn.Module, init: Init) -> list[Start]:
    """What ``init`` fills, the whole model before its parts.

    Raises:
        UserError: a path in ``init.parts`` that is no part of the model; one in ``init.random`` without parameters
            of its own, or that is or holds one in ``init.parts``.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    for path in init.random:
        if path not in modules or not any(True for _ in modules[path].parameters()):
            with_weights = [name for name, module in modules.items() if any(True for _ in module.parameters())]
            raise UserError(f"init.random: '{path}' is nothing in the model that has weights. {did_you_mean(path, with_weights)}")

    anew = tuple(f"{path}." for path in init.random)
    begin = {id(parameter) for name, parameter in model.named_parameters() if name.startswith(anew)}
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    for path in init.random:
        own = list(modules[path].parameters())
        if not any(id(parameter) in begin for parameter in own):
            raise UserError(
                f"init.random: the parameters of '{path}' are tied to others ('{first[id(own[0])]}'), which do not begin anew. "
                "Name the part that holds these as well, or untie them."
            )

    def below(inside: str, paths: Iterable[str]) -> tuple[str, ...]:
        return tuple(path.removeprefix(f"{inside}.") for path in paths if path.startswith(f"{inside}."))

    found = []
    if init.from_ is not None:
        found.append(
            Start(model, "", init.from_, "init.from", init.strict, tuple(init.parts), init.family, tuple(init.random))
        )
    paths = [name for name, module in modules.items() if isinstance(module, (MetaModel, Frozen, Tower))]
    for path, where in init.parts.items():
        if path not in paths:
            raise UserError(f"init.parts: '{path}' is no part of the model with weights of its own. {did_you_mean(path, paths)}")
        part = modules[path]
        inner, inside = (part.model, f"{path}.model") if isinstance(part, (Frozen, Tower)) else (part, path)
        above = [name for name in init.random if f"{inside}.".startswith(f"{name}.")]
        if above:
            raise UserError(
                f"init.random: '{above[0]}' is, or holds, '{path}', which gets weights from init.parts. Remove one of the two."
            )
        within = below(inside, init.parts), below(inside, init.random)
        found.append(Start(inner, path, where, f"init.parts.{path}", init.strict, within[0], random=within[1]))
    return found


def load_weights(model: nn.Module, init: Init) -> set[str]:
    """Fill the (materialised, sharded) parameters and buffers of ``model`` as ``init`` says, whatever mesh it is on; returns the
    names of the parameters that were filled."""
    filled: set[str] = set()
    for start in starts(model, init):
        loaded = start.load()
        part = model.get_submodule(start.path)
        if isinstance(part, Frozen) and all(name in loaded for name, _ in start.module.named_parameters()):
            part.loaded_from = start.where
        inside = next(f"{path}." if path else "" for path, module in model.named_modules() if module is start.module)
        filled |= {f"{inside}{name}" for name in loaded}
    every = dict(model.named_parameters(remove_duplicate=False))  # a tied one was filled by each of its names
    here = {id(every[name]) for name in filled & set(every)}
    return {name for name, parameter in every.items() if id(parameter) in here}


def frozen_parts(model: nn.Module) -> dict[str, Frozen]:
    """``{path: frozen part}``."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Frozen)}


def restore_sources(model: nn.Module, sources: Mapping[str, str | None]) -> None:
    """Say of a resumed run's frozen parts where their weights once came from, as its checkpoint does."""
    for path, part in frozen_parts(model).items():
        part.loaded_from = sources.get(path)
