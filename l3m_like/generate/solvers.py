"""Solvers of ordinary differential equations dx/dt = velocity(x, t) for a batch of independent rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.distributed.mesh import Mesh

#: velocity(x, t) of x [B, ...] at times t [B] float64
Velocity = Callable[[Tensor, Tensor], Tensor]


def euler(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """``x`` at the last of ``times`` from ``x`` at the first: x += dt v(x, t)."""
    for t, following in zip(times, times[1:], strict=False):
        x = x + (following - t) * velocity(x, _times(t, x))
    return x


def heun(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """As ``euler``, with the mean of the velocities at both ends of the step."""
    for t, following in zip(times, times[1:], strict=False):
        first = velocity(x, _times(t, x))
        second = velocity(x + (following - t) * first, _times(following, x))
        x = x + (following - t) / 2 * (first + second)
    return x


SOLVERS: dict[str, Callable[[Velocity, Tensor, Sequence[float]], Tensor]] = {"euler": euler, "heun": heun}

#: Dormand and Prince, "A family of embedded Runge-Kutta formulae" (1980): times and weights of the stages. The last stage is
#: the first of the next step.
_TIMES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
#: the solution of order 5 less that of order 4
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def dopri5(
    velocity: Velocity, x: Tensor, start: float, end: float, *, steps: int, atol: float, rtol: float, mesh: Mesh | None = None
) -> Tensor:
    """``x`` [B, ...] at ``end`` from ``x`` at ``start`` < end, by steps that every row chooses for itself.

    The first that is tried is (end - start) / ``steps`` long. A step is taken where the root mean square over a row of
    ``error / (atol + rtol max(|x|, |x'|))`` is at most 1. So a row's result does not depend on the rows beside it. All ranks of
    ``mesh`` evaluate equally often.

    Raises:
        UserError: a step so small that the time does not move: the tolerances are out of reach, or the velocity not finite.
    """
    t = _times(start, x)
    size = torch.full_like(t, (end - start) / steps)
    first = velocity(x, t)
    while True:
        size = torch.minimum(size, end - t)  # a row that has arrived makes steps of 0
        h = size.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        slopes = [first]
        for place, weights in zip(_TIMES[1:], _STAGES[1:], strict=True):
            moved = x + h * _combined(weights, slopes)
            slopes.append(velocity(moved, t + place * size))
        scale = atol + rtol * torch.maximum(x.abs(), moved.abs())
        error = (h * _combined(_ERROR, slopes) / scale).double().square().flatten(1).mean(1).sqrt()
        accepted = error <= 1
        arrived = accepted & (size >= end - t)
        t = torch.where(arrived, end, torch.where(accepted, t + size, t))
        where = accepted.view_as(h)
        x, first = torch.where(where, moved, x), torch.where(where, slopes[-1], first)
        # 0.9: rather a smaller step than one in vain; an error that is no number asks for a much smaller one
        factor = (0.9 * error.clamp(min=1e-10) ** -0.2).nan_to_num(nan=0.2).clamp(0.2, 5.0)
        size = size * torch.where(accepted, factor, factor.clamp(max=0.9))
        going = t < end
        stuck = going & (size < 1e-9 * (end - start))
        totals = torch.stack((going.sum(), stuck.sum()))
        left, hopeless = (totals if mesh is None else mesh.sum(totals)).tolist()
        if hopeless:
            raise UserError(f"dopri5: {hopeless} samples do not reach atol {atol}, rtol {rtol}; raise them, or take heun.")
        if not left:
            return x


def tolerances(
    name: str, method: str, atol: float | None, rtol: float | None, defaults: tuple[float, float]
) -> tuple[float, float]:
    """``(atol, rtol)`` of ``name``, with its ``defaults`` where they are None.

    Raises:
        UserError: out of range; or given to a ``method`` of fixed steps, which would not look at them.
    """
    given = ", ".join(setting for setting, value in (("atol", atol), ("rtol", rtol)) if value is not None)
    if given and method != "dopri5":
        raise UserError(f"{name}: {given} given, but the method '{method}' takes `steps` equal steps; leave out, or take dopri5.")
    atol, rtol = (default if value is None else value for value, default in zip((atol, rtol), defaults, strict=True))
    if not (atol > 0 and rtol >= 0):
        raise UserError(f"{name}: atol is {atol}, rtol {rtol}; the first must be above 0, the second at least 0.")
    return atol, rtol


def _combined(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    return torch.stack([weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight]).sum(0)


def _times(t: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.float64, device=x.device)
