"""Mixing: how much each named source gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.random import key_of

BY = ("tokens", "samples")
ENDS = ("first", "last")


class Mix:
    """Weights of named sources, counted in tokens or in samples.

    Each lane takes its next sample from the source that has given least for its weight (stride scheduling, Waldspurger and
    Weihl 1995), so that after every sample the shares are off by at most one sample. Where a lane begins in that rhythm is
    drawn from the seed, so that a rare source does not come to all lanes at once.

    Args:
        weights: ``{source: weight}``, positive, in any unit.
        by: ``tokens`` (as the packer counts them) or ``samples``.
        epochs: ``{source: passes}`` of those that are used up; the others repeat for ever.
        ends: the stream ends when the ``first`` of these is used up, or when all that have a limit are (``last``); until then
            the others share by their weights.

    Raises:
        UserError: a weight that is not positive, an unknown word.
    """

    def __init__(
        self, weights: Mapping[str, float], by: str = "tokens", epochs: Mapping[str, int] | None = None, ends: str = "first"
    ) -> None:
        for name, weight in weights.items():
            if not weight > 0:
                raise UserError(f"mix.weights: '{name}' has the weight {weight}; it is above 0. Leave the source out instead.")
        if by not in BY:
            raise UserError(f"mix.by is '{by}'. {did_you_mean(by, BY)}")
        if ends not in ENDS:
            raise UserError(f"mix.ends is '{ends}'. {did_you_mean(ends, ENDS)}")
        for name, passes in (epochs or {}).items():
            if name not in weights:
                raise UserError(f"mix.epochs: there is no source '{name}'. {did_you_mean(name, weights)}")
            if passes < 1:
                raise UserError(f"mix.epochs: '{name}' has {passes} passes; it is at least 1.")
        self.weights = dict(weights)
        self.by = by
        self.epochs = dict(epochs or {})
        self.ends = ends

    def check(self, names: Sequence[str]) -> None:
        """Raise a UserError unless exactly these sources have a weight."""
        for name in names:
            if name not in self.weights:
                raise UserError(f"mix.weights: the source '{name}' has no weight. Give it one, or remove the source.")
        for name in self.weights:
            if name not in names:
                raise UserError(f"mix.weights: there is no source '{name}'. {did_you_mean(name, names)}")

    def phases(self, seed: int, lane: int, unit: float) -> dict[str, float]:
        """Where ``lane`` begins: a head start in [0, ``unit``) for each source."""
        return {name: key_of(seed, f"mix/{lane}/{name}")[0] / 2**32 * unit for name in self.weights}

    def over(self, ended: set[str]) -> bool:
        """Whether the stream is over when these sources are used up."""
        limited = set(self.epochs) or set(self.weights)
        return bool(ended) if self.ends == "first" else limited <= ended
