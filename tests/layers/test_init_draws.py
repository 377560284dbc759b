"""Initial values: statistics, and that every shard draws its slice of the same whole."""

from __future__ import annotations

import math

import pytest
import torch

from l3m_like.core import init as init_module
from l3m_like.core.errors import UserError
from l3m_like.core.init import FanIn, Normal, Ones, Uniform, XavierUniform, Zeros

SHAPE = (12, 5, 3)
ALL = [Normal(0.02), Uniform(0.3), Zeros(), Ones(), XavierUniform(), FanIn(0.5)]


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: type(spec).__name__)
def test_a_shard_is_a_slice_of_the_whole(spec, monkeypatch) -> None:
    whole = spec.draw(3, "a.weight", [torch.arange(n) for n in SHAPE], SHAPE)
    assert whole.shape == SHAPE and whole.dtype == torch.float32
    rows, columns, depth = torch.tensor([1, 2, 7, 11]), torch.tensor([4, 0]), torch.arange(3)
    part = spec.draw(3, "a.weight", [rows, columns, depth], SHAPE)
    assert torch.equal(part, whole[rows][:, columns][:, :, depth])
    monkeypatch.setattr(init_module, "_CHUNK", 16)  # one row at a time
    assert torch.equal(spec.draw(3, "a.weight", [torch.arange(n) for n in SHAPE], SHAPE), whole)
    empty = spec.draw(3, "a.weight", [torch.arange(0), columns, depth], SHAPE)
    assert empty.shape == (0, 2, 3)


def test_draws_depend_on_seed_and_name() -> None:
    def draw(seed: int, name: str) -> torch.Tensor:
        return Normal(1.0).draw(seed, name, [torch.arange(n) for n in (50,)], (50,))

    assert torch.equal(draw(0, "a"), draw(0, "a"))
    assert not torch.equal(draw(0, "a"), draw(1, "a")) and not torch.equal(draw(0, "a"), draw(0, "b"))


def test_statistics() -> None:
    shape = (400, 300)
    values = Normal(0.02).draw(0, "w", [torch.arange(n) for n in shape], shape).double()
    assert abs(values.mean()) < 3e-4 and abs(values.std() / 0.02 - 1) < 0.01
    assert abs((values.abs() < 0.02).double().mean() - 0.6827) < 0.01
    values = XavierUniform().draw(0, "w", [torch.arange(n) for n in shape], shape)
    bound = math.sqrt(6 / 700)
    assert values.abs().max() <= bound and values.abs().max() > 0.999 * bound
    assert abs(values.std() / (bound / math.sqrt(3)) - 1) < 0.01


def test_xavier_fans() -> None:
    assert XavierUniform().bound((8, 3, 2, 2)) == math.sqrt(6 / (8 + 12))  # a convolution as a linear layer
    assert XavierUniform(fan_in=10, fan_out=30).bound((10, 10)) == math.sqrt(6 / 40)
    with pytest.raises(UserError, match="needs a matrix"):
        XavierUniform().bound((7,))


def test_fan_in_is_a_cut_normal() -> None:
    shape = (400, 300)
    values = FanIn(0.25).draw(0, "w", [torch.arange(n) for n in shape], shape).double()
    wanted = torch.empty(shape, dtype=torch.float64)
    torch.manual_seed(0)
    std = torch.nn.init.trunc_normal_(wanted, std=1.0, a=-2.0, b=2.0).std()  # of a standard normal cut off there
    assert abs(values.mean()) < 3e-4 and abs(values.std() / math.sqrt(0.25 / 300) - 1) < 0.01
    assert abs(values.abs().max() / values.std() - 2 / std) < 0.02
    quantiles = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    theirs = wanted.flatten()[:100000].quantile(quantiles) / std
    assert (values.flatten()[:100000].quantile(quantiles) / values.std() - theirs).abs().max() < 0.02
    with pytest.raises(UserError, match="FanIn needs a matrix"):
        FanIn().draw(0, "b", [torch.arange(3)], (3,))


def test_scalar_and_float64() -> None:
    one = Normal(1.0).draw(0, "s", [], (), dtype=torch.float64)
    assert one.shape == () and one.dtype == torch.float64
    assert Normal(1.0).draw(0, "s", [torch.arange(n) for n in (3,)], (3,), dtype=torch.float64)[0] == one


def test_bad_numbers() -> None:
    for make in (lambda: Normal(0.0), lambda: Normal(-1), lambda: Uniform(float("nan"))):
        with pytest.raises(UserError, match="above 0"):
            make()
    with pytest.raises(UserError, match="one per dimension"):
        Zeros().draw(0, "x", [torch.arange(n) for n in (3,)], (3, 4))
