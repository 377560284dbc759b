"""Rotary position embeddings (Su et al., arXiv:2104.09864), rotate-half form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from l3m_like.core.errors import UserError, did_you_mean

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
#: ``{type: {setting: its default, or None where it must be given}}``
_SCALINGS: dict[str, dict[str, float | None]] = {
    "llama3": dict.fromkeys(_LLAMA3),
    "yarn": {
        "factor": None,
        "original_max_position_embeddings": None,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.0,
        "mscale_all_dim": 0.0,
    },
}


class Rope:
    """Cosines and sines of rotary positions. Holds numbers only: the tables are computed in each forward, so they survive
    meta initialisation and any cast of the model.

    Args:
        head_dim: K, even.
        theta: base of the frequencies ``theta^(-2i/K)``.
        scaling: None, or Llama 3.1's ``{type: llama3, factor, low_freq_factor, high_freq_factor,
            original_max_position_embeddings}``: wavelengths above original/low are stretched by ``factor``, those below
            original/high are kept, those between are interpolated. Or YaRN's (arXiv:2309.00071) ``{type: yarn, factor,
            original_max_position_embeddings, beta_fast: 32, beta_slow: 1, mscale: 0, mscale_all_dim: 0}``: frequencies that
            turn less than ``beta_slow`` times in the original length are divided by ``factor``, those that turn more than
            ``beta_fast`` times are kept; cosines and sines are multiplied by ``0.1 ln(factor) + 1``, or, where the two
            ``mscale`` are given (DeepSeek), by the quotient of ``0.1 m ln(factor) + 1`` of both.
    """

    def __init__(self, head_dim: int, theta: float, scaling: Mapping[str, float | str] | None = None) -> None:
        if head_dim % 2 or head_dim < 2:
            raise UserError(f"Rope: head_dim must be even, got {head_dim}.")
        if not theta > 1:
            raise UserError(f"Rope: theta must be above 1, got {theta} (10000 is usual).")
        self.head_dim = head_dim
        self.theta = float(theta)
        self.scaling = _check_scaling(scaling)
        #: "llama3", "yarn" or None
        self.scaling_type = None if scaling is None else str(scaling["type"])
        #: of cosines and sines
        self.magnitude = 1.0
        if self.scaling is not None and self.scaling_type == "yarn":
            if self.scaling["mscale"] and self.scaling["mscale_all_dim"]:
                self.magnitude = yarn_magnitude(self.scaling, "mscale") / yarn_magnitude(self.scaling, "mscale_all_dim")
            else:
                self.magnitude = yarn_magnitude(self.scaling | {"mscale": 1.0}, "mscale")

    def frequencies(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Angular frequencies [K/2] (radians per position)."""
        even = torch.arange(0, self.head_dim, 2, device=device).to(dtype)
        frequency = 1.0 / self.theta ** (even / self.head_dim)
        if self.scaling is None:
            return frequency
        if self.scaling_type == "yarn":
            kept = self._kept_by_yarn(frequency)
            return kept * frequency + (1 - kept) * frequency / self.scaling["factor"]
        factor, low, high, original = (self.scaling[name] for name in _LLAMA3)
        wavelength = 2 * math.pi / frequency
        smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)  # 0: stretched, 1: kept
        return (1 - smooth) * frequency / factor + smooth * frequency

    def _kept_by_yarn(self, frequency: Tensor) -> Tensor:
        """[K/2]: 1 where a frequency is kept, 0 where it is divided."""
        assert self.scaling is not None
        original = self.scaling["original_max_position_embeddings"]

        def turning(times: float) -> float:
            """The (fractional) index of the frequency that turns so many times in the original length."""
            return self.head_dim * math.log(original / (2 * math.pi * times)) / (2 * math.log(self.theta))

        low = max(math.floor(turning(self.scaling["beta_fast"])), 0)
        high = min(math.ceil(turning(self.scaling["beta_slow"])), self.head_dim - 1)
        index = torch.arange(len(frequency), device=frequency.device).to(frequency.dtype)
        return 1 - ((index - low) / max(high - low, 1e-3)).clamp(0, 1)

    def __call__(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """``(cos, sin)``, each [B, S, K] (or [1, S, K]) in at least float32, for integer positions [B, S] or [S]."""
        dtype = torch.promote_types(dtype, torch.float32)
        return self._tables(positions.to(dtype).unsqueeze(-1) * self.frequencies(dtype, positions.device))

    def _tables(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, S, K] of angles [B, S, K/2] ([S, K/2]: of one row)."""
        angles = torch.cat((angles, angles), dim=-1)
        if angles.dim() == 2:
            angles = angles.unsqueeze(0)
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.magnitude == 1.0 else (cos * self.magnitude, sin * self.magnitude)


LAYOUTS = ("blocks", "interleaved", "axial")


class MultiAxisRope(Rope):
    """Rotary positions of several axes, such as time, height and width: every pair of places of a head turns by one of them.

    Args:
        head_dim, theta, scaling: as of ``Rope``.
        sections: pairs of every axis, K/2 together.
        layout: "blocks": axis after axis (M-RoPE of Qwen2-VL, arXiv:2409.12191, section 2.1); "interleaved": the axes by turns
            while they have pairs left, and what remains is the first one's (Qwen3-VL); "axial": axis after axis, each with
            frequencies of its own, ``theta^(-i/n)`` for i < n, the axis's number of pairs (Wan, arXiv:2503.20314).

    Pairs are (i, i + K/2), as everywhere here: weights of a model that turns the places (2i, 2i + 1) want a head's places in the
    order 0, 2, 4, ..., 1, 3, 5, ... first.
    """

    def __init__(
        self,
        head_dim: int,
        theta: float,
        sections: Sequence[int],
        layout: str = "blocks",
        scaling: Mapping[str, float | str] | None = None,
    ) -> None:
        super().__init__(head_dim, theta, scaling)
        if layout not in LAYOUTS:
            raise UserError(f"MultiAxisRope: no layout '{layout}'. {did_you_mean(layout, LAYOUTS)}")
        if layout == "axial" and scaling is not None:
            raise UserError("MultiAxisRope: scaling is of one row of frequencies, and an axial layout has several; leave it out.")
        self.sections = tuple(sections)
        self.layout = layout
        if min(self.sections, default=0) < 1 or sum(self.sections) != head_dim // 2:
            raise UserError(f"MultiAxisRope: sections {list(sections)} must be at least 1 each, and {head_dim // 2} together.")
        found = self.axes(torch.device("cpu")).bincount(minlength=len(self.sections)).tolist()
        if found != list(self.sections):
            raise UserError(f"MultiAxisRope: by turns, sections {list(sections)} come out as {found}: the first must be largest.")

    def axes(self, device: torch.device) -> Tensor:
        """The axis of every pair, int64 [K/2]."""
        pair = torch.arange(self.head_dim // 2, device=device)
        axis = torch.zeros_like(pair)
        number = len(self.sections)
        for other in range(1, number):
            if self.layout == "interleaved":
                axis = torch.where((pair % number == other) & (pair < number * self.sections[other]), other, axis)
            else:
                axis = axis + (pair >= sum(self.sections[:other]))
        return axis

    def frequencies(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Angular frequencies [K/2] (radians per position)."""
        if self.layout != "axial":
            return super().frequencies(dtype, device)
        return torch.cat([self.theta ** (-torch.arange(n, device=device).to(dtype) / n) for n in self.sections])

    def __call__(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """``(cos, sin)``, each [B, S, K] in at least float32, for integer positions [A, B, S] of A axes. Positions [B, S] or [S]
        are those of all axes (a text's)."""
        if positions.dim() == 3:
            if len(positions) != len(self.sections):
                raise UserError(f"MultiAxisRope: positions of {len(positions)} axes, and {len(self.sections)} sections.")
            positions = positions[self.axes(positions.device)].movedim(0, -1)
        else:
            positions = positions.unsqueeze(-1)
        dtype = torch.promote_types(dtype, torch.float32)
        return self._tables(positions.to(dtype) * self.frequencies(dtype, positions.device))


def yarn_magnitude(scaling: Mapping[str, float | str], name: str = "mscale_all_dim") -> float:
    """``0.1 m ln(factor) + 1`` for the ``mscale`` or ``mscale_all_dim`` m of a YaRN ``scaling`` (0 where it is absent)."""
    return 0.1 * float(scaling.get(name, 0.0)) * math.log(max(float(scaling["factor"]), 1.0)) + 1.0


def _check_scaling(scaling: Mapping[str, float | str] | None) -> dict[str, float] | None:
    if scaling is None:
        return None
    kind = scaling.get("type")
    if kind not in _SCALINGS:
        raise UserError(f"Rope: scaling.type is {kind!r}. {did_you_mean(str(kind), _SCALINGS)}")
    known = _SCALINGS[str(kind)]
    for name in scaling:
        if name != "type" and name not in known:
            raise UserError(f"Rope: scaling has no '{name}'. {did_you_mean(name, known)}")
    missing = [name for name, default in known.items() if default is None and name not in scaling]
    if missing:
        raise UserError(f"Rope: scaling {kind} needs {', '.join(missing)} as well.")
    return {name: float(scaling.get(name, default)) for name, default in known.items()}  # type: ignore[arg-type]
