"""Samplers on distributions whose exact predictions are known: their errors in mean, covariance and mode weights.

    python -m tests.generate.flow_orders --out docs/images/flow_orders.png
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l3m_like.generate import FlowODE, FlowSDE
from l3m_like.layers.interpolant import Interpolant

SHAPE = (1, 2, 2)
MEAN = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
_ROOT = torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
COVARIANCE = _ROOT @ _ROOT.T / 4 + 0.1 * torch.eye(4, dtype=torch.float64)


class Gaussian:
    """The exact prediction for data ~ N(MEAN + shift, COVARIANCE), flattened to 4 numbers."""

    def __init__(self, path: str, prediction: str) -> None:
        self.interpolant = Interpolant(path, prediction)

    def __call__(self, x: Tensor, t: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        at = self.interpolant.at(t, x.flatten(1))
        mean = MEAN + torch.as_tensor(shift, dtype=torch.float64).reshape(-1, 1)
        a, s = at.alpha.unsqueeze(-1), at.sigma.unsqueeze(-1)
        spread = a**2 * COVARIANCE + s**2 * torch.eye(4, dtype=torch.float64)
        white = torch.linalg.solve(spread, (x.flatten(1) - at.alpha * mean).unsqueeze(-1))
        noise, data = (s * white).squeeze(-1), mean + (a * COVARIANCE @ white).squeeze(-1)
        found = {
            "velocity": at.alpha_slope * data + at.sigma_slope * noise,
            "score": -white.squeeze(-1),
            "noise": noise,
        }[self.interpolant.prediction]
        return found.view_as(x)

    def moments(self, t: float) -> tuple[Tensor, Tensor]:
        """Mean and covariance of x_t."""
        at = self.interpolant.at(torch.tensor([t], dtype=torch.float64), MEAN)
        return at.alpha * MEAN, at.alpha**2 * COVARIANCE + at.sigma**2 * torch.eye(4, dtype=torch.float64)

    def carry(self, x: Tensor, start: float, end: float) -> Tensor:
        """Where the flow takes ``x`` [B, 1, 2, 2]: all covariances have the same eigenvectors."""
        (mean, spread), (new_mean, new_spread) = self.moments(start), self.moments(end)
        ratio = _power(new_spread, 0.5) @ _power(spread, -0.5)
        return (new_mean + (x.flatten(1) - mean) @ ratio).view_as(x)


class Mixture:
    """The exact velocity, score or noise for data of two modes: weight ``w`` at -2 and 1 - w at 2, each N(., 0.3^2)."""

    def __init__(self, path: str, prediction: str, weight: float = 0.3) -> None:
        self.interpolant = Interpolant(path, prediction)
        self.weights = torch.tensor([weight, 1 - weight], dtype=torch.float64)
        self.modes = torch.tensor([-2.0, 2.0], dtype=torch.float64)
        self.variance = 0.09

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        at = self.interpolant.at(t, x.flatten(1))
        spread = at.alpha**2 * self.variance + at.sigma**2
        centred = x.flatten(1) - at.alpha * self.modes  # [B, 2]
        chance = (self.weights.log() - centred**2 / (2 * spread)).softmax(-1)
        noise = at.sigma * (chance * centred / spread).sum(1, keepdim=True)
        data = (chance * (self.modes + at.alpha * self.variance * centred / spread)).sum(1, keepdim=True)
        found = {
            "velocity": at.alpha_slope * data + at.sigma_slope * noise,
            "score": -noise / at.sigma,
            "noise": noise,
        }[self.interpolant.prediction]
        return found.view_as(x)


def ode_error(method: str, path: str, prediction: str, steps: int) -> float:
    """Distance of mean and covariance from the exact ones, after the ODE from exact moments: it is affine, so no sample errs."""
    field, times = Gaussian(path, prediction), FlowODE(SHAPE, 1, path=path, prediction=prediction).interpolant.interval(0.05)
    sampler = FlowODE(SHAPE, 1, steps=steps, method=method, path=path, prediction=prediction, margin=0.05)
    start = times[0]
    whole = affine(lambda x: sampler.integrate(field, x, torch.arange(len(x))))
    mean, spread = field.moments(start)
    return distance(whole[0] @ mean + whole[1], whole[0] @ spread @ whole[0].T, field.moments(times[1]))


def sde_error(method: str, path: str, prediction: str, steps: int, **settings: Any) -> float:
    """As ``ode_error`` of the SDE, up to t = 0.9: mean and covariance are carried through each step's affine map exactly."""
    sampler = FlowSDE(
        SHAPE, 1, steps=steps + 1, method=method, path=path, prediction=prediction, margin=0.1, last_size=0.1, **settings
    )
    field, times = Gaussian(path, prediction), sampler.grid()
    mean, spread = field.moments(times[0])
    still = torch.zeros(5, *SHAPE, dtype=torch.float64)
    for t, following in zip(times, times[1:], strict=False):
        size = following - t
        matrix, offset = affine(lambda x, t=t, size=size: sampler.step(field, x, t, size, torch.zeros_like(x)))
        noise, _ = affine(lambda w, t=t, size=size: sampler.step(field, still, t, size, w))
        mean, spread = matrix @ mean + offset, matrix @ spread @ matrix.T + noise @ noise.T
    return distance(mean, spread, field.moments(times[-1]))


def affine(function: Any) -> tuple[Tensor, Tensor]:
    """(A, b) of an affine function of 4 numbers, x -> A x + b."""
    basis = torch.cat((torch.zeros(1, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64))).view(5, *SHAPE)
    out = function(basis).flatten(1)
    return (out[1:] - out[0]).T, out[0]


def distance(mean: Tensor, spread: Tensor, exact: tuple[Tensor, Tensor]) -> float:
    """Relative error of the mean plus that of the covariance."""
    return float((mean - exact[0]).norm() / exact[0].norm() + (spread - exact[1]).norm() / exact[1].norm())


def orders(errors: list[float]) -> list[float]:
    """log2 of the ratios of successive errors, whose steps were doubled."""
    return [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.T


def draw(out: Path) -> None:
    """Errors against steps for every sampler, and a histogram of the two modes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = [8, 16, 32, 64, 128, 256]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5))
    for path, mark in (("linear", "o"), ("gvp", "s"), ("vp", "^")):
        for method, colour in (("euler", "tab:orange"), ("heun", "tab:blue")):
            errors = [ode_error(method, path, "velocity", n) for n in counts]
            left.loglog(counts, errors, colour, marker=mark, ms=4, label=f"{method}, {path}")
            errors = [sde_error(method, path, "velocity", n) for n in counts]
            middle.loglog(counts, errors, colour, marker=mark, ms=4, label=f"{method}, {path}")
    for axis, title in ((left, "ODE"), (middle, "SDE (diffusion sigma)")):
        axis.loglog(counts, [4 / n for n in counts], "k:", lw=1, label="order 1")
        axis.loglog(counts, [16 / n**2 for n in counts], "k--", lw=1, label="order 2")
        axis.set(title=f"{title}: error of mean and covariance", xlabel="steps")
        axis.legend(fontsize=7)
    x = torch.linspace(-3.5, 3.5, 400, dtype=torch.float64)
    density = sum(
        w * torch.exp(-((x - m) ** 2) / 0.18) / math.sqrt(0.18 * math.pi) for w, m in ((0.3, -2.0), (0.7, 2.0))
    )
    for name, sampler in (
        ("ODE, heun", FlowODE((1, 1, 1), 1, steps=64, method="heun")),
        ("SDE, heun", FlowSDE((1, 1, 1), 1, steps=64, method="heun", last_step="tweedie", last_size=0.01)),
    ):
        row = torch.arange(20_000)
        found = sampler.integrate(Mixture("linear", "velocity"), sampler.noise(row, torch.float64), row).flatten()
        right.hist(found.numpy(), bins=120, range=(-3.5, 3.5), density=True, histtype="step", label=name)
    right.plot(x, density, "k:", lw=1, label="data")
    right.set(title="two modes of weight 0.3 and 0.7")
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    draw(parser.parse_args().out)
