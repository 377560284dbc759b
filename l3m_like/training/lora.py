"""Adapters on a built model: which layers get one, what is trained, and that none of them is bypassed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from l3m_like.config.run_config import RunConfig
from l3m_like.config.schema import Lora
from l3m_like.core.errors import UserError
from l3m_like.core.meta_model import Frozen
from l3m_like.distributed.gradients import local
from l3m_like.layers.lora import LoRALinear
from l3m_like.pretrained.families import family, family_of
from l3m_like.pretrained.lora import import_peft, layer_paths
from l3m_like.pretrained.name_map import NameMap
from l3m_like.pretrained.wrapped import wrapped_family
from l3m_like.training.init import shard_index
from l3m_like.training.optim.groups import matching


def add_adapters(model: nn.Module, settings: Lora) -> None:
    """Put an adapter beside each linear layer that ``settings.layers`` names, in place, before sharding; freeze all that is
    neither an adapter nor in ``settings.train``. No parameter changes its name.

    Raises:
        UserError: a pattern that matches no linear layer or no parameter.
    """
    frozen = {id(inner) for part in model.modules() if isinstance(part, Frozen) for inner in part.modules()}
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) not in frozen}
    chosen = matching(settings.layers, linear, "lora.layers", kind="linear layer")
    model.requires_grad_(False)
    for name in chosen:
        owner, _, leaf = name.rpartition(".")
        adapter = LoRALinear(
            linear[name],
            rank=settings.rank,
            alpha=settings.alpha,
            rank_stabilized=settings.rank_stabilized,
            dropout=settings.dropout,
        )
        setattr(model.get_submodule(owner), leaf, adapter)
    if settings.train:
        parameters = dict(model.named_parameters())
        for name in matching(settings.train, parameters, "lora.train"):
            parameters[name].requires_grad_(True)


@torch.no_grad()
def load_adapters(model: nn.Module, settings: Lora | None, named: str | None = None) -> None:
    """Fill the adapters of ``model`` (materialised, sharded or not) from the PEFT folder that ``settings`` name, if they do.

    ``named``: the name map of the base (``init.family``).

    Raises:
        UserError: other adapters than those of the model.
    """
    if settings is None or settings.from_ is None:
        return
    of = family(named) if named else wrapped_family(model) or family_of(model)
    names = NameMap.of(of.templates(model), model, strict=False)
    state, theirs = import_peft(settings.from_, layer_paths(names))
    for name in ("rank", "alpha", "rank_stabilized"):
        if theirs[name] != getattr(settings, name):
            raise UserError(f"lora.{name} = {getattr(settings, name)}, but the adapters in {settings.from_} have {theirs[name]}.")
    if other := sorted(set(state) ^ adapter_names(model)):
        where = "the model" if other[0] in state else settings.from_
        raise UserError(f"lora.from: {where} has no '{other[0]}'; lora.layers must name the layers that have adapters there.")
    for name, parameter in model.named_parameters():
        if name in state:
            index = shard_index(parameter)
            whole = state[name][torch.meshgrid(*index, indexing="ij")] if index[0].numel() else state[name][:0]
            local(parameter).copy_(whole.view_as(local(parameter)))


def refuse_random_base(cfg: RunConfig) -> None:
    """Adapters are trained beside weights that are worth keeping."""
    loaded = cfg.checkpoint.resume not in ("auto", "never") or (cfg.init is not None and cfg.init.from_ is not None)
    if cfg.lora is not None and not loaded and not cfg.lora.random_weights:
        raise UserError("lora: nothing is loaded into the model that it freezes. Give init.from, or say `random_weights: true`.")


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """``{path: layer with an adapter}``."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapter_names(model: nn.Module) -> set[str]:
    """The names of the adapters' own parameters."""
    return {f"{path}.{leaf}" for path in adapters(model) for leaf in ("lora_a", "lora_b")}


@contextmanager
def none_bypassed(model: nn.Module) -> Iterator[None]:
    """Around a forward pass of the whole model: every layer with an adapter must be called in it.

    Raises:
        UserError: a layer whose matrix is read directly, so that its adapter would change nothing.
    """
    waiting = {id(layer): path for path, layer in adapters(model).items()}

    def called(layer: nn.Module, args: Any) -> None:
        waiting.pop(id(layer), None)

    hooks = [layer.register_forward_pre_hook(called) for layer in adapters(model).values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if waiting:
        path = next(iter(waiting.values()))
        raise UserError(
            f"lora.layers: nothing calls '{path}'; its matrix is read directly (as vocabulary matrices are), so an adapter "
            "would change nothing. Leave it out, or train it whole by lora.train."
        )
