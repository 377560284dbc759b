"""Interpolants between noise and data, what a model may predict on them, and the exact conversions (SiT, arXiv:2401.08740).

``x_t = alpha(t) x_1 + sigma(t) x_0``: x_1 is data, x_0 is standard normal noise, and t runs from 0 (noise) to 1 (data).
The velocity of the flow that carries noise to data is ``E[alpha' x_1 + sigma' x_0 | x_t]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from l3m_like.core.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Coefficients:
    """alpha, sigma and their derivatives in t, at some times."""

    alpha: Tensor
    sigma: Tensor
    alpha_slope: Tensor
    sigma_slope: Tensor

    @property
    def wronskian(self) -> Tensor:
        """alpha' sigma - alpha sigma' > 0: what every conversion divides by, and finite where alpha'/alpha is not."""
        return self.alpha_slope * self.sigma - self.alpha * self.sigma_slope

    @property
    def diffusion(self) -> Tensor:
        """lambda = (alpha'/alpha) sigma^2 - sigma sigma': the diffusion whose SDE has the score of the path (SBDM)."""
        return self.sigma * self.wronskian / self.alpha


def linear_path(t: Tensor) -> Coefficients:
    """x_t = t x_1 + (1 - t) x_0."""
    one = torch.ones_like(t)
    return Coefficients(t, 1 - t, one, -one)


def gvp_path(t: Tensor) -> Coefficients:
    """x_t = sin(pi t / 2) x_1 + cos(pi t / 2) x_0, which keeps the variance."""
    angle = t * (math.pi / 2)
    return Coefficients(angle.sin(), angle.cos(), angle.cos() * (math.pi / 2), angle.sin() * (-math.pi / 2))


#: beta(t) of the variance-preserving diffusion at its noisy and at its clean end (Song et al., arXiv:2011.13456)
_BETA_NOISE, _BETA_DATA = 20.0, 0.1


def vp_path(t: Tensor) -> Coefficients:
    """Variance-preserving diffusion with a linear beta: at t = 0 a trace of the data is left (alpha = 0.0066)."""
    s, rise = 1 - t, _BETA_NOISE - _BETA_DATA
    log_alpha = -0.25 * rise * s**2 - 0.5 * _BETA_DATA * s
    alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
    alpha_slope = 0.5 * alpha * (_BETA_DATA + rise * s)
    return Coefficients(alpha, sigma, alpha_slope, -alpha * alpha_slope / sigma)


PATHS: dict[str, Callable[[Tensor], Coefficients]] = {"linear": linear_path, "gvp": gvp_path, "vp": vp_path}
PREDICTIONS = ("velocity", "score", "noise")
WEIGHTS = ("none", "velocity", "likelihood")


class Interpolant:
    """A path and what the model predicts on it. Holds no tensor.

    Args:
        path: "linear", "gvp" or "vp".
        prediction: "velocity" (of the flow), "score" (gradient of log p_t) or "noise" (E[x_0 | x_t]).

    Raises:
        UserError: no such path or prediction.
    """

    def __init__(self, path: str = "linear", prediction: str = "velocity") -> None:
        if path not in PATHS:
            raise UserError(f"no path '{path}'. {did_you_mean(path, PATHS)}")
        if prediction not in PREDICTIONS:
            raise UserError(f"no prediction '{prediction}'. {did_you_mean(prediction, PREDICTIONS)}")
        self.path = path
        self.prediction = prediction

    def at(self, t: Tensor, like: Tensor) -> Coefficients:
        """The coefficients at times ``t`` [B] (or a scalar), shaped to broadcast with ``like`` [B, ...], in its dtype."""
        return PATHS[self.path](t.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1)))

    def interval(self, margin: float | None = None, *, training: bool = False) -> tuple[float, float]:
        """The times that are trained, or sampled by an ODE: what is singular at an end keeps ``margin`` from it.

        Without a margin, the published ones: none for a velocity on the linear and gvp path; 1e-3 at both ends for another
        prediction there (alpha is 0 at the start); on the vp path 1e-3, in training 1e-5, at the end, where sigma is 0.
        """
        regular = self.prediction == "velocity" and self.path != "vp"
        if margin is None:
            margin = 0.0 if regular else 1e-5 if training and self.path == "vp" else 1e-3
        return 0.0 if self.path == "vp" else margin, 1.0 - margin

    def target(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model is to predict, given data (x_1) and noise (x_0) [B, ...] and t [B]."""
        c = self.at(t, data)
        if self.prediction == "velocity":
            return c.alpha_slope * data + c.sigma_slope * noise
        return noise if self.prediction == "noise" else -noise / c.sigma

    def loss_weight(self, t: Tensor, weight: str = "none") -> Tensor:
        """Factors [B] on the squared error of the prediction, float64 for t [B].

        ``none``: the plain error of the velocity or of the noise; of a score, that of the noise which it stands for,
        ``|sigma s + x_0|^2``. Of a noise or score moreover ``velocity``: (lambda / sigma)^2, which makes it the error of the
        velocity; ``likelihood``: lambda / sigma^2, the bound on the likelihood.

        Raises:
            UserError: no such weight, or one for a velocity prediction.
        """
        if weight not in WEIGHTS:
            raise UserError(f"no weight '{weight}'. {did_you_mean(weight, WEIGHTS)}")
        if self.prediction == "velocity" and weight != "none":
            raise UserError(f"weight '{weight}' is one of score and noise predictions; a velocity has the weight none.")
        c = PATHS[self.path](t.double())
        factor = torch.ones_like(c.sigma)
        if weight == "velocity":
            factor = (c.wronskian / c.alpha).square()
        elif weight == "likelihood":
            factor = c.wronskian / (c.alpha * c.sigma)
        return factor * c.sigma.square() if self.prediction == "score" else factor

    def velocity(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The velocity at ``x`` [B, ...] that a prediction stands for."""
        c = self.at(t, x)
        if self.prediction == "velocity":
            return prediction
        noise = prediction if self.prediction == "noise" else -c.sigma * prediction
        return (c.alpha_slope * x - c.wronskian * noise) / c.alpha

    def noise(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t = x] that a prediction stands for."""
        c = self.at(t, x)
        if self.prediction == "noise":
            return prediction
        if self.prediction == "score":
            return -c.sigma * prediction
        return (c.alpha_slope * x - c.alpha * prediction) / c.wronskian

    def score(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The gradient of log p_t at ``x`` that a prediction stands for (singular at t = 1, where sigma is 0)."""
        return prediction if self.prediction == "score" else -self.noise(prediction, x, t) / self.at(t, x).sigma

    def data(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """E[x_1 | x_t = x] that a prediction stands for: Tweedie's formula (singular where alpha is 0)."""
        c = self.at(t, x)
        if self.prediction == "velocity":
            return (c.sigma * prediction - c.sigma_slope * x) / c.wronskian
        return (x - c.sigma * self.noise(prediction, x, t)) / c.alpha


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Times moved towards noise by a factor on the noise-to-data ratio: with s = 1 - t, ``s' = shift s / (1 + (shift - 1) s)``.

    High-dimensional data hides less under the same noise: SD3 (arXiv:2403.03206) and RAE (arXiv:2510.11690) take
    ``shift = sqrt(dimension / reference dimension)``.
    """
    return t / (1 + (shift - 1) * (1 - t))
