"""Parameter groups: patterns over names, each checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from l3m_like.core.errors import UserError, did_you_mean


def matching(patterns: str | Sequence[str], names: Iterable[str], where: str, kind: str = "parameter") -> list[str]:
    """The ``names`` that a shell-style pattern (``trunk.*.q_proj.weight``) matches; each pattern must match one.

    Raises:
        UserError: a pattern that matches nothing, with the nearest name.
    """
    names = list(names)
    found: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            raise UserError(f"{where}: the pattern '{pattern}' matches no {kind}. {did_you_mean(pattern, names)}")
        found |= dict.fromkeys(hits)
    return list(found)


def depth_factors(names: Iterable[str], decay: float) -> dict[str, float]:
    """``{name: factor on its learning rate}``, smaller the further from the output (Clark et al., arXiv:2003.10555): of L layers
    of a trunk, number i (from 0) gets ``decay^(L - i)``, what is before the trunk ``decay^(L + 1)``.

    A trunk is what has parameters ``PART.trunk.layers.i.``; before it is ``PART.noise`` and ``PART.preprocessor``. Heads keep 1.

    Raises:
        UserError: there is no such trunk.
    """
    names = list(names)
    places = {name: match for name in names if (match := re.fullmatch(r"(.*?)trunk\.layers\.(\d+)\..*", name))}
    depth: dict[str, int] = {}
    for match in places.values():
        depth[match[1]] = max(depth.get(match[1], 0), int(match[2]) + 1)
    if not depth:
        raise UserError("optim.layer_decay: no parameter is named trunk.layers.0; remove it.")
    factors = {name: decay ** (depth[match[1]] - int(match[2])) for name, match in places.items()}
    for part, layers in depth.items():
        before = (f"{part}preprocessor.", f"{part}noise.")
        factors |= {name: decay ** (layers + 1) for name in names if name.startswith(before)}
    return factors


def parameter_groups(
    parameters: Mapping[str, nn.Parameter],
    *,
    lr: float,
    weight_decay: float,
    groups: Mapping[str, Mapping[str, Any]] | None = None,
    no_decay: Sequence[str] = (),
    factors: Mapping[str, float] | None = None,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: disjoint, complete, each pattern matching something.

    Matrices decay; parameters with fewer than two dimensions (norms, biases) and those that ``no_decay`` names do not.
    A named group overrides both with its own ``lr_scale`` and ``weight_decay``. ``factors`` (muP) multiply a parameter's rate,
    and divide its decay, so that what a step takes off the weight stays. ``layer_decay`` is that of ``depth_factors``.
    """
    owner: dict[str, str] = {}
    settings: dict[str, Mapping[str, Any]] = {}
    for name, group in (groups or {}).items():
        settings[name] = group
        for hit in matching(group["params"], parameters, f"optim.groups.{name}.params"):
            if hit in owner:
                raise UserError(f"optim.groups: '{hit}' is in both '{owner[hit]}' and '{name}'; make the patterns disjoint.")
            owner[hit] = name
    exempt = set(matching(no_decay, parameters, "optim.no_decay")) if no_decay else set()
    nearer = {} if layer_decay is None else depth_factors(parameters, layer_decay)
    made: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        group = settings.get(owner.get(name, ""), {})
        decay = 0.0 if parameter.ndim < 2 or name in exempt else weight_decay
        decay = decay if group.get("weight_decay") is None else float(group["weight_decay"])
        factor = (factors or {}).get(name, 1.0)
        decay /= factor
        rate = lr * float(group.get("lr_scale") or 1.0) * factor * nearer.get(name, 1.0)
        row = made.setdefault((rate, decay), {"params": [], "names": [], "lr": rate, "peak_lr": rate, "weight_decay": decay})
        row["params"].append(parameter)
        row["names"].append(name)
    return list(made.values())
