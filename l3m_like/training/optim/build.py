"""The optimizer that a file's `optim` section describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from l3m_like.config.schema import Optim
from l3m_like.core.meta_model import MetaModel
from l3m_like.distributed.mesh import Mesh
from l3m_like.training.optim.adamw import AdamW
from l3m_like.training.optim.groups import parameter_groups
from l3m_like.training.optim.muon import Muon
from l3m_like.training.optim.routing import Route, listing, routes
from l3m_like.training.optim.width import muon_factor, width_ratios


class Optimizer(Protocol):
    """What an update needs of an optimizer."""

    def step(self, found_inf: Tensor, grad_scale: Tensor | None = None) -> None:
        """Step with gradients divided by ``grad_scale``; where ``found_inf`` is 1, change nothing."""

    def set_lr_scale(self, scale: float) -> None:
        """The learning rates are ``scale`` times their peaks."""

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def named_state(self) -> dict[str, Tensor]:
        """``{parameter name.state name: tensor}`` for checkpoints; the tensors themselves, not copies."""


class Pair:
    """Two optimizers that step together."""

    def __init__(self, first: Optimizer, second: Optimizer) -> None:
        self.both = first, second

    def step(self, found_inf: Tensor, grad_scale: Tensor | None = None) -> None:
        for optimizer in self.both:
            optimizer.step(found_inf, grad_scale)

    def set_lr_scale(self, scale: float) -> None:
        for optimizer in self.both:
            optimizer.set_lr_scale(scale)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.both:
            optimizer.zero_grad(set_to_none)

    def named_state(self) -> dict[str, Tensor]:
        return self.both[0].named_state() | self.both[1].named_state()


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], parts: Mapping[str, MetaModel], optim: Optim, mesh: Mesh, precision: str
) -> Optimizer:
    """The optimizer of ``parameters`` (sharded, with memory), with its state; ``parts`` hold the layers that they are of."""
    ratios = width_ratios(parts)
    if optim.muon is None:
        factors = {name: 1 / ratio for name, ratio in ratios.items()}
        return AdamW(groups_of(parameters, optim, optim.lr, factors), betas=optim.betas, eps=optim.eps)
    made = routes(parameters, parts, optim.muon)
    groups, rest = muon_groups(parameters, made, optim, ratios)
    splits = {route.name: route.split for route in made}
    muon = Muon(groups, splits, optim.muon, mesh, muon_dtype(groups, mesh.device, precision))
    if mesh.is_main:
        print(describe(made, muon.owners if mesh.world_size > 1 else None), flush=True)
    return Pair(muon, AdamW(rest, betas=optim.betas, eps=optim.eps)) if rest else muon


def groups_of(
    parameters: Mapping[str, nn.Parameter], optim: Optim, lr: float, factors: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """The groups of all of ``parameters`` at the peak rate ``lr``, times ``factors`` by name."""
    return parameter_groups(
        parameters,
        lr=lr,
        weight_decay=optim.weight_decay,
        groups=optim.groups,
        no_decay=optim.no_decay or (),
        factors=factors,
        layer_decay=optim.layer_decay,
    )


def muon_groups(
    parameters: Mapping[str, nn.Parameter], made: list[Route], optim: Optim, ratios: Mapping[str, float] | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The groups of Muon and those of AdamW; ``ratios`` of widths as ``width_ratios`` has them."""
    assert optim.muon is not None
    ratios = ratios or {}
    factors = {name: muon_factor(ratio, optim.muon.scale) for name, ratio in ratios.items()}
    adamw_lr = optim.lr if optim.muon.adamw_lr is None else optim.muon.adamw_lr
    chosen = {route.name for route in made if route.to == "muon"}
    rest = groups_of(parameters, optim, adamw_lr, {name: 1 / ratio for name, ratio in ratios.items()})
    halves = groups_of(parameters, optim, optim.lr, factors), rest
    return _only(halves[0], chosen), _only(halves[1], set(parameters) - chosen)


def _only(groups: list[dict[str, Any]], names: set[str]) -> list[dict[str, Any]]:
    kept = []
    for group in groups:
        some = [(name, p) for name, p in zip(group["names"], group["params"], strict=True) if name in names]
        if some:
            kept.append(group | {"names": [name for name, _ in some], "params": [p for _, p in some]})
    return kept


def muon_dtype(groups: list[dict[str, Any]], device: torch.device, precision: str) -> torch.dtype:
    """In which updates travel and are orthogonalised: bfloat16 where an accelerator computes in it, else as the weights."""
    if device.type == "cuda" and precision == "bf16":
        return torch.bfloat16
    return groups[0]["params"][0].dtype


def describe(made: list[Route], owners: Mapping[str, int] | None = None) -> str:
    """Every parameter's optimizer, one line for those alike."""
    rows = listing(made, owners)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
