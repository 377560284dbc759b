"""Images from noise: the ordinary differential equation of a flow-matching model (SiT, arXiv:2401.08740)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.random import normal
from l3m_like.distributed.mesh import Mesh
from l3m_like.generate.sampler import Inference, collect, deal, sampling

#: velocity(x, t) with x [B, ...] and a time t, a number
Velocity = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Images:
    """Generated images [N, C, H, W] (CPU, at least float32, [-1, 1] where the data is) of the classes ``labels`` [N]."""

    images: Tensor
    labels: Tensor
    columns: int
    suffix: str = ".png"

    def __str__(self) -> str:
        count, channels, height, width = self.images.shape
        return f"{count} images of {height}x{width}x{channels}, row by row of the classes {self.labels.tolist()}"

    def grid(self) -> np.ndarray:
        """All of them as one picture, see ``grid``."""
        return grid(self.images, self.columns)

    def save(self, path: str | Path) -> Path:
        """Write the grid as PNG."""
        from PIL import Image  # only for writing

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = self.grid()
        Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture).save(path, format="PNG")
        return path


class FlowODE:
    """Integrate dx/dt = v(x, t, class) from noise (t = 0) to data (t = 1).

    Supplies   <stream>_noised [B, C, H, W]; <stream>_time [B]; <stream>_class_id [B] int64 (``classes`` is the null class)
    Takes      <stream>_velocity_pred [B, C, H, W]

    The noise is a function of (seed, row): it does not depend on the batch or the mesh.

    Args:
        shape: (C, H, W) of one sample.
        classes: number of real classes.
        steps: equal steps of time.
        method: "euler" (order 1, one evaluation per step) or "heun" (order 2, two evaluations).
        guidance: w of classifier-free guidance, v = v_null + w (v_class - v_null) (arXiv:2207.12598). 1: the plain conditional
            model; another w needs a model trained with dropped labels, and doubles the rows of an evaluation.
        num_samples: how many.
        labels: class numbers, repeated until there are enough; None: all classes in order.
        batch: rows computed at a time, per rank.
        seed: of the noise.
        stream: of the model's blocks.

    Raises:
        UserError: settings out of range; a model that does not fit.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        *,
        steps: int = 25,
        method: str = "euler",
        guidance: float = 1.0,
        num_samples: int = 40,
        labels: Sequence[int] | None = None,
        batch: int = 64,
        seed: int = 0,
        stream: str = "image",
    ) -> None:
        if len(shape) != 3 or min(shape) < 1:
            raise UserError(f"FlowODE: shape is {list(shape)}; it is [channels, height, width].")
        for name, value in (("classes", classes), ("steps", steps), ("num_samples", num_samples), ("batch", batch)):
            if value < 1:
                raise UserError(f"FlowODE: {name} is {value}; it is at least 1.")
        if method not in METHODS:
            raise UserError(f"FlowODE: no method '{method}'. {did_you_mean(method, METHODS)}")
        if guidance < 0:
            raise UserError(f"FlowODE: guidance is {guidance}; 0 ignores the class, 1 is the plain model, 2 to 4 are usual.")
        self.labels = list(range(classes) if labels is None else labels)
        for label in self.labels:
            if not 0 <= label < classes:
                raise UserError(f"FlowODE: label {label} is not one of the {classes} classes 0 .. {classes - 1}.")
        if not self.labels:
            raise UserError("FlowODE: labels is empty; leave it out for all classes.")
        self.shape = tuple(shape)
        self.classes = classes
        self.steps = steps
        self.method = method
        self.guidance = guidance
        self.num_samples = num_samples
        self.batch = batch
        self.seed = seed
        self.stream = stream

    def run(self, model: nn.Module, *, process: Any = None, mesh: Mesh | None = None) -> Images:
        """Sample from ``model`` as it is now; see ``Sampler.run``. ``process`` is not needed."""
        found: dict[int, Tensor] = {}
        with sampling(model) as graph:
            self.check(graph)
            for rows, count in deal(self.num_samples, self.batch, mesh):
                images = self._generate(graph, rows).cpu()
                found |= dict(zip(rows, images, strict=True)) if count else {}
        labels = torch.tensor([self._label(row) for row in range(self.num_samples)])
        return Images(torch.stack(collect(found, mesh)), labels, columns=min(len(self.labels), self.num_samples, 10))

    def check(self, graph: Inference) -> None:
        """Raise a UserError unless the model reads what this sampler supplies and writes what it takes."""
        supplied = [self._key(port) for port in ("noised", "time", "class_id")]
        graph.check("FlowODE", supplied, supplied, self._key("velocity_pred"))

    def _key(self, port: str) -> str:
        return f"{self.stream}_{port}"

    def _label(self, row: int) -> int:
        return self.labels[row % len(self.labels)]

    def _generate(self, graph: Inference, rows: Sequence[int]) -> Tensor:
        # the state stays in float32 under a bf16 model: it sums many small steps
        dtype = torch.promote_types(graph.dtype, torch.float32)
        row = torch.tensor(rows, device=graph.device)
        noise = normal(row, self.shape, seed=self.seed, purpose=f"flow_ode/{self.stream}", dtype=dtype)
        labels = torch.tensor([self._label(row) for row in rows], device=graph.device)
        return METHODS[self.method](self.velocity(graph, labels), noise, self.steps)

    def velocity(self, graph: Callable[[dict[str, Any]], dict[str, Any]], labels: Tensor) -> Velocity:
        """The guided velocity of ``labels`` [B] under the model ``graph``."""
        guided = self.guidance != 1.0
        class_id = torch.cat((labels, torch.full_like(labels, self.classes))) if guided else labels

        def velocity(x: Tensor, t: float) -> Tensor:
            noised = torch.cat((x, x)) if guided else x
            time = torch.full((len(noised),), t, dtype=x.dtype, device=x.device)
            data = {self._key("noised"): noised, self._key("time"): time, self._key("class_id"): class_id}
            out = graph(data)[self._key("velocity_pred")].to(x.dtype)
            if not guided:
                return out
            conditional, null = out.chunk(2)
            return null + self.guidance * (conditional - null)

        return velocity


def euler(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """``x`` at t = 1 from ``x`` at t = 0: x += dt v(x, t)."""
    for step in range(steps):
        x = x + velocity(x, step / steps) / steps
    return x


def heun(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """As ``euler``, with the mean of the velocities at both ends of the step."""
    for step in range(steps):
        first = velocity(x, step / steps)
        second = velocity(x + first / steps, (step + 1) / steps)
        x = x + (first + second) / (2 * steps)
    return x


METHODS: dict[str, Callable[[Velocity, Tensor, int], Tensor]] = {"euler": euler, "heun": heun}


def grid(images: Tensor, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Images [N, C, H, W] in [-1, 1] as one picture: uint8 [rows * (H + gap) - gap, columns * (W + gap) - gap, C], row by row.

    Args:
        images: C is 1 (grey) or 3 (RGB); values outside [-1, 1] are clipped.
        columns: per row (None: as many as rows).
        gap: white pixels between images.

    Raises:
        UserError: other channels.
    """
    count, channels, height, width = images.shape
    if channels not in (1, 3):
        raise UserError(f"grid: images have {channels} channels; a picture has 1 or 3. Latents must be decoded first.")
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    picture = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, dtype=np.uint8)
    for number, image in enumerate(pixels):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        picture[top : top + height, left : left + width] = image
    return picture
