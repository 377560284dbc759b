"""Initial weights: each parameter is filled from its layer's own ``init_spec``, each rank drawing only its shard.

A draw depends on (seed, parameter name, global element index) alone, so the weights are bitwise the same on every mesh.
Everything is filled with NaN first; what is still NaN afterwards was forgotten, and is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from l3m_like.core.errors import UserError
from l3m_like.core.init import Init, Normal, Ones, Uniform, Zeros
from l3m_like.core.meta_model import Frozen, MetaModel
from l3m_like.distributed.gradients import local
from l3m_like.distributed.owners import shard_bounds


def _fan_in_uniform(module: nn.Module) -> dict[str, Init]:
    weight = module.get_parameter("weight")
    bound = 1.0 / math.sqrt(math.prod(weight.shape[1:]))  # what torch's own kaiming_uniform_(a=sqrt(5)) comes to
    return {name: Uniform(bound) for name, _ in module.named_parameters(recurse=False)}


def _ones_and_zeros(module: nn.Module) -> dict[str, Init]:
    return {name: Ones() if name == "weight" else Zeros() for name, _ in module.named_parameters(recurse=False)}


#: torch's own modules, when no layer above them says otherwise (a wrapped nn.Linear, say)
DEFAULTS: dict[type[nn.Module], Callable[[nn.Module], dict[str, Init]]] = {
    nn.Linear: _fan_in_uniform,
    nn.Conv1d: _fan_in_uniform,
    nn.Conv2d: _fan_in_uniform,
    nn.Conv3d: _fan_in_uniform,
    nn.Embedding: lambda module: {"weight": Normal(1.0)},
    nn.LayerNorm: _ones_and_zeros,
    nn.RMSNorm: _ones_and_zeros,
    nn.GroupNorm: _ones_and_zeros,
    nn.BatchNorm1d: _ones_and_zeros,
    nn.BatchNorm2d: _ones_and_zeros,
}


def init_specs(root: nn.Module) -> dict[str, Init]:
    """``{parameter name: how it is drawn}`` for every parameter, the layer nearest above it deciding, or ``draw`` of a MetaModel.

    Raises:
        UserError: a parameter that no layer's ``init_spec`` names.
    """
    specs: dict[str, Init] = {}
    for path, module in reversed(list(root.named_modules())):  # children before parents: a parent decides for its children
        declared = getattr(module, "init_spec", None)
        own = declared() if declared is not None else DEFAULTS.get(type(module), lambda _: {})(module)
        for name, spec in own.items():
            specs[f"{path}.{name}" if path else name] = spec
    for path, module in root.named_modules():
        specs |= {f"{path}.{name}" if path else name: spec for name, spec in getattr(module, "drawn", {}).items()}
    for path, module in root.named_modules():
        for leaf, ratio in getattr(module, "width_ratios", {}).items():  # set by mup.py
            name = f"{path}.{leaf}" if path else leaf
            spec = specs.get(name)
            if isinstance(spec, Normal):  # the others know their matrix's width themselves
                specs[name] = Normal(spec.std / math.sqrt(ratio))
    names = {name for name, _ in root.named_parameters(remove_duplicate=False)}
    for name in sorted(names - set(specs)):
        owner, _, leaf = name.rpartition(".")
        kind = type(root.get_submodule(owner)).__name__
        raise UserError(
            f"no layer says how '{name}' is initialised. Give {kind} a method init_spec() returning "
            f"{{'{leaf}': Normal(0.02)}} (or Zeros, Ones ... of l3m_like.core.init), or load it by init.from."
        )
    for name in specs:
        if name not in names:
            raise UserError(f"init_spec names '{name}', which is not a parameter of the model.")
    return specs


def shard_index(parameter: Tensor) -> list[Tensor]:
    """Per dimension, the global indices of this rank's part of ``parameter`` (int64 vectors)."""
    coordinate = parameter.device_mesh.get_coordinate() if isinstance(parameter, DTensor) else ()
    return [torch.arange(low, high) for low, high in shard_bounds(parameter, coordinate or ())]


@torch.no_grad()
def materialize(part: MetaModel, device: torch.device) -> None:
    """Give a meta model memory on ``device``, every number in it NaN, and tie again what is tied."""
    if any(parameter.is_meta for parameter in part.parameters()):
        part.to_empty(device=device)
        part.retie()
    for parameter in part.parameters():
        if parameter.is_floating_point():
            local(parameter).fill_(math.nan)
    for module in part.modules():
        for name, buffer in module.named_buffers(recurse=False):
            statistics = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
            fill = (statistics | getattr(module, "buffer_values", {})).get(name)
            if fill is None:
                raise UserError(
                    f"{type(module).__name__} has a buffer '{name}', which meta initialisation would leave undefined. "
                    "Compute constants in forward, hold them as parameters without gradient, or say where it starts: a class "
                    f"attribute buffer_values = {{'{name}': 0.0}}."
                )
            buffer.fill_(fill)


@torch.no_grad()
def initialize(
    part: MetaModel, seed: int, prefix: str = "", specs: dict[str, Init] | None = None, without: Container[str] = ()
) -> None:
    """Fill every parameter of ``part`` (materialised, sharded or not) from its layer's ``init_spec``.

    ``prefix`` makes the names of several parts differ; ``without``: (prefixed) names that were filled otherwise. Raises
    RuntimeError if a NaN is left.
    """
    specs = specs or init_specs(part)
    for name, parameter in part.named_parameters():
        if prefix + name in without:
            continue
        values = local(parameter)
        index = [i.to(values.device) for i in shard_index(parameter)]
        if values.numel():
            values.copy_(specs[name].draw(seed, prefix + name, index, tuple(parameter.shape)))
    left = nan_parameters(part)
    if left:
        raise RuntimeError(f"initialisation left NaN in {left[:5]}")


def nan_parameters(part: nn.Module) -> list[str]:
    """The names of parameters that hold a NaN on this rank."""
    return [name for name, p in part.named_parameters() if p.is_floating_point() and bool(local(p).isnan().any())]


def random_weights(parts: Iterable[MetaModel]) -> list[str]:
    """The frozen parts that run on random weights; an error where nobody said that this is wanted."""
    found = []
    for part in parts:
        for path, block in part.named_modules():
            if isinstance(block, Frozen) and block.loaded_from is None and any(True for _ in block.parameters()):
                if not block.random_weights:
                    raise UserError(
                        f"{path} is Frozen, but no weights were loaded into it. Give init.from, or say `random_weights: true` "
                        "to accept random ones (every report will say so)."
                    )
                found.append(path)
    return found
