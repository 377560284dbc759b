"""A name map says where each of our tensors lies in another library's state dict. One map serves import and export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from l3m_like.core.errors import UserError


@dataclass(frozen=True)
class Source:
    """Where one of our tensors lies in a published checkpoint.

    Args:
        name: of the tensor there.
        part, parts: ours is block ``part`` of ``parts`` equal blocks of rows of it (fused projections).
        shape: its shape there, if it is another view of the same numbers (a convolution that is a linear layer here).
        copies: other names that hold the same tensor there.
    """

    name: str
    part: int = 0
    parts: int = 1
    shape: tuple[int, ...] | None = None
    copies: tuple[str, ...] = ()


NameMap = Mapping[str, Source]


def import_state(names: NameMap, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict (views of theirs where possible).

    Raises:
        UserError: a tensor of the map is not in ``theirs``.
    """
    ours = {}
    for name, source in names.items():
        if source.name not in theirs:
            raise UserError(f"the checkpoint has no '{source.name}' (needed for '{name}').")
        tensor = theirs[source.name].chunk(source.parts)[source.part]
        ours[name] = tensor if source.shape is None else tensor.flatten(1)
    return ours


def export_state(names: NameMap, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict. Works for gradients as well.

    Raises:
        UserError: a tensor of the map is not in ``ours``.
    """
    parts: dict[str, dict[int, Tensor]] = {}
    theirs: dict[str, Tensor] = {}
    for name, source in names.items():
        if name not in ours:
            raise UserError(f"the model has no '{name}' (needed for '{source.name}').")
        tensor = ours[name] if source.shape is None else ours[name].reshape(source.shape)
        found = parts.setdefault(source.name, {})
        found[source.part] = tensor
        if len(found) == source.parts:
            whole = found[0] if source.parts == 1 else torch.cat([found[i] for i in range(source.parts)])
            theirs |= dict.fromkeys((source.name, *source.copies), whole)
    return theirs
