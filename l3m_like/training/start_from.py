"""Starting weights from another run's checkpoint, straight into the sharded model."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from l3m_like.core.errors import UserError
from l3m_like.core.meta_model import Frozen
from l3m_like.training.checkpoint import Checkpointer
from l3m_like.training.lora import adapter_names


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
    with contextlib.closing(Checkpointer(folder)) as checkpointer:
        step = checkpointer.latest()
    if step is None:
        raise UserError(f"{setting} = {where}: there is no whole checkpoint in {folder}.")
    return folder, step


def load_weights(model: nn.Module, where: str, *, strict: bool) -> None:
    """Fill the (materialised, sharded) parameters and buffers of ``model`` from a checkpoint of another run, on any mesh.

    Args:
        where: a run's directory, or one of its checkpoint folders.
        strict: every parameter must be there, but adapters that begin here; otherwise those that are not there keep the values
            that they have.
    """
    folder, step = find_checkpoint(where, "init.from")
    tensors: dict[str, Tensor] = {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    tensors |= {f"model/{name}": buffer for name, buffer in model.named_buffers()}
    with contextlib.closing(Checkpointer(folder)) as checkpointer:
        if strict and (added := adapter_names(model)):
            stored = checkpointer.names(step)
            tensors = {name: t for name, t in tensors.items() if name in stored or name.removeprefix("model/") not in added}
        if not strict:
            stored = checkpointer.names(step)
            tensors = {name: tensor for name, tensor in tensors.items() if name in stored}
            if not tensors:
                raise UserError(f"init.from = {where}: none of the model's parameters is there.")
        checkpointer.load(step, tensors, partial=True)
    for path, part in frozen_parts(model).items():
        if all(f"model/{path}.{name}" in tensors for name, _ in part.named_parameters()):
            part.loaded_from = where


def frozen_parts(model: nn.Module) -> dict[str, Frozen]:
    """``{path: frozen part}``."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Frozen)}


def restore_sources(model: nn.Module, sources: Mapping[str, str | None]) -> None:
    """Say of a resumed run's frozen parts where their weights once came from, as its checkpoint does."""
    for path, part in frozen_parts(model).items():
        part.loaded_from = sources.get(path)
