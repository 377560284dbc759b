"""Averaged weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from l3m_like.distributed.gradients import local
from l3m_like.kernels.ema import EMATable, ema_reference
from l3m_like.kernels.table import takes


class EMA:
    """An exponential moving average of the trainable parameters in fp32 (or wider): ``e += (1 - decay) (p - e)``.

    In bf16 a decay of 0.9999 would not move at all. Sharded like the parameters.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.parameters = dict(parameters)
        #: filled in place only: the kernel knows where they are
        self.average = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for name, p in self.parameters.items()
        }
        #: of what the kernel takes: the names, and their table
        self._tables: list[tuple[list[str], EMATable]] = []

    @torch.no_grad()
    def update(self, skipped: Tensor | None = None) -> None:
        """Move towards the parameters; by nothing where the device scalar ``skipped`` is 1."""
        weights = {name: local(parameter) for name, parameter in self.parameters.items()}
        for _, table in self._tables_of(weights):
            table.update(self.decay, skipped)
        taken = {name for names, _ in self._tables for name in names}
        left = [name for name in weights if name not in taken]
        ema_reference([local(self.average[name]) for name in left], [weights[name] for name in left], self.decay, skipped)

    def _tables_of(self, weights: Mapping[str, Tensor]) -> list[tuple[list[str], EMATable]]:
        if not self._tables or any(table.moved([weights[name] for name in names]) for names, table in self._tables):
            alike: dict[bool, list[str]] = {}
            for name, weight in weights.items():
                if takes(weight) and weight.numel():
                    alike.setdefault(weight.numel() % 16 == 0, []).append(name)
            self._tables = [
                (names, EMATable([local(self.average[name]) for name in names], [weights[name] for name in names]))
                for names in alike.values()
            ]
        return self._tables

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange parameters and averages in place; call again to undo."""
        for name, average in self.average.items():
            ours, theirs = local(average), local(self.parameters[name])
            held = theirs.clone()
            theirs.copy_(ours)
            ours.copy_(held)
