"""Where each tensor of a model lies in a published checkpoint.

A family writes one table of *templates*, ours -> theirs::

    "trunk.layers.{i}.mixer.q_proj.{leaf}": "model.layers.{i}.self_attn.q_proj.{leaf}"

``{leaf}`` stands for ``weight`` or ``bias``, every other name in braces for a number. ``NameMap`` applies the table to the
tensors that a built model has. The result serves both directions, states and gradients, whole tensors and regions of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.core.errors import UserError, did_you_mean

#: leaves that are added to a published model, so that no published file holds them
ADAPTERS = (".lora_a", ".lora_b")

#: per dimension, the first index and the one after the last
Bounds = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Source:
    """Where tensors of ours lie in a published checkpoint. A plain string is a ``Source`` of that name.

    Args:
        name: template of the name there.
        part, parts: theirs holds ``parts`` tensors of ours one after the other (fused projections), of which ours is
            ``part``. They need not be of equal size.
        axis: of ours, along which the parts are joined (of one expert's tensor, with ``stack``).
        transpose: theirs is ours with the last two dimensions swapped.
        shape: theirs is another view of the same numbers (a convolution that is a linear layer here); ``-1`` for its
            first dimension.
        copies: templates of other names that hold the same tensor there.
        ones: theirs has so many dimensions of one more in front (a token [1, 1, D] there, [D] here); -1: one less (a scalar).
        stack: theirs is one tensor for each index of our first dimension; the name in braces that stands for the index.
        split: with ``stack``, ours holds for each index several tensors of theirs of one size, one after the other; what the name
            ``{part}`` in braces stands for, in their order.
    """

    name: str
    part: int = 0
    parts: int = 1
    axis: int = 0
    transpose: bool = False
    shape: tuple[int, ...] | None = None
    copies: tuple[str, ...] = ()
    stack: str | None = None
    ones: int = 0
    split: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.shape is not None and (self.parts > 1 or self.transpose or self.stack):
            raise UserError(f"Source('{self.name}'): shape goes with none of parts, transpose and stack.")
        if self.ones and (self.parts > 1 or self.transpose or self.stack or self.shape is not None):
            raise UserError(f"Source('{self.name}'): ones goes with none of parts, transpose, stack and shape.")
        if self.split and (self.parts > 1 or self.transpose or not self.stack):
            raise UserError(f"Source('{self.name}'): split goes with stack, and with none of parts and transpose.")
        if not 0 <= self.part < self.parts:
            raise UserError(f"Source('{self.name}'): part {self.part} of {self.parts}; parts are counted from 0.")


Templates = Mapping[str, str | Source]


@dataclass(frozen=True)
class Piece:
    """A tensor of ours (or one index of its first dimension, ``index``) and the region of a tensor of theirs that it is."""

    ours: str
    theirs: str
    #: of ours, without the dimension that is stacked
    shape: tuple[int, ...]
    source: Source
    index: int | None = None
    #: its first place along ``source.axis`` of theirs
    start: int = 0
    #: with ``split``: its first place in ours, without the dimension that is stacked
    offset: int = 0

    def region(self, bounds: Bounds) -> tuple[slice, ...]:
        """Where the part ``bounds`` of ours lies in theirs."""
        source = self.source
        if source.shape is not None:
            return (slice(*bounds[0]), *(slice(0, size) for size in source.shape[1:]))
        moved = [slice(low, high) for low, high in bounds]
        if source.ones:
            return (*[slice(0, 1)] * source.ones, *moved[max(-source.ones, 0) :])
        moved[source.axis] = slice(*(place + self.start for place in bounds[source.axis]))
        if source.transpose:
            moved[-2], moved[-1] = moved[-1], moved[-2]
        return tuple(moved)

    def turned(self, theirs: Tensor, bounds: Bounds) -> Tensor:
        """What was read of theirs (``region(bounds)``) as ours; a view where possible."""
        if self.source.shape is not None:
            return theirs.flatten(1)[:, slice(*bounds[1])]
        if self.source.ones > 0:
            return theirs.reshape([high - low for low, high in bounds])
        if self.source.ones < 0:
            return theirs.unsqueeze(0)[slice(*bounds[0])]
        return theirs.mT if self.source.transpose else theirs


class NameMap:
    """Templates applied to the tensors of one model.

    Args:
        templates: the table.
        tensors: ``{our name: tensor}`` (its shape is what counts).
        strict: every tensor must be in the table.
        alias: ``{our name: what templates may call it as well}``.

    Attributes:
        pieces: ``{our name: its pieces}``: one, or one for each index of a stack.
        theirs: ``{their name: its pieces, in their order}``; the names are in the order of the table, layer by layer.
        shapes: ``{their name: shape}``, copies too.
        copies: ``{their name: the name that it is a copy of}``.
        left: our tensors that no template names.
        tied: their names of what is one tensor with another here; a file may hold it a second time.

    Raises:
        UserError: a tensor that no template names (``strict``); a fused tensor of theirs of which only some parts are there.
    """

    def __init__(
        self,
        templates: Templates,
        tensors: Mapping[str, Tensor],
        *,
        strict: bool = True,
        alias: Mapping[str, str] | None = None,
    ) -> None:
        self.pieces: dict[str, list[Piece]] = {}
        self.theirs: dict[str, list[Piece]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.copies: dict[str, str] = {}
        self.tied: frozenset[str] = frozenset()
        rows = [_Row.of(ours, source) for ours, source in templates.items()]
        found, left = [], []
        for name in tensors:
            spoken = {name, (alias or {}).get(name, name)}
            hits = ((number, match) for number, row in enumerate(rows) for n in spoken if (match := row.pattern.fullmatch(n)))
            number, match = next(hits, (0, None))
            if match is None:
                left.append(name)
            else:
                found.append((_place(rows, number, match), name, rows[number].source, match.groupdict()))
        self.left = tuple(left)
        if left and strict:
            more = f" (and for {len(left) - 1} more)" if len(left) > 1 else ""
            raise UserError(f"the name map has no place for '{left[0]}'{more}. {did_you_mean(left[0], templates)}")
        for _, name, source, values in sorted(found, key=lambda item: item[0]):
            self._add(name, tuple(tensors[name].shape), source, values)
        for theirs, pieces in self.theirs.items():
            self._join(theirs, pieces)
        self.pieces = {name: [] for name in self.pieces}
        for pieces in self.theirs.values():
            for piece in pieces:
                self.pieces[piece.ours].append(piece)

    @classmethod
    def of(cls, templates: Templates, model: nn.Module, *, strict: bool = True, without: Sequence[str] = ()) -> NameMap:
        """Of the parameters and buffers of ``model``.

        Args:
            without: paths of parts that have weights of their own.
        """

        def inside(name: str) -> bool:
            return not name.startswith(tuple(f"{path}." for path in without)) and not name.endswith(ADAPTERS)

        parameters = {name: p for name, p in model.named_parameters() if inside(name)}
        twice = {name: p for name, p in model.named_parameters(remove_duplicate=False) if inside(name) and name not in parameters}
        tensors = parameters | {name: buffer for name, buffer in model.named_buffers() if inside(name)}
        alias = {name: _without_key(model, name) for name in tensors | twice}
        names = cls(templates, tensors, strict=strict, alias=alias)
        names.tied = frozenset(cls(templates, twice, strict=False, alias=alias).theirs)
        return names

    def _add(self, name: str, shape: tuple[int, ...], source: Source, values: Mapping[str, str]) -> None:
        self.pieces[name] = []
        for index in range(shape[0]) if source.stack else (None,):
            filled = dict(values) if index is None else {**values, str(source.stack): str(index)}
            whole = shape if index is None else shape[1:]
            for number, part in enumerate(source.split or ("",)):
                theirs = source.name.format(**filled, part=part)
                size = (whole[0] // len(source.split), *whole[1:]) if source.split else whole
                piece = Piece(name, theirs, size, source, index, offset=number * size[0] if source.split else 0)
                self.theirs.setdefault(theirs, []).append(piece)
                self.copies.update({copy.format(**filled): theirs for copy in source.copies})

    def _join(self, theirs: str, pieces: list[Piece]) -> None:
        """Put the parts of one tensor of theirs in their order, each after the one before."""
        pieces.sort(key=lambda piece: piece.source.part)
        source = pieces[0].source
        if [piece.source.part for piece in pieces] != list(range(source.parts)):
            have = ", ".join(f"'{piece.ours}'" for piece in pieces)
            raise UserError(f"the name map makes '{theirs}' of {source.parts} tensors; found are {have}.")
        whole = list(pieces[0].shape)
        whole[source.axis] = 0
        for number, piece in enumerate(pieces):
            pieces[number] = replace(piece, start=whole[source.axis])
            whole[source.axis] += piece.shape[source.axis]
        if source.transpose:
            whole[-2:] = whole[-1], whole[-2]
        if source.ones:
            whole = [*[1] * source.ones, *whole[max(-source.ones, 0) :]]
        self.shapes[theirs] = tuple(whole) if source.shape is None else (whole[0], *source.shape[1:])
        self.shapes |= {copy: self.shapes[theirs] for copy, of in self.copies.items() if of == theirs}

    def reads(self, name: str, bounds: Bounds) -> Iterator[tuple[Piece, Bounds, tuple[slice | int, ...]]]:
        """The pieces that make up the part ``bounds`` of our tensor ``name``: (piece, what is wanted of it, where that goes)."""
        pieces = self.pieces[name]
        if pieces[0].index is None:
            yield pieces[0], bounds, ()
            return
        number = len(pieces[0].source.split)
        for place, index in enumerate(range(*bounds[0])):
            if not number:
                yield pieces[index], bounds[1:], (place,)
            for piece in pieces[index * number : (index + 1) * number]:
                first, last = bounds[1]
                low, high = max(first, piece.offset), min(last, piece.offset + piece.shape[0])
                if low < high:
                    inner = [(low - piece.offset, high - piece.offset), *bounds[2:]]
                    yield piece, inner, (place, slice(low - first, high - first))


def import_state(names: NameMap, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict (views of theirs where possible). Works for gradients as well.

    Raises:
        UserError: a tensor of the map is not in ``theirs``.
    """
    ours = {}
    for name, pieces in names.pieces.items():
        found = []
        for piece in pieces:
            if piece.theirs not in theirs:
                raise UserError(f"the checkpoint has no '{piece.theirs}' (needed for '{name}').")
            bounds = [(0, size) for size in piece.shape]
            found.append(piece.turned(theirs[piece.theirs][piece.region(bounds)], bounds))
        number = len(pieces[0].source.split)
        if number:
            found = [torch.cat(found[at : at + number]) for at in range(0, len(found), number)]
        ours[name] = found[0] if pieces[0].index is None else torch.stack(found)
    return ours


def export_state(names: NameMap, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict. Works for gradients as well.

    Raises:
        UserError: a tensor of the map is not in ``ours``.
    """
    theirs = {name: export_tensor(names, name, ours) for name in names.theirs}
    return theirs | {copy: theirs[name] for copy, name in names.copies.items()}


def export_tensor(names: NameMap, theirs: str, ours: Mapping[str, Tensor]) -> Tensor:
    """One tensor of their state dict.

    Raises:
        UserError: a tensor that it is made of is not in ``ours``.
    """
    parts = []
    for piece in names.theirs[theirs]:
        if piece.ours not in ours:
            raise UserError(f"the model has no '{piece.ours}' (needed for '{theirs}').")
        part = ours[piece.ours] if piece.index is None else ours[piece.ours][piece.index]
        parts.append(part[piece.offset : piece.offset + piece.shape[0]] if piece.source.split else part)
    source = names.theirs[theirs][0].source
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=source.axis)
    if source.shape is not None or source.ones:
        return whole.reshape(names.shapes[theirs])
    return whole.mT if source.transpose else whole


@dataclass(frozen=True)
class _Row:
    """A template, ready to be compared with names."""

    pattern: re.Pattern[str]
    source: Source
    indexed: bool

    @classmethod
    def of(cls, ours: str, source: str | Source) -> _Row:
        parts = re.split(r"\{(\w+)\}", ours)  # text and names in braces by turns
        names = {name: "weight|bias" if name == "leaf" else r"\d+" for name in parts[1::2]}
        text = "".join(f"(?P<{part}>{names[part]})" if at % 2 else re.escape(part) for at, part in enumerate(parts))
        return cls(re.compile(text), Source(source) if isinstance(source, str) else source, bool(set(names) - {"leaf"}))


def _place(rows: Sequence[_Row], number: int, match: re.Match[str]) -> tuple[Any, ...]:
    """Where a tensor stands in a published file: rows of the table with an index that follow one another go layer by layer."""
    first = number
    while rows[number].indexed and first > 0 and rows[first - 1].indexed:
        first -= 1
    return (first, *(int(value) for value in match.groupdict().values() if value.isdecimal()), number)


def _without_key(model: nn.Module, name: str) -> str:
    """``preprocessor.embed.weight`` for ``preprocessor.text.embed.weight``, where ``preprocessor`` is a named dict of blocks."""
    part, _, rest = name.partition(".")
    key, _, leaf = rest.partition(".")
    return f"{part}.{leaf}" if leaf and isinstance(getattr(model, part, None), nn.ModuleDict) and key else name
