"""Latent images: noise on them, and their statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.core.block import Data, ReadWriteBlock
from l3m_like.core.errors import UserError
from l3m_like.core.init import Init
from l3m_like.core.random import normal, uniform


class LatentNoise(ReadWriteBlock):
    """Noise of a random strength on every latent, so that a decoder forgives the errors of a generator (RAE, arXiv:2510.11690,
    section 4.3): ``latent + s z``, s uniform in [0, strength], z standard normal. At inference the latent as it is.

    Reads   latent [B, D, h, w]; row [B] int64
    Writes  code [B, D, h, w] in the latent's dtype

    Args:
        seed: of the run; draws are functions of (seed, stream, row).
        strength: the largest deviation.
        ports: reads, writes, stream of ``ReadWriteBlock``.
    """

    outputs = ("code",)

    def __init__(self, seed: int, strength: float, **ports: Any) -> None:
        super().__init__(**ports)
        if strength < 0:
            raise UserError(f"LatentNoise: strength is {strength}; it must be at least 0.")
        self.seed = seed
        self.strength = strength

    def forward(self, data: Data, inference: bool = False) -> Data:
        if inference:
            return data | {self.writes["code"]: data[self.reads["latent"]]}
        return super().forward(data)

    def compute(self, latent: Tensor, row: Tensor) -> Tensor:
        purpose = f"latent_noise/{self.stream or ''}"
        shape = tuple(latent.shape[1:])
        deviation = self.strength * uniform(row, (1,) * len(shape), seed=self.seed, purpose=f"{purpose}/strength")
        noise = normal(row, shape, seed=self.seed, purpose=f"{purpose}/noise")
        wide = torch.promote_types(latent.dtype, torch.float32)
        return (latent.to(wide) + (deviation * noise).to(wide)).to(latent.dtype)


@dataclass(frozen=True)
class Stored(Init):
    """The tensor ``name`` of a safetensors file, read when the parameter is filled."""

    path: str
    name: str

    def draw(
        self, seed: int, name: str, index: Sequence[Tensor], shape: Sequence[int], *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt") as file:
                whole = file.get_tensor(self.name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.path}: '{self.name}' cannot be read from it: {error}") from error
        if tuple(whole.shape) != tuple(shape):
            raise UserError(f"{self.path}: '{self.name}' has the shape {list(whole.shape)}, but {list(shape)} is needed.")
        for dim, places in enumerate(index):
            whole = whole.index_select(dim, places.cpu())
        return whole.to(index[0].device if index else "cpu", dtype)


class NormalizeLatent(ReadWriteBlock):
    """Latents with mean 0 and variance 1 per channel and place, over a data set: ``(latent - mean) / sqrt(variance + eps)``.

    Reads   latent [B, D, h, w]
    Writes  normalized [B, D, h, w]; ``inverse`` goes from such a one (the port ``latent`` again) back

    The statistics are parameters that are not trained: they are read from ``path`` when a run starts, and lie in its checkpoints.
    ``run/latent_statistics.py`` makes the file.

    Args:
        path: safetensors file with ``mean`` and ``variance`` [D, h, w].
        shape: [D, h, w].
        inverse: undo it.
        eps: added to the variance.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("normalized",)

    def __init__(self, path: str, shape: Sequence[int], inverse: bool = False, eps: float = 1e-5, **ports: Any) -> None:
        super().__init__(**ports)
        self.path = path
        self.inverse = inverse
        self.eps = eps
        self.mean = nn.Parameter(torch.empty(*shape), requires_grad=False)
        self.variance = nn.Parameter(torch.empty(*shape), requires_grad=False)

    def compute(self, latent: Tensor) -> Tensor:
        if latent.shape[1:] != self.mean.shape:
            raise UserError(f"NormalizeLatent: latents are {list(latent.shape[1:])}, its statistics {list(self.mean.shape)}.")
        return self.undo(latent) if self.inverse else self.apply_to(latent)

    def apply_to(self, latent: Tensor) -> Tensor:
        mean, deviation = self._numbers(latent)
        return ((latent.to(mean.dtype) - mean) / deviation).to(latent.dtype)

    def undo(self, normalized: Tensor) -> Tensor:
        mean, deviation = self._numbers(normalized)
        return (normalized.to(mean.dtype) * deviation + mean).to(normalized.dtype)

    def _numbers(self, like: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(like.dtype, torch.float32)
        return self.mean.to(wide), (self.variance.to(wide) + self.eps).sqrt()

    def flops(self, latent: Tensor) -> int:
        return 0  # no matrix product

    def init_spec(self) -> dict[str, Init]:
        return {name: Stored(self.path, name) for name in ("mean", "variance")}

    def tp_plan(self) -> dict[str, str]:
        return {"mean": "replicated", "variance": "replicated"}
