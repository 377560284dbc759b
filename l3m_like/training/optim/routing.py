"""Which optimizer a parameter belongs to: hidden matrices to Muon, everything else to AdamW.

A layer says what is not a hidden matrix although it is a matrix, and what consists of heads, by ``optim_spec()``: a dict from a
parameter's name to ``"adamw"``, or to a number of equal parts, one below the other. Of three dimensions only a stack of as many
matrices (experts) goes to Muon, which orthogonalises each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from l3m_like.config.schema import Muon as MuonConfig
from l3m_like.core.errors import UserError
from l3m_like.core.meta_model import MetaModel
from l3m_like.training.optim.groups import matching


@dataclass(frozen=True)
class Route:
    """Where one parameter goes, and why."""

    name: str
    shape: tuple[int, ...]
    #: "muon" or "adamw"
    to: str
    why: str
    #: Muon orthogonalises so many parts of it, one below the other
    split: int = 1


def optim_specs(parts: Mapping[str, MetaModel]) -> dict[str, tuple[str | int, str]]:
    """``{parameter name: (what a layer says about it, the layer's class)}``, a layer deciding over those inside of it."""
    found: dict[str, tuple[str | int, str]] = {}
    for prefix, part in parts.items():
        names: dict[int, list[str]] = {}  # of one parameter: all that are tied
        for name, parameter in part.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        for path, module in reversed(list(part.named_modules())):
            kind = next(cls.__name__ for cls in type(module).__mro__ if not cls.__name__.startswith("FSDP"))
            own = {"weight": "adamw"} if isinstance(module, nn.Embedding) else getattr(module, "optim_spec", dict)()
            for leaf, said in own.items():
                where = f"{path}.{leaf}" if path else leaf
                parameter = _parameter(module, leaf, f"{prefix}.{path}".strip("."))
                if said != "adamw" and not (isinstance(said, int) and said > 0 and parameter.shape[0] % said == 0):
                    raise UserError(
                        f"optim_spec of {kind} says {said!r} of '{where}' {tuple(parameter.shape)}; it is 'adamw', or a number "
                        "of parts that divides its rows."
                    )
                for alias in names[id(parameter)]:
                    found[f"{prefix}.{alias}" if prefix else alias] = said, kind
    return found


def _parameter(module: nn.Module, name: str, path: str) -> nn.Parameter:
    try:
        return module.get_parameter(name)
    except AttributeError:
        raise UserError(f"optim_spec of {path} names '{name}', which is not one of its parameters.") from None


def routes(parameters: Mapping[str, nn.Parameter], parts: Mapping[str, MetaModel], settings: MuonConfig) -> list[Route]:
    """The route of every parameter.

    Raises:
        UserError: a pattern that matches nothing or both ways; a parameter for Muon that is no matrix; no matrix at all.
    """
    specs = optim_specs(parts)
    included = matching(settings.include, parameters, "optim.muon.include") if settings.include else []
    excluded = matching(settings.exclude, parameters, "optim.muon.exclude") if settings.exclude else []
    if both := sorted(set(included) & set(excluded)):
        raise UserError(f"optim.muon: '{both[0]}' is in include and in exclude; make the patterns disjoint.")
    made = []
    for name, parameter in parameters.items():
        said, kind = specs.get(name, (1, ""))
        shape = tuple(parameter.shape)
        stack = len(shape) == 3 and said == shape[0]
        if name in included and len(shape) != 2 and not stack:
            raise UserError(f"optim.muon.include: '{name}' has shape {shape}; Muon orthogonalises matrices (two dimensions).")
        if len(shape) != 2 and not stack:
            made.append(Route(name, shape, "adamw", "no matrix"))
        elif name in excluded:
            made.append(Route(name, shape, "adamw", "optim.muon.exclude"))
        elif said == "adamw" and name not in included:
            made.append(Route(name, shape, "adamw", f"says {kind}"))
        else:
            split = said if isinstance(said, int) and (settings.per_head or stack) else 1
            why = "optim.muon.include" if name in included else "hidden matrices" if stack else "hidden matrix"
            made.append(Route(name, shape, "muon", why, split))
    if not any(route.to == "muon" for route in made):
        raise UserError("optim.name: muon, but none of these parameters is a hidden matrix. Write adamw.")
    return made


def listing(made: Iterable[Route], owners: Mapping[str, int] | None = None) -> list[tuple[str, ...]]:
    """Rows for people: to, parameters (the numbers of layers as ranges), shape, how many, why, owners (ranks)."""
    owners = owners or {}
    alike: dict[tuple[str, ...], list[Route]] = {}
    for route in made:
        split = f" in {route.split} parts" if route.split > 1 else ""
        shape = " x ".join(map(str, route.shape)) + split
        alike.setdefault((route.to, re.sub(r"\.\d+(?=\.|$)", ".#", route.name), shape, route.why), []).append(route)
    rows: list[tuple[str, ...]] = []
    for (to, pattern, shape, why), some in sorted(alike.items(), key=lambda item: item[0][0] != "muon"):
        numbers = [re.findall(r"\.(\d+)(?=\.|$)", route.name) for route in some]
        name = pattern
        for column in zip(*numbers, strict=True):
            name = name.replace("#", ranges([int(number) for number in column]), 1)
        ranks = ranges([owners[route.name] for route in some]) if to == "muon" and owners else ""
        rows.append((to, name, shape, str(len(some)), why, ranks and f"rank {ranks}"))
    return rows


def ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``{0-2,5}``; one number as it is."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return text if text.isdigit() else f"{{{text}}}"
