"""Every schedule against its formula, written out again here, and at its edges."""

from __future__ import annotations

import math

import pytest

from l3m_like.core.errors import UserError
from l3m_like.training.schedule import NAMES, Schedule

TOTAL = 100


def make(name: str, total: int = TOTAL, **settings) -> Schedule:
    need = {"wsd": {"decay": 20}, "exponential": {"floor": 0.1}}.get(name, {})
    return Schedule(name, total=total, **(need | settings))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup", [0, 1, 10, 0.1])
def test_warmup(name, warmup):
    schedule = make(name, warmup=warmup)
    steps = 10 if warmup == 0.1 else warmup
    for step in range(steps):
        assert schedule.scale(step) == (step + 1) / steps
    assert schedule.scale(max(steps - 1, 0)) == 1.0  # the peak is reached, and not only approached
    assert max(schedule.scale(step) for step in range(2 * TOTAL)) == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_clamped_after_its_end(name):
    schedule = make(name, warmup=10)
    end = schedule.scale(TOTAL)
    for step in (TOTAL + 1, 2 * TOTAL, 10**9):
        assert schedule.scale(step) == end
    assert all(0 <= schedule.scale(step) <= 1 for step in range(3 * TOTAL))
    after = [schedule.scale(step) for step in range(10, 2 * TOTAL)]
    assert all(a >= b for a, b in zip(after, after[1:], strict=False))


@pytest.mark.parametrize("step", [10, 11, 37, 54, 55, 99, 100])
def test_formulas(step):
    p = (step - 10) / 90
    assert make("constant", warmup=10).scale(step) == 1.0  # not stuck at its warm-up's start
    assert make("linear", warmup=10).scale(step) == pytest.approx(1 - p, abs=1e-15)
    assert make("linear", warmup=10, floor=0.2).scale(step) == pytest.approx(0.2 + 0.8 * (1 - p), abs=1e-15)
    assert make("cosine", warmup=10).scale(step) == pytest.approx(math.cos(math.pi * p / 2) ** 2, abs=1e-15)
    assert make("cosine", warmup=10, floor=0.1).scale(step) == pytest.approx(0.1 + 0.9 * math.cos(math.pi * p / 2) ** 2)
    assert make("exponential", warmup=10, floor=0.01).scale(step) == pytest.approx(math.exp(math.log(0.01) * p))
    assert make("inverse_sqrt", warmup=10).scale(step) == pytest.approx((10 / (step + 1)) ** 0.5)
    assert make("inverse_sqrt", warmup=10, floor=0.9).scale(step) == pytest.approx(max(0.9, (10 / (step + 1)) ** 0.5))
    stable = step < 80
    assert make("wsd", warmup=10).scale(step) == pytest.approx(1.0 if stable else 1 - (step - 80) / 20)
    assert make("wsd", warmup=10, decay=0.2, floor=0.5).scale(step) == pytest.approx(1.0 if stable else 1 - (step - 80) / 40)


@pytest.mark.parametrize("name", ["linear", "cosine", "exponential", "wsd"])
def test_ends(name):
    schedule = make(name, floor=0.1)
    assert schedule.scale(0) == 1.0
    assert schedule.scale(TOTAL - 1) > 0.1  # no step is wasted at the floor
    assert schedule.scale(TOTAL) == pytest.approx(0.1, abs=1e-15)


@pytest.mark.parametrize("name", ["linear", "cosine", "exponential"])
def test_decay_length(name):
    short = make(name, warmup=10, decay=30, floor=0.1)
    assert short.scale(10) == 1.0
    assert short.scale(39) > short.scale(40) == pytest.approx(0.1)
    assert short.scale(41) == short.scale(99) == short.scale(40)
    # longer than the run: the run ends before the floor
    assert make(name, decay=200, floor=0.1).scale(TOTAL) > 0.3


def test_without_warmup_inverse_sqrt_starts_at_the_peak():
    assert [make("inverse_sqrt").scale(step) for step in (0, 3, 24)] == [1.0, 0.5, 0.2]


def test_shortest_runs():
    for name in NAMES:
        assert make(name, total=1, **({"decay": 1} if name == "wsd" else {})).scale(0) == 1.0
    assert [Schedule("linear", total=2, warmup=1).scale(step) for step in (0, 1, 2)] == [1.0, 1.0, 0.0]
    assert Schedule("constant", total=10, warmup=0.01).warmup == 1  # a fraction above 0 always does something


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cosin"}, "no schedule 'cosin'. Did you mean 'cosine'"),
        ({"total": 0}, "1 or more, not 0"),
        ({"warmup": 100}, "100 steps do not fit a run of 100 steps"),
        ({"warmup": 101}, "101 steps do not fit"),
        ({"warmup": -1}, "warmup: -1 is neither"),
        ({"warmup": 1.5}, "warmup: 1.5 is neither"),
        ({"warmup": 30.0}, "warmup: 30.0 is neither"),
        ({"warmup": "1e3"}, "warmup: '1e3' is neither"),
        ({"warmup": True}, "warmup: True is neither"),
        ({"decay": 0}, "no step to decay in"),
        ({"decay": float("nan")}, "decay: nan is neither"),
        ({"floor": 1.1}, "floor: 1.1 is not a ratio"),
        ({"floor": -0.1}, "floor: -0.1 is not a ratio"),
        ({"name": "constant", "decay": 10}, "'constant' has no decay phase"),
        ({"name": "inverse_sqrt", "decay": 10}, "'inverse_sqrt' has no decay phase"),
        ({"name": "constant", "floor": 0.1}, "'constant' never decays"),
        ({"name": "exponential"}, "must be above 0"),
        ({"name": "wsd"}, "needs the length of its last phase"),
        ({"name": "wsd", "warmup": 60, "decay": 60}, r"warmup \(60\) and decay \(60\) together exceed the run's 100"),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(UserError, match=message):
        Schedule(**({"name": "cosine", "total": TOTAL} | settings))
