"""Starting weights, straight into the sharded model: of another run's checkpoint, or of a Hugging Face folder."""

from __future__ import annotations

import contextlib
import logging
import re
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
from l3m_like.pretrained.folder import Folder, find_folder
from l3m_like.pretrained.name_map import ADAPTERS
from l3m_like.pretrained.wrapped import wrapped_family
from l3m_like.training.checkpoint import Checkpointer, whole_steps
from l3m_like.training.hugging_face import Fit, fit
from l3m_like.training.lora import adapter_names

log = logging.getLogger(__name__)


def find_checkpoint(where: str, setting: str) -> tuple[Path, int]:
    """``(checkpoints folder, step)`` of a run's directory (its newest) or of one checkpoint folder in it.

    Raises:
        UserError: there is no checkpoint there.
    """
    path = Path(where).expanduser()
    one = re.fullmatch(r"step_(\d+)", path.name)
    if one:
        return path.parent, int(one[1])
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not folder.is_dir():
        raise UserError(f"{setting} = {where}: no such folder. Name a run's directory, or a folder checkpoints/step_... in it.")
    if dist.is_initialized() and dist.get_backend() == "fake":  # `--check`: one process looks, and has no one to agree with
        step = next(iter(whole_steps(folder)), None)
    else:
        with contextlib.closing(Checkpointer(folder)) as checkpointer:
            step = checkpointer.latest()
    if step is None:
        raise UserError(f"{setting} = {where}: there is no whole checkpoint in {folder}.")
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

    def folder(self, *, download: bool = True) -> Folder | None:
        """The Hugging Face folder; None: it is a run's."""
        return find_folder(self.where, self.setting, download=download)

    def fit(self, folder: Folder) -> Fit:
        """The folder compared with the part, see ``hugging_face.fit``."""
        of = family(self.family) if self.family else wrapped_family(self.module) or family(folder.model_type)
        return fit(self.module, folder, of, self.setting, strict=self.strict, without=self.without, random=self.random)

    def load(self) -> Collection[str]:
        """Fill the part's (materialised, sharded) parameters and buffers; the names of those that were there."""
        folder = self.folder()
        if folder is None:
            loaded, left = self._load_checkpoint()
        else:
            found = self.fit(folder)
            found.fill(self.module, folder)
            loaded, left = found.loaded, found.left
        if left and (not dist.is_initialized() or dist.get_rank() == 0):
            log.warning("%s = %s was not taken as a whole:%s", self.setting, self.where, "".join(f"\n  {line}" for line in left))
        for path, part in frozen_parts(self.module).items():
            if all(f"{path}.{name}" in loaded for name, _ in part.named_parameters()):
                part.loaded_from = self.where
        return loaded

    def _load_checkpoint(self) -> tuple[Collection[str], list[str]]:
        """(names that were filled, what was not, in words)."""
        folder, step = find_checkpoint(self.where, self.setting)
        tensors: dict[str, Tensor] = {name: parameter.detach() for name, parameter in self.module.named_parameters()}
        tensors |= dict(self.module.named_buffers())
        apart = tuple(f"{path}." for path in (*self.without, *self.random))
        tensors = {name: t for name, t in tensors.items() if not name.startswith(apart)}
        left: list[str] = []
        with contextlib.closing(Checkpointer(folder)) as checkpointer:
            stored = checkpointer.dtypes(step)
            lacking = [name for name in stored if name.startswith("model/") and name.endswith(ADAPTERS)]
            lacking = [name.removeprefix("model/") for name in lacking if name.removeprefix("model/") not in tensors]
            lacking = [name for name in lacking if not name.startswith(apart)]
            if lacking:
                raise UserError(
                    f"{self.setting} = {self.where} was tuned with adapters ('{lacking[0]}' ...), which this model has not: it "
                    "would be the untuned one. Give the same `lora` section, or start from its merged export (convert.py to-hf)."
                )
            begin_here = {name for name in adapter_names(self.module) if f"model/{name}" not in stored}
            tensors = {name: tensor for name, tensor in tensors.items() if name not in begin_here}
            if not self.strict:
                left = [f"it holds no '{name}'." for name in tensors if f"model/{name}" not in stored]
                tensors = {name: tensor for name, tensor in tensors.items() if f"model/{name}" in stored}
                if not tensors:
                    raise UserError(f"{self.setting} = {self.where}: none of the model's parameters is there.")
            read = {}
            for name, tensor in tensors.items():  # a frozen part may have another dtype than the run that trained it
                dtype = stored.get(f"model/{name}", tensor.dtype)
                read[name] = tensor if tensor.dtype == dtype else torch.empty_like(tensor, dtype=dtype)
            checkpointer.load(step, {f"model/{name}": tensor for name, tensor in read.items()}, partial=True)
        for name, tensor in tensors.items():
            if read[name] is not tensor:
                local(tensor).copy_(local(read[name]))
        return tensors, left


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
