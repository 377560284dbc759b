"""Paths, targets, weights and conversions against the formulas of the paper, written out for each path."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.layers.interpolant import PATHS, PREDICTIONS, WEIGHTS, Interpolant, shift_time

TRIPLES = [
    (path, prediction, weight)
    for path, prediction, weight in itertools.product(PATHS, PREDICTIONS, WEIGHTS)
    if prediction != "velocity" or weight == "none"
]


def alpha_sigma(path: str, t: Tensor) -> tuple[Tensor, Tensor]:
    if path == "linear":
        return t, 1 - t
    if path == "gvp":
        return torch.sin(math.pi * t / 2), torch.cos(math.pi * t / 2)
    log_alpha = -0.25 * (1 - t) ** 2 * 19.9 - 0.5 * (1 - t) * 0.1
    return log_alpha.exp(), (1 - (2 * log_alpha).exp()).sqrt()


def drawn() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    data, noise, guess = torch.randn(3, 40, 2, 3, 3, generator=generator, dtype=torch.float64)
    return data, noise, guess, torch.rand(40, generator=generator, dtype=torch.float64) * 0.96 + 0.02


def slopes(path: str, t: Tensor) -> tuple[Tensor, Tensor]:
    t = t.clone().requires_grad_()
    alpha, sigma = alpha_sigma(path, t)
    return torch.autograd.grad(alpha.sum(), t, retain_graph=True)[0], torch.autograd.grad(sigma.sum(), t)[0]


@pytest.mark.parametrize("path", PATHS)
def test_path_and_its_slopes(path: str) -> None:
    t = drawn()[3]
    at, (alpha, sigma), (alpha_slope, sigma_slope) = PATHS[path](t), alpha_sigma(path, t), slopes(path, t)
    for found, expected in zip((at.alpha, at.sigma, at.alpha_slope, at.sigma_slope), (alpha, sigma, alpha_slope, sigma_slope)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(at.diffusion, alpha_slope / alpha * sigma**2 - sigma * sigma_slope, rtol=1e-10, atol=0)
    if path == "vp":
        torch.testing.assert_close(at.diffusion, (0.1 + (1 - t) * 19.9) / 2, rtol=1e-10, atol=0)  # beta / 2


@pytest.mark.parametrize(("path", "prediction", "weight"), TRIPLES)
def test_target_weight_and_conversions(path: str, prediction: str, weight: str) -> None:
    data, noise, guess, t = drawn()
    here, wide = Interpolant(path, prediction), t.view(-1, 1, 1, 1)
    (alpha, sigma), (alpha_slope, sigma_slope) = alpha_sigma(path, wide), slopes(path, wide)
    x, velocity = alpha * data + sigma * noise, alpha_slope * data + sigma_slope * noise
    ratio = alpha_slope / alpha
    diffusion = ratio * sigma**2 - sigma * sigma_slope
    # the target of one known (data, noise) stands for exactly these
    target = here.target(data, noise, t)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(here.velocity(target, x, t), velocity, **close)
    torch.testing.assert_close(here.noise(target, x, t), noise, **close)
    torch.testing.assert_close(here.score(target, x, t), -noise / sigma, **close)
    torch.testing.assert_close(here.data(target, x, t), data, **close)
    # and any prediction follows the paper's formulas
    as_velocity, as_score = here.velocity(guess, x, t), here.score(guess, x, t)
    expected = {
        "velocity": guess,
        "score": ratio * x + diffusion * guess,
        "noise": ratio * x - diffusion / sigma * guess,
    }[prediction]
    torch.testing.assert_close(as_velocity, expected, **close)
    torch.testing.assert_close(as_score, (as_velocity / ratio - x) / (sigma**2 - sigma_slope * sigma / ratio), **close)
    # the loss: of a score |sigma s + x_0|^2, times the weight
    plain = {"velocity": guess - velocity, "score": sigma * guess + noise, "noise": guess - noise}[prediction].square()
    factor = {"none": 1.0, "velocity": (diffusion / sigma) ** 2, "likelihood": diffusion / sigma**2}[weight]
    error = here.loss_weight(t, weight).view(-1, 1, 1, 1) * (guess - target).square()
    torch.testing.assert_close(error, factor * plain, **close)
    if weight == "velocity":
        torch.testing.assert_close(error, (as_velocity - velocity).square(), rtol=1e-8, atol=1e-8)


def test_intervals() -> None:
    assert Interpolant("linear").interval() == Interpolant("gvp").interval(training=True) == (0.0, 1.0)
    assert Interpolant("gvp", "score").interval(training=True) == (1e-3, 1 - 1e-3)
    assert Interpolant("vp").interval(training=True) == (0.0, 1 - 1e-5)
    assert Interpolant("vp", "noise").interval() == (0.0, 1 - 1e-3)
    assert Interpolant("linear").interval(0.25) == (0.25, 0.75)


def test_shift() -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_time(t, 3.0)
    s, moved = 1 - t[1:-1], 1 - shifted[1:-1]
    torch.testing.assert_close(moved / (1 - moved), 3 * s / (1 - s))  # noise to data, three times as much
    assert shifted[0] == 0 and shifted[-1] == 1 and torch.equal(shift_time(t, 1.0), t)


def test_bad_names() -> None:
    for make, words in [
        (lambda: Interpolant("liner"), "Did you mean 'linear'"),
        (lambda: Interpolant("vp", "sore"), "Did you mean 'score'"),
        (lambda: Interpolant("vp", "score").loss_weight(torch.tensor([0.5]), "likelyhood"), "Did you mean 'likelihood'"),
        (lambda: Interpolant("vp").loss_weight(torch.tensor([0.5]), "velocity"), "velocity has the weight none"),
    ]:
        with pytest.raises(UserError, match=words):
            make()
