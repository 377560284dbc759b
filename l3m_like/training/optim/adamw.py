"""AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l3m_like.distributed.gradients import local
from l3m_like.distributed.low_precision import copy_of
from l3m_like.kernels.adamw import adamw, takes


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW (Loshchilov and Hutter, arXiv:1711.05101) whose state is made at construction.

    ``step(found_inf, grad_scale)``, both device scalars: with ``found_inf`` 1.0 weights, moments and counts stay as they are;
    gradients are divided by ``grad_scale`` inside of the kernel (and left so). No host sync.
    """

    def __init__(self, groups: list[dict[str, Any]], *, betas: Sequence[float], eps: float) -> None:
        super().__init__(groups, betas=(betas[0], betas[1]), eps=eps, fused=True)
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
        self._step_large(found_inf, grad_scale)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.dtype != parameter.dtype:
                    parameter.grad = parameter.grad.to(parameter.dtype)
        self.found_inf, self.grad_scale = found_inf, grad_scale
        super().step()

    @torch.no_grad()
    def _step_large(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        """Step what our kernel takes, and drop its gradients, so that torch passes it over."""
        counts = []
        for group in self.param_groups:
            settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            for parameter in group["params"]:
                if parameter.grad is None or not takes(local(parameter)):
                    continue
                state = self.state[parameter]
                adamw(
                    local(parameter),
                    local(parameter.grad),
                    local(state["exp_avg"]),
                    local(state["exp_avg_sq"]),
                    state["step"],
                    found_inf=found_inf,
                    grad_scale=grad_scale,
                    copy=copy_of(parameter),
                    **settings,
                )
                counts.append(state["step"])
                parameter.grad = None
        if counts:
            torch._foreach_add_(counts, 1.0 if found_inf is None else 1.0 - found_inf)

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
