"""The likelihood by the ODE against the analytic one."""

from __future__ import annotations

import math

import pytest
import torch

from l3m_like.core.errors import UserError
from l3m_like.core.random import normal
from l3m_like.generate import FlowLikelihood, bits_per_dimension
from tests.generate.flow_orders import COVARIANCE, MEAN, SHAPE, Gaussian, Mixture
from tests.generate.tiny import tiny


def images(rows: int) -> torch.Tensor:
    noise = normal(torch.arange(rows), SHAPE, seed=4, purpose="x", dtype=torch.float64).flatten(1)
    return (MEAN + noise @ torch.linalg.cholesky(COVARIANCE).T).view(rows, *SHAPE)


@pytest.mark.parametrize(("path", "prediction"), [("linear", "velocity"), ("gvp", "velocity"), ("linear", "noise")])
@pytest.mark.parametrize("method", ["heun", "dopri5"])
def test_gaussian(path: str, prediction: str, method: str) -> None:
    x = images(6)
    margin = 1e-4 if prediction == "noise" else None
    made = FlowLikelihood(1, path=path, prediction=prediction, method=method, divergence="exact", steps=400, margin=margin)
    found = made.of(Gaussian(path, prediction), x, torch.arange(6))
    expected = torch.distributions.MultivariateNormal(MEAN, COVARIANCE).log_prob(x.flatten(1))
    assert float((found - expected).abs().max()) < (2e-3 if margin is None else 2e-2)


def test_vp_path() -> None:
    """A trace of the data is left in its noise, and the prior does not know: the likelihood is off by about alpha(0)^2."""
    x = images(6)
    found = FlowLikelihood(1, path="vp", method="dopri5", divergence="exact", margin=1e-5).of(
        Gaussian("vp", "velocity"), x, torch.arange(6)
    )
    expected = torch.distributions.MultivariateNormal(MEAN, COVARIANCE).log_prob(x.flatten(1))
    assert float((found - expected).abs().max()) < 0.1


def test_hutchinson_is_unbiased() -> None:
    """Many rows of one image: the mean of their estimates is the exact value, within its error."""
    x = images(1).expand(4000, *SHAPE)
    made = {name: FlowLikelihood(1, divergence=name, steps=20) for name in ("hutchinson", "exact")}
    estimates = made["hutchinson"].of(Gaussian("linear", "velocity"), x, torch.arange(4000))
    exact = made["exact"].of(Gaussian("linear", "velocity"), x[:1], torch.arange(1))
    assert float(estimates.std()) > 0.05
    assert abs(float(estimates.mean() - exact)) < 4 * float(estimates.std()) / 4000**0.5
    again = made["hutchinson"].of(Gaussian("linear", "velocity"), x[7:9], torch.arange(7, 9))
    torch.testing.assert_close(again, estimates[7:9], rtol=0, atol=1e-10)  # a function of the row


def test_two_modes() -> None:
    x = torch.tensor([-2.3, -2.0, 0.5, 1.7, 2.0], dtype=torch.float64)
    modes = torch.distributions.Normal(torch.tensor([-2.0, 2.0], dtype=torch.float64), 0.3)
    expected = (modes.log_prob(x.unsqueeze(1)) + torch.tensor([0.3, 0.7]).log()).logsumexp(1)
    made = FlowLikelihood(1, method="dopri5", divergence="exact", atol=1e-7, rtol=1e-7)
    found = made.of(Mixture("linear", "velocity"), x.view(-1, 1, 1, 1), torch.arange(5))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_of_a_model_leaves_it_as_it_was() -> None:
    loaded = tiny("sit")
    before = [parameter.requires_grad for parameter in loaded.model.parameters()]
    x = normal(torch.arange(3), (1, 8, 8), seed=0, purpose="x", dtype=torch.float64)
    made = FlowLikelihood(10, steps=4, divergence="exact")
    found = made.run(loaded.model, x, torch.tensor([1, 2, 10]), torch.arange(3))
    assert torch.isfinite(found).all() and [p.requires_grad for p in loaded.model.parameters()] == before
    assert all(parameter.grad is None for parameter in loaded.model.parameters())
    alone = made.run(loaded.model, x[1:2], torch.tensor([2]), torch.arange(1, 2))
    torch.testing.assert_close(alone, found[1:2], rtol=0, atol=1e-9)


def test_bits() -> None:
    # uniform over 256 levels and the noise of one: a cube of side 2 + 2 / 255
    assert float(bits_per_dimension(torch.tensor(-12 * math.log(2 * 256 / 255)), 12)) == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "dopri"}, "Did you mean 'dopri5'"),
        ({"divergence": "exat"}, "Did you mean 'exact'"),
        ({"steps": 0}, "steps is 0"),
        ({"rtol": 1e-3}, "rtol given, but the method 'heun'"),
        ({"method": "dopri5", "atol": 0.0}, "atol is 0.0"),
    ],
)
def test_bad_settings(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        FlowLikelihood(1, **settings)
