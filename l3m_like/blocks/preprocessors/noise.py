"""Noise for flow matching (SiT, arXiv:2401.08740): t = 1 is data, t = 0 is noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.random import normal, uniform


def linear_path(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t = t * data + (1 - t) * noise."""
    one = torch.ones_like(t)
    return t, 1 - t, one, -one


def gvp_path(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t = sin(pi t / 2) * data + cos(pi t / 2) * noise, which keeps the variance."""
    angle = t * (math.pi / 2)
    return angle.sin(), angle.cos(), angle.cos() * (math.pi / 2), angle.sin() * (-math.pi / 2)


#: name -> function of t giving (alpha, sigma, d alpha/dt, d sigma/dt) of x_t = alpha * data + sigma * noise
PATHS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]] = {"linear": linear_path, "gvp": gvp_path}


class FlowNoise(ReadWriteBlock):
    """Mix data with noise at a random time, and give the velocity that leads from noise to data.

    Reads   image [B, C, H, W] floating point; row [B] int64
    Writes  noised, velocity [B, C, H, W] in the image's dtype, at least float32; time [B] float32 in (0, 1), uniform

    Args:
        seed: of the run; noise and times are functions of (seed, stream, row).
        path: "linear" or "gvp".
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("noised", "time", "velocity")

    def __init__(self, seed: int, path: str = "linear", **ports: Any) -> None:
        super().__init__(**ports)
        if path not in PATHS:
            raise UserError(f"FlowNoise: no path '{path}'. {did_you_mean(path, PATHS)}")
        self.seed = seed
        self.path = path

    def compute(self, image: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        purpose = f"flow_noise/{self.stream or ''}"
        # drawn in float32 whatever the image's dtype, so that runs in float32 and float64 see the same noise
        time = uniform(row, seed=self.seed, purpose=f"{purpose}/time")
        image = image.to(torch.promote_types(image.dtype, torch.float32))
        noise = normal(row, tuple(image.shape[1:]), seed=self.seed, purpose=f"{purpose}/noise").to(image.dtype)
        t = time.to(image.dtype).view(-1, *([1] * (image.dim() - 1)))
        alpha, sigma, alpha_slope, sigma_slope = PATHS[self.path](t)
        return alpha * image + sigma * noise, time, alpha_slope * image + sigma_slope * noise
