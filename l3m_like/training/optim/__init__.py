"""Optimizers with checked parameter groups. State exists from construction, under the same names from step 0."""

from l3m_like.training.optim.adamw import AdamW
from l3m_like.training.optim.build import Optimizer, build_optimizer, groups_of, muon_groups
from l3m_like.training.optim.ema import EMA
from l3m_like.training.optim.groups import matching, parameter_groups
from l3m_like.training.optim.guard import Guard
from l3m_like.training.optim.muon import Muon
from l3m_like.training.optim.routing import Route, listing, routes

__all__ = [
    "EMA",
    "AdamW",
    "Guard",
    "Muon",
    "Optimizer",
    "Route",
    "build_optimizer",
    "groups_of",
    "listing",
    "matching",
    "muon_groups",
    "parameter_groups",
    "routes",
]
