"""Weights of a Hugging Face folder, straight into a materialised, sharded model: each rank reads what its shards need."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.meta_model import Frozen, Tower
from l3m_like.distributed.gradients import local
from l3m_like.distributed.owners import shard_bounds
from l3m_like.pretrained.families import Family
from l3m_like.pretrained.folder import Folder, StateFile
from l3m_like.pretrained.name_map import Bounds, NameMap

#: elements that are read at a time: what a rank holds besides the model
BLOCK = 1 << 24
#: how many differences an error names
SHOWN = 6


class Fit:
    """What of a folder goes into a model.

    Attributes:
        loaded: our names of what does.
        left: what does not, in words.
    """

    def __init__(self, folder: Folder, names: NameMap, loaded: Sequence[str], left: Sequence[str]) -> None:
        self.folder = folder
        self.names = names
        self.loaded = list(loaded)
        self.left = list(left)

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        """Read this rank's shards of ``model``'s parameters and buffers, a block at a time, cast to their dtype."""
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        for name in self.loaded:
            self._fill(name, tensors[name])

    def _fill(self, name: str, tensor: Tensor) -> None:
        here = local(tensor)
        coordinate = tensor.device_mesh.get_coordinate() if isinstance(tensor, DTensor) else ()
        bounds = shard_bounds(tensor, coordinate or ())
        first = bounds[0][0]
        for low, high in _blocks(bounds):
            into = here[low - first : high - first]
            for piece, inner, place in self.names.reads(name, [(low, high), *bounds[1:]]):
                into[place].copy_(piece.turned(self.folder.read(piece.theirs, piece.region(inner)), inner))


def fit(
    model: nn.Module,
    folder: Folder,
    family: Family,
    setting: str,
    *,
    strict: bool,
    without: Sequence[str] = (),
    random: Sequence[str] = (),
) -> Fit:
    """Compare ``model`` (on any device, meta too) with a folder: sizes with ``config.json``, tensors with the files' headers.

    Args:
        setting: what named the folder, for messages.
        strict: every difference is an error.
        without: paths of parts that have weights of their own.
        random: paths of what keeps its random weights, whatever the folder holds for it.

    Raises:
        UserError: a difference (``strict``), or nothing fits.
    """
    folder.respell(family.spellings)
    wrong = _config_differences(model, folder, family, random)
    if wrong and strict:
        raise UserError(f"{setting} = {folder.path}: its config.json and the model differ:{listed(wrong)}")
    names = NameMap.of(family.templates(model), model, strict=False, without=without)
    anew = tuple(f"{path}." for path in random)
    left = [name for name in names.left if not name.startswith(anew)]
    wrong_tensors = [f"'{name}' has no place in the name map of {family.model_type}{_own(model, name)}." for name in left]
    here = []
    for name, pieces in names.pieces.items():
        if name.startswith(anew):
            continue
        missing = [piece.theirs for piece in pieces if piece.theirs not in folder.tensors]
        shapes = {t: folder.tensors[t].shape for p in pieces if (t := p.theirs) in folder.tensors}
        other = [t for t, shape in shapes.items() if shape != names.shapes[t]]
        if missing:
            near = did_you_mean(missing[0], set(folder.tensors) - set(names.shapes)) if len(wrong_tensors) < SHOWN else ""
            wrong_tensors.append(f"it holds no '{missing[0]}', needed for '{name}'. {near}")
        elif other:
            shape = f"{list(shapes[other[0]])} there and {list(names.shapes[other[0]])} here"
            wrong_tensors.append(f"'{other[0]}', needed for '{name}', is {shape}.")
        else:
            here.append(name)
    constants = family.constants(model)
    wrong_tensors += _other_constants(folder, constants)
    known = set(names.shapes) | names.tied | set(constants)
    unexpected = [name for name in folder.tensors if name not in known and not family.ignores(name)]
    for name in unexpected:
        near = did_you_mean(name, names.shapes) if len(wrong_tensors) < SHOWN else ""
        wrong_tensors.append(f"it holds '{name}', for which the model has no place. {near}")
    if strict and wrong_tensors:
        raise UserError(
            f"{setting} = {folder.path} does not fit the model (init.random names parts that begin anew; "
            f"init.strict: false takes what fits):{listed(wrong_tensors)}"
        )
    if not here:
        raise UserError(f"{setting} = {folder.path}: none of the model's parameters is there.{listed(wrong_tensors)}")
    return Fit(folder, names, here, [*wrong, *wrong_tensors])


def _blocks(bounds: Bounds) -> Iterator[tuple[int, int]]:
    """The rows of a shard in blocks of at most ``BLOCK`` elements, or one row."""
    (low, high), *others = bounds
    row = 1
    for first, last in others:
        row *= last - first
    if row and high > low:
        yield from itertools.pairwise([*range(low, high, max(1, BLOCK // row)), high])


def _other_constants(folder: Folder, constants: Mapping[str, Tensor]) -> list[str]:
    """Which of the folder's tensors are not what is computed here in their place."""
    lines = []
    for name, value in constants.items():
        if name not in folder.tensors:
            continue
        stored = folder.tensors[name]
        if stored.shape != tuple(value.shape):
            lines.append(f"'{name}', which is computed here, is {list(stored.shape)} there and {list(value.shape)} here.")
            continue
        there = folder.read(name, tuple(slice(0, size) for size in stored.shape)).to(value.dtype)
        furthest = float((there - value).abs().max())
        if not furthest <= max(1e-4, 4 * torch.finfo(stored.dtype).eps):  # they were computed in fp32, some stored in bf16
            lines.append(f"'{name}', which is computed here, is another there: numbers differ by up to {furthest:.3g}.")
    return lines


def _config_differences(model: nn.Module, folder: Folder, family: Family, random: Sequence[str]) -> list[str]:
    """What ``config.json`` and the model say differently, and the knob that changes it."""
    if folder.model_type not in (family.model_type, *family.reads):
        return [f"model_type is {folder.model_type} there, but the family is {family.model_type}."]
    try:
        ours = _flat(family.describe(model))
    except UserError as error:
        return [f"model_type is {family.model_type} there, but the model is another: {error}"]
    theirs = _flat(family.normal(folder.config))
    lines = _other_colours(family.colours(model), folder.colours)
    if isinstance(folder, StateFile) and not theirs:
        return []  # it says nothing but its tensors
    anew = {field for field, block in family.sized_by.items() if f"{block}.".startswith(tuple(f"{path}." for path in random))}
    skipped = {*family.free, *anew}
    ours, theirs = (
        {name: value for name, value in fields.items() if skipped.isdisjoint((name, name.partition(".")[0]))}
        for fields in (ours, theirs)
    )
    for name, value in ours.items():
        if name not in theirs or theirs[name] != value:
            lines.append(f"{name} is {theirs.get(name, 'absent')} there and {value} here{_fix(family, name, theirs.get(name))}.")
    nested = {name.partition(".")[0] for name in ours if "." in name}
    for name, value in theirs.items():
        if name not in ours and name.partition(".")[0] in nested:
            lines.append(f"{name} is {value} there and absent here{_fix(family, name)}.")
    return lines


def same_colours(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> bool:
    """Whether two pairs of mean and deviation are the same, but for how many digits are written."""
    pairs = list(zip(ours, theirs, strict=True))
    return all(len(a) == len(b) and all(abs(x - y) < 1e-4 for x, y in zip(a, b, strict=True)) for a, b in pairs)


def _other_colours(
    ours: tuple[list[float], list[float]] | None, theirs: tuple[list[float], list[float]] | None
) -> list[str]:
    if ours is None or theirs is None or len(ours[0]) != len(theirs[0]) or same_colours(ours, theirs):
        return []
    plain = same_colours(theirs, ([0.5] * len(ours[0]),) * 2)
    fix = "null" if plain else f"{{_target_: l3m_like.layers.Colours, mean: {theirs[0]}, std: {theirs[1]}}}"
    there = f"images have the mean {theirs[0]} and deviation {theirs[1]} there"
    return [f"{there}, {ours[0]} and {ours[1]} here; set colours: {fix}."]


def _fix(family: Family, name: str, value: Any = None) -> str:
    """The knob of a field, and for a number the value to give it."""
    knob = family.knobs.get(name) or family.knobs.get(name.partition(".")[0])
    if knob is None:
        return ""
    return f"; set {knob}: {value}" if type(value) in (int, float) else f" (knob: {knob})"


def _own(model: nn.Module, name: str) -> str:
    """A hint for a parameter of a frozen part or a tower."""
    inside = (
        path for path, module in model.named_modules() if isinstance(module, (Frozen, Tower)) and name.startswith(f"{path}.")
    )
    return next((f" (if {path} has weights of its own, name them in init.parts)" for path in inside), "")


def _flat(fields: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return flat


def listed(lines: Sequence[str]) -> str:
    """The first ``SHOWN`` lines, each on one of its own, and how many more there are."""
    more = f"\n  ... and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return "".join(f"\n  {line}" for line in lines[:SHOWN]) + more
