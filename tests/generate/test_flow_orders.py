"""With the exact prediction, every sampler reaches the exact distribution at its order of convergence."""

from __future__ import annotations

import itertools
from unittest.mock import Mock

import pytest
import torch

from l3m_like.core.errors import UserError
from l3m_like.generate import FlowODE, FlowSDE
from l3m_like.generate.flow import DIFFUSIONS
from l3m_like.generate.solvers import dopri5
from l3m_like.layers.interpolant import PATHS, PREDICTIONS
from tests.generate.flow_orders import SHAPE, Gaussian, Mixture, ode_error, orders, sde_error

METHODS = [("euler", 1), ("heun", 2)]


@pytest.mark.parametrize(("path", "prediction"), itertools.product(PATHS, PREDICTIONS))
@pytest.mark.parametrize(("method", "order"), METHODS)
def test_ode(path: str, prediction: str, method: str, order: int) -> None:
    errors = [ode_error(method, path, prediction, steps) for steps in (64, 128, 256)]
    assert all(abs(found - order) < 0.25 for found in orders(errors)), orders(errors)
    assert errors[-1] < (0.1 if order == 1 else 5e-3)


@pytest.mark.parametrize(
    ("path", "diffusion"), [*(("linear", name) for name in DIFFUSIONS), ("gvp", "sigma"), ("gvp", "sbdm"), ("vp", "sbdm")]
)
@pytest.mark.parametrize(("method", "order"), METHODS)
def test_sde(path: str, diffusion: str, method: str, order: int) -> None:
    errors = [sde_error(method, path, "velocity", steps, diffusion=diffusion) for steps in (32, 64, 128)]
    assert abs(orders(errors)[-1] - order) < 0.3, orders(errors)
    assert errors[-1] < (0.1 if order == 1 else 0.02)


@pytest.mark.parametrize("prediction", ["score", "noise"])
def test_sde_of_other_predictions_is_the_same(prediction: str) -> None:
    plain, other = (sde_error("heun", "gvp", name, 16) for name in ("velocity", prediction))
    assert plain == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_dopri5(path: str) -> None:
    field = Gaussian(path, "velocity")
    row = torch.arange(6)
    x = FlowODE(SHAPE, 1).noise(row, torch.float64)
    start, end = FlowODE(SHAPE, 1, path=path).interpolant.interval()
    expected = field.carry(x, start, end)
    errors, evaluations = [], []
    for tolerance in (1e-4, 1e-6, 1e-8):
        counted = Mock(side_effect=field)
        sampler = FlowODE(SHAPE, 1, path=path, method="dopri5", atol=tolerance, rtol=tolerance)
        errors.append(float((sampler.integrate(counted, x, row) - expected).abs().max()))
        evaluations.append(counted.call_count)
    assert errors[0] < 0.03 and errors[1] < 3e-4 and errors[2] < 3e-6, errors
    # of order 5: a hundredth of the error for 10^(2/5) = 2.5 times the steps
    assert evaluations[2] / evaluations[1] < 3.5, evaluations
    alone = torch.cat([sampler.integrate(field, x[i : i + 1], row[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(alone, sampler.integrate(field, x, row), rtol=0, atol=1e-12)


TOLERANCES = {"atol": 1e-6, "rtol": 1e-3}


def test_dopri5_says_when_it_cannot() -> None:
    with pytest.raises(UserError, match="1 samples do not reach atol"):
        dopri5(lambda x, t: torch.where(x > 0, torch.nan, 1.0), torch.tensor([[1.0], [-1.0]]), 0.0, 0.5, steps=20, **TOLERANCES)


def test_steps_are_the_first_try_of_dopri5() -> None:
    """A constant velocity is exact in any step, so the first one that is tried is taken."""
    x, times = torch.zeros(1, 1), []
    for steps in (1, 4):
        seen: list[float] = []
        dopri5(lambda x, t, seen=seen: seen.append(float(t)) or torch.ones_like(x), x, 0.0, 0.5, steps=steps, **TOLERANCES)
        times.append(max(seen[:7]))
    assert times == [0.5, 0.125]


@pytest.mark.parametrize(("path", "prediction"), [("linear", "velocity"), ("gvp", "noise"), ("vp", "score")])
def test_two_modes(path: str, prediction: str) -> None:
    """The ODE maps quantiles to quantiles, so its mode weights have no sampling error; those of the SDE have."""
    field, rows = Mixture(path, prediction), 4000
    places = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    noise = torch.special.ndtri(places).view(-1, 1, 1, 1)
    ode = FlowODE((1, 1, 1), 1, path=path, prediction=prediction, steps=100, method="heun")
    found = ode.integrate(field, noise, torch.arange(rows)).flatten()
    assert abs(float((found < 0).double().mean()) - 0.3) < 0.005
    for sign, mode in ((-1, -2.0), (1, 2.0)):
        part = found[found * sign > 0]
        assert abs(float(part.mean()) - mode) < 0.02 and abs(float(part.std()) - 0.3) < 0.02
    sde = FlowSDE((1, 1, 1), 1, path=path, prediction=prediction, steps=100, method="heun", last_step="tweedie", last_size=0.01)
    row = torch.arange(rows)
    found = sde.integrate(field, sde.noise(row, torch.float64), row).flatten()
    assert abs(float((found < 0).double().mean()) - 0.3) < 4 * (0.3 * 0.7 / rows) ** 0.5
    part = found[found > 0]
    assert abs(float(part.mean()) - 2) < 0.03 and abs(float(part.std()) - 0.3) < 0.02


def test_last_steps() -> None:
    """From t = 1 - h, the exact x: "mean" and "euler" are steps of the drift and the velocity, "tweedie" is E[data | x]."""
    field = Gaussian("linear", "velocity")
    x, now = FlowODE(SHAPE, 1).noise(torch.arange(3), torch.float64), torch.full((3,), 0.9, dtype=torch.float64)
    velocity, score = field(x, now), Gaussian("linear", "score")(x, now)
    expected = {
        "mean": x + 0.1 * (velocity + 0.1 * score),  # D = sigma = 0.1
        "euler": x + 0.1 * velocity,
        "tweedie": (x + 0.1**2 * score) / 0.9,
        "none": x,
    }
    for name, value in expected.items():
        sampler = FlowSDE(SHAPE, 1, last_step=name, last_size=0.1)
        torch.testing.assert_close(sampler.finish(field, x), value, rtol=1e-10, atol=1e-10)
    assert len(FlowSDE(SHAPE, 1, steps=250).grid()) == 250 and FlowSDE(SHAPE, 1).grid()[-1] == pytest.approx(0.96)


def test_noise_of_a_step_is_a_function_of_row_and_step() -> None:
    field, rows = Gaussian("linear", "velocity"), torch.arange(6)
    sampler = FlowSDE(SHAPE, 1, steps=8)
    whole = sampler.integrate(field, sampler.noise(rows, torch.float64), rows)
    part = sampler.integrate(field, sampler.noise(rows[3:], torch.float64), rows[3:])
    torch.testing.assert_close(part, whole[3:], rtol=0, atol=1e-12)
    first, second = (sampler.noise(rows, torch.float64, step) for step in (0, 1))
    assert not torch.equal(first, second) and not torch.equal(first, sampler.noise(rows, torch.float64))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "huen"}, "Did you mean 'heun'"),
        ({"diffusion": "sigmaa"}, "Did you mean 'sigma'"),
        ({"last_step": "tweedy"}, "Did you mean 'tweedie'"),
        ({"last_size": 0.0}, "last_size is 0"),
        ({"norm": -1.0}, "norm is -1"),
        ({"steps": 1}, "at least 2"),
        ({"guidance_interval": [0.5, 0.2]}, "two times"),
        ({"guidance_channels": 2}, "samples have 1 channels"),
        ({"shift": 0.0}, "shift is 0"),
    ],
)
def test_bad_settings(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        FlowSDE(SHAPE, 1, **settings)
