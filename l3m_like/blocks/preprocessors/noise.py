"""Noise for flow matching and diffusion (SiT, arXiv:2401.08740): t = 1 is data, t = 0 is noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.random import normal, uniform
from l3m_like.layers.interpolant import Interpolant, shift_time

TIMES = ("uniform", "logit_normal")


class FlowNoise(ReadWriteBlock):
    """Mix data with noise at a random time, and give what the model is to predict there.

    Reads   image [B, C, H, W] floating point; row [B] int64
    Writes  noised, target [B, C, H, W] in the image's dtype, at least float32; time [B] float32 in (0, 1); flow_weight [B]
            float32, the factor on the row's squared error

    Args:
        seed: of the run; noise and times are functions of (seed, stream, row).
        path: "linear", "gvp" or "vp", see ``Interpolant``.
        prediction: "velocity", "score" or "noise".
        weight: of the squared error of a score or noise: "none", "velocity" or "likelihood".
        times: how times are drawn: "uniform", or "logit_normal": sigmoid(mean + std z) (SD3, arXiv:2403.03206).
        mean, std: of logit-normal times (None: 0 and 1); a negative mean draws more noise.
        shift: moves the drawn times towards noise, see ``shift_time``; 1: not at all.
        margin: distance of the times from singular ends (None: as published, see ``Interpolant.interval``).
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("noised", "time", "target", "flow_weight")

    def __init__(
        self,
        seed: int,
        path: str = "linear",
        prediction: str = "velocity",
        weight: str = "none",
        times: str = "uniform",
        mean: float | None = None,
        std: float | None = None,
        shift: float = 1.0,
        margin: float | None = None,
        **ports: Any,
    ) -> None:
        super().__init__(**ports)
        if times not in TIMES:
            raise UserError(f"FlowNoise: no times '{times}'. {did_you_mean(times, TIMES)}")
        if times == "uniform" and (mean is not None or std is not None):
            raise UserError("FlowNoise: mean and std belong to times: logit_normal; uniform times have none.")
        for name, value in (("std", std), ("shift", shift)):
            if value is not None and not value > 0:
                raise UserError(f"FlowNoise: {name} is {value}; it must be above 0.")
        if margin is not None and not 0 <= margin < 0.5:
            raise UserError(f"FlowNoise: margin is {margin}; it must be in 0 .. 0.5.")
        self.seed = seed
        self.interpolant = Interpolant(path, prediction)
        self.interpolant.loss_weight(torch.tensor([0.5]), weight)  # refuses what does not go together
        self.weight = weight
        self.times = times
        self.mean = 0.0 if mean is None else mean
        self.std = 1.0 if std is None else std
        self.shift = shift
        self.start, self.end = self.interpolant.interval(margin, training=True)

    def compute(self, image: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        purpose = f"flow_noise/{self.stream or ''}"
        # drawn in float32 whatever the image's dtype, so that runs in float32 and float64 see the same noise
        if self.times == "uniform":
            time = uniform(row, seed=self.seed, purpose=f"{purpose}/time")
        else:
            time = torch.sigmoid(self.mean + self.std * normal(row, seed=self.seed, purpose=f"{purpose}/time"))
        if self.shift != 1:
            time = shift_time(time, self.shift)
        time = self.start + (self.end - self.start) * time
        image = image.to(torch.promote_types(image.dtype, torch.float32))
        noise = normal(row, tuple(image.shape[1:]), seed=self.seed, purpose=f"{purpose}/noise").to(image.dtype)
        at = self.interpolant.at(time, image)
        target = self.interpolant.target(image, noise, time)
        weight = self.interpolant.loss_weight(time, self.weight).to(time.dtype)
        return at.alpha * image + at.sigma * noise, time, target, weight
