"""AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l3m_like.distributed.gradients import local
from l3m_like.distributed.low_precision import copy_of, write_copies
from l3m_like.kernels.adamw import AdamWTable, Weight
from l3m_like.kernels.table import takes


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW (Loshchilov and Hutter, arXiv:1711.05101) whose state is made at construction; on CUDA float32 weights
    are stepped by a kernel of ours (``kernels/adamw.py``).

    ``step(found_inf, grad_scale)``, both device scalars: with ``found_inf`` 1.0 weights, moments and step counts stay as they
    are; gradients are divided by ``grad_scale`` inside of the kernels. What is left of the gradients is unspecified. No sync.
    """

    def __init__(self, groups: list[dict[str, Any]], *, betas: Sequence[float], eps: float) -> None:
        super().__init__(groups, betas=(betas[0], betas[1]), eps=eps, fused=True)
        #: per group, of weights with copies of a dtype or none: the parameters and their table
        self._tables: dict[int, list[tuple[list[Tensor], AdamWTable]]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                device = local(parameter).device
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }

    def step(self, found_inf: Tensor | None = None, grad_scale: Tensor | None = None) -> None:  # type: ignore[override]
        if grad_scale is not None and grad_scale.dtype == torch.float64:
            # the kernel takes a float32, which would round what float64 runs are for; they may take the pass over the gradients
            grads = [local(p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_div_(grads, grad_scale)
            grad_scale = None
        for number, group in enumerate(self.param_groups):
            for parameters, table in self._tables_of(number):
                self._step_table(group, parameters, table, found_inf, grad_scale)
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.dtype != parameter.dtype:
                    parameter.grad = parameter.grad.to(parameter.dtype)
        self.found_inf, self.grad_scale = found_inf, grad_scale
        left = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        super().step()
        write_copies(left)  # torch's fused kernel does not move version counters

    def _tables_of(self, number: int) -> list[tuple[list[Tensor], AdamWTable]]:
        """What our kernel takes of a group. Made at the first step: copies are made in the first forward pass."""
        known = self._tables.get(number)
        if known is None or any(table.moved([local(p) for p in some]) for some, table in known):
            alike: dict[tuple[torch.dtype | None, bool], list[Tensor]] = {}
            for parameter in self.param_groups[number]["params"]:
                if takes(local(parameter)) and local(parameter).numel():
                    copy = copy_of(parameter)
                    kind = None if copy is None else copy.dtype, local(parameter).numel() % 16 == 0
                    alike.setdefault(kind, []).append(parameter)
            self._tables[number] = [(some, AdamWTable([self._weight(p) for p in some])) for some in alike.values()]
        return self._tables[number]

    def _weight(self, parameter: Tensor) -> Weight:
        state = self.state[parameter]
        moments = local(state["exp_avg"]), local(state["exp_avg_sq"])
        return Weight(local(parameter.detach()), *moments, state["step"], copy_of(parameter))

    @torch.no_grad()
    def _step_table(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        table: AdamWTable,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
    ) -> None:
        """Step what our kernel takes, and drop its gradients, so that torch passes it over."""
        settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        grads = [None if p.grad is None else local(p.grad) for p in parameters]
        for dtype in {grad.dtype for grad in grads if grad is not None}:
            some = [grad if grad is not None and grad.dtype == dtype else None for grad in grads]
            table.step(some, found_inf=found_inf, grad_scale=grad_scale, **settings)
        for parameter in parameters:
            parameter.grad = None

    def set_lr_scale(self, scale: float) -> None:
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * scale

    def named_state(self) -> dict[str, Tensor]:
        """``{parameter name.state name: tensor}`` for checkpoints; the tensors themselves, not copies."""
        return {
            f"{name}.{key}": value
            for group in self.param_groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
            for key, value in self.state[parameter].items()
        }
