"""Optimizers with checked parameter groups. State exists from construction, under the same names from step 0."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.distributed.gradients import local


def matching(patterns: str | Sequence[str], names: Iterable[str], where: str) -> list[str]:
    """The ``names`` that a shell-style pattern (``trunk.*.q_proj.weight``) matches; each pattern must match one.

    Raises:
        UserError: a pattern that matches nothing, with the nearest name.
    """
    names = list(names)
    found: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            raise UserError(f"{where}: the pattern '{pattern}' matches no parameter. {did_you_mean(pattern, names)}")
        found |= dict.fromkeys(hits)
    return list(found)


def parameter_groups(
    parameters: Mapping[str, nn.Parameter],
    *,
    lr: float,
    weight_decay: float,
    groups: Mapping[str, Mapping[str, Any]] | None = None,
    no_decay: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: disjoint, complete, each pattern matching something.

    Matrices decay; parameters with fewer than two dimensions (norms, biases) and those that ``no_decay`` names do not.
    A named group overrides both with its own ``lr_scale`` and ``weight_decay``.
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
    made: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        group = settings.get(owner.get(name, ""), {})
        decay = 0.0 if parameter.ndim < 2 or name in exempt else weight_decay
        decay = decay if group.get("weight_decay") is None else float(group["weight_decay"])
        rate = lr * float(group.get("lr_scale") or 1.0)
        row = made.setdefault((rate, decay), {"params": [], "names": [], "lr": rate, "peak_lr": rate, "weight_decay": decay})
        row["params"].append(parameter)
        row["names"].append(name)
    return list(made.values())


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW (Loshchilov and Hutter, arXiv:1711.05101) whose state is made at construction.

    ``step(found_inf)``: with a device scalar of 1.0, weights, moments and step counts stay as they are, without a host sync.
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

    def step(self, found_inf: Tensor | None = None) -> None:  # type: ignore[override]
        self.found_inf = found_inf
        super().step()

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


class EMA:
    """An exponential moving average of the trainable parameters in fp32 (or wider): ``e += (1 - decay) (p - e)``.

    In bf16 a decay of 0.9999 would not move at all. Sharded like the parameters.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.parameters = dict(parameters)
        self.average = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for name, p in self.parameters.items()
        }

    @torch.no_grad()
    def update(self, skipped: Tensor | None = None) -> None:
        """Move towards the parameters; by nothing where the device scalar ``skipped`` is 1."""
        for name, average in self.average.items():
            target = local(self.parameters[name]).to(average.dtype)
            weight = torch.full((), 1.0 - self.decay, dtype=average.dtype, device=target.device)
            local(average).lerp_(target, weight if skipped is None else weight * (1.0 - skipped.to(average.dtype)))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange parameters and averages in place; call again to undo."""
        for name, average in self.average.items():
            ours, theirs = local(average), local(self.parameters[name])
            held = theirs.clone()
            theirs.copy_(ours)
            ours.copy_(held)


class Guard:
    """Is this step's gradient norm fit to be used? Decided on the device, from a number that all ranks share.

    A step is bad if its norm is not finite, or if it exceeds ``spike`` times the median of the last ``window`` good norms.
    """

    def __init__(self, device: torch.device, *, spike: float | None, window: int) -> None:
        self.spike = spike
        self.norms = torch.zeros(window, dtype=torch.float64, device=device)
        self.good = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def bad(self, norm: Tensor) -> Tensor:
        """1.0 if the step must be skipped, else 0.0 (fp32 device scalar)."""
        window = self.norms.numel()
        norm = norm.detach().double()
        bad = ~torch.isfinite(norm)
        if self.spike is not None:
            bad = bad | ((self.good >= window) & (norm > self.spike * self.norms.median()))
        slot = (self.good % window).view(1)
        self.norms.index_copy_(0, slot, torch.where(bad, self.norms[slot], norm.view(1)))
        self.good += (~bad).long()
        return bad.float()

    def named_state(self) -> dict[str, Tensor]:
        return {"norms": self.norms, "good": self.good}
