"""Initial values of parameters as functions of (seed, parameter name, global element index).

Every shard draws only its own elements, so the initial weights are bitwise the same for every mesh.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.core.random import normal_at, uniform_at

#: elements drawn at a time; Philox needs about ten int64/float64 temporaries of this size
_CHUNK = 1 << 22

Sample = Callable[[int, str, Tensor, Tensor], Tensor]


class Init(abc.ABC):
    """How one parameter starts. Subclasses define ``draw``."""

    @abc.abstractmethod
    def draw(
        self, seed: int, name: str, index: Sequence[Tensor], shape: Sequence[int], *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The values of a slice of a parameter.

        Args:
            seed: of the run.
            name: of the parameter in the model (all its aliases must use the same one).
            index: for each dimension of ``shape`` the global indices of the slice, int64, 1-D.
            shape: of the whole parameter.
            dtype: of the result; draws are made in float64 and rounded once.

        Returns:
            Tensor of shape ``[len(i) for i in index]`` on the device of ``index``, equal to that slice of the full draw.
        """


@dataclass(frozen=True)
class Normal(Init):
    """Normal with mean 0 and standard deviation ``std``."""

    std: float

    def __post_init__(self) -> None:
        _check_positive("Normal(std)", self.std)

    def draw(
        self, seed: int, name: str, index: Sequence[Tensor], shape: Sequence[int], *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return _draw(normal_at, 0.0, self.std, seed, name, index, shape, dtype)


@dataclass(frozen=True)
class Uniform(Init):
    """Uniform in (-bound, bound)."""

    bound: float

    def __post_init__(self) -> None:
        _check_positive("Uniform(bound)", self.bound)

    def draw(
        self, seed: int, name: str, index: Sequence[Tensor], shape: Sequence[int], *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return _draw(uniform_at, -self.bound, 2.0 * self.bound, seed, name, index, shape, dtype)


@dataclass(frozen=True)
class XavierUniform(Init):
    """Uniform in ±sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio, 2010).

    Args:
        fan_in, fan_out: None takes them from the parameter's shape [out, in, ...]: ``shape[0]`` outputs and the product of
            the rest as inputs, so that a convolution is seen as the linear layer on its patches. Give them where a matrix
            is part of a larger one (query, key and value drawn as one fused projection).
    """

    fan_in: int | None = None
    fan_out: int | None = None

    def bound(self, shape: Sequence[int]) -> float:
        if len(shape) < 2 and (self.fan_in is None or self.fan_out is None):
            raise UserError(
                f"XavierUniform needs a matrix, got shape {tuple(shape)}: use Zeros(), Normal(std) or give fan_in and fan_out."
            )
        fan_in = self.fan_in if self.fan_in is not None else math.prod(shape[1:])
        fan_out = self.fan_out if self.fan_out is not None else shape[0]
        return math.sqrt(6.0 / (fan_in + fan_out))

    def draw(
        self, seed: int, name: str, index: Sequence[Tensor], shape: Sequence[int], *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return Uniform(self.bound(shape)).draw(seed, name, index, shape, dtype=dtype)


@dataclass(frozen=True)
class FanIn(Init):
    """Of variance ``scale / fan_in``: a normal that is cut off at two of its deviations (those before the cut)."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("FanIn(scale)", self.scale)

    def draw(
        self, seed: int, name: str, index: Sequence[Tensor], shape: Sequence[int], *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        if len(shape) < 2:
            raise UserError(f"FanIn needs a matrix, got shape {tuple(shape)}: use Zeros() or Normal(std).")
        std = math.sqrt(self.scale / math.prod(shape[1:])) / _CUT_STD
        return _draw(_cut_normal_at, 0.0, std, seed, name, index, shape, dtype)


#: deviation of a standard normal that is cut off at -2 and 2
_CUT_STD = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))


def _cut_normal_at(seed: int, purpose: str, stream: Tensor, element: Tensor) -> Tensor:
    inside = math.erf(math.sqrt(2))  # the part of a normal that is not cut off
    return math.sqrt(2) * torch.erfinv((2 * uniform_at(seed, purpose, stream, element) - 1) * inside)


@dataclass(frozen=True)
class Zeros(Init):
    """All zeros."""

    def draw(
        self, seed: int, name: str, index: Sequence[Tensor], shape: Sequence[int], *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return torch.zeros(_lengths(index, shape), dtype=dtype, device=_device(index))


@dataclass(frozen=True)
class Ones(Init):
    """All ones."""

    def draw(
        self, seed: int, name: str, index: Sequence[Tensor], shape: Sequence[int], *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return torch.ones(_lengths(index, shape), dtype=dtype, device=_device(index))


@dataclass(frozen=True)
class Constant(Init):
    """All ``value``."""

    value: float

    def draw(
        self, seed: int, name: str, index: Sequence[Tensor], shape: Sequence[int], *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return torch.full(_lengths(index, shape), self.value, dtype=dtype, device=_device(index))


def _draw(
    sample: Sample,
    shift: float,
    scale: float,
    seed: int,
    name: str,
    index: Sequence[Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty(_lengths(index, shape), dtype=dtype, device=_device(index))
    if out.numel() == 0:
        return out
    # element number of (i, j, ...) = i*stride_0 + j*stride_1 + ...: the sum of one vector per dimension
    offsets = [i.to(torch.int64) * math.prod(shape[dim + 1 :]) for dim, i in enumerate(index)]
    inner = torch.zeros((), dtype=torch.int64, device=out.device)
    for offset in offsets[1:]:
        inner = inner.unsqueeze(-1) + offset
    inner = inner.reshape(-1)
    first = offsets[0] if offsets else torch.zeros(1, dtype=torch.int64, device=out.device)
    flat = out.view(first.numel(), inner.numel())
    stream = torch.zeros((), dtype=torch.int64, device=out.device)
    rows = max(1, _CHUNK // inner.numel())
    for start in range(0, first.numel(), rows):
        element = first[start : start + rows, None] + inner
        flat[start : start + rows] = sample(seed, f"init/{name}", stream, element) * scale + shift
    return out


def _lengths(index: Sequence[Tensor], shape: Sequence[int]) -> list[int]:
    if len(index) != len(shape):
        raise UserError(f"init: {len(index)} index vectors for a parameter of shape {tuple(shape)}; give one per dimension.")
    return [i.numel() for i in index]


def _device(index: Sequence[Tensor]) -> torch.device:
    return index[0].device if index else torch.device("cpu")


def _check_positive(what: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"{what} must be above 0, got {value}; use Zeros() for zeros.")
