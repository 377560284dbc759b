"""Learning-rate schedules: a factor on each update's peak learning rate, as a pure function of the step."""

from __future__ import annotations

import math

from l3m_like.core.errors import UserError, did_you_mean

#: ``decay`` and ``floor`` mean something in the first four only; a setting that does nothing is refused.
DECAYING = ("linear", "cosine", "exponential", "wsd")
NAMES = (*DECAYING, "constant", "inverse_sqrt")


class Schedule:
    """``scale(step)`` for a run of ``total`` steps; with w = warm-up steps, d = decay steps, f = floor:

    ============== ======================================================================================================
    warm-up        ``(step + 1) / w`` for step < w, whatever the name: the first step uses 1/w, step w - 1 the peak
    constant       1
    linear         ``1 - (1 - f) p``, with ``p = (step - w) / d`` in [0, 1]
    cosine         ``f + (1 - f) (1 + cos(pi p)) / 2``                                                (arXiv:1608.03983)
    exponential    ``f ** p``
    wsd            1, then over the last d steps ``1 - (1 - f) p`` with ``p = (step - (total - d)) / d`` (arXiv:2404.06395)
    inverse_sqrt   ``max(f, sqrt(w / (step + 1)))``, with w = 1 for no warm-up                         (arXiv:1706.03762)
    ============== ======================================================================================================

    Every p is clamped to [0, 1]: after its end a schedule stays at its floor. A step beyond ``total`` has the value at ``total``.

    Args:
        name: one of the names above.
        total: steps of the run.
        warmup: steps (an int) or a fraction of ``total`` (a float below 1).
        decay: likewise; default: all steps after the warm-up (wsd: must be given).
        floor: the lowest factor, in [0, 1].

    Raises:
        UserError: a value out of range, or one that the named schedule would ignore.
    """

    def __init__(self, name: str, *, total: int, warmup: float = 0, decay: float | None = None, floor: float = 0.0) -> None:
        if name not in NAMES:
            raise UserError(f"schedule.name: there is no schedule '{name}'. {did_you_mean(name, NAMES)}")
        if isinstance(total, bool) or not isinstance(total, int) or total < 1:
            raise UserError(f"schedule: the run's number of steps must be an int of 1 or more, not {total!r}.")
        if isinstance(floor, bool) or not isinstance(floor, (int, float)) or not 0 <= floor <= 1:
            raise UserError(f"schedule.floor: {floor!r} is not a ratio in [0, 1] of the peak learning rate.")
        if name not in DECAYING and decay is not None:
            raise UserError(f"schedule.decay: '{name}' has no decay phase, so decay={decay!r} would do nothing; leave it out.")
        if name == "constant" and floor:
            raise UserError(f"schedule.floor: 'constant' never decays, so floor={floor!r} would do nothing; leave it out.")
        if name == "wsd" and decay is None:
            raise UserError("schedule.decay: 'wsd' needs the length of its last phase, in steps or as a fraction; set e.g. 0.1.")
        if name == "exponential" and floor == 0:
            raise UserError("schedule.floor: 'exponential' decays to its floor, which must be above 0; set e.g. floor: 0.1.")
        self.name = name
        self.total = total
        self.floor = float(floor)
        self.warmup = _steps("warmup", warmup, total)
        if self.warmup >= total:
            raise UserError(f"schedule.warmup: {self.warmup} steps do not fit a run of {total} steps; shorten the warm-up.")
        self.decay = total - self.warmup if decay is None else _steps("decay", decay, total)
        if name in DECAYING and self.decay == 0:
            raise UserError(f"schedule.decay: {decay!r} gives '{name}' no step to decay in; use 'constant' instead.")
        if name == "wsd" and self.warmup + self.decay > total:
            raise UserError(
                f"schedule: warmup ({self.warmup}) and decay ({self.decay}) together exceed the run's {total} steps; shorten one."
            )

    def scale(self, step: int) -> float:
        """The factor for the step about to be taken; ``step`` counts the steps taken before it (0 for the first)."""
        step = min(step, self.total)
        if step < self.warmup:
            return (step + 1) / self.warmup
        start = self.total - self.decay if self.name == "wsd" else self.warmup
        p = min(max((step - start) / self.decay, 0.0), 1.0) if self.name in DECAYING else 0.0
        if self.name in ("linear", "wsd"):
            return 1.0 - (1.0 - self.floor) * p
        if self.name == "cosine":
            return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * p))
        if self.name == "exponential":
            return self.floor**p
        if self.name == "inverse_sqrt":
            return max(self.floor, math.sqrt(max(self.warmup, 1) / (step + 1)))
        return 1.0


def _steps(what: str, value: float, total: int) -> int:
    """A number of steps from an int, or from a fraction of ``total``."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not whole and not (isinstance(value, float) and 0 <= value < 1):
        raise UserError(f"schedule.{what}: {value!r} is neither a number of steps (an int) nor a fraction of the run (< 1.0).")
    if whole:
        return int(value)
    return max(1, round(value * total)) if value > 0 else 0  # a fraction above 0 always does something
