"""Images from noise: the probability-flow ODE and the reverse SDE of a flow or diffusion model (SiT, arXiv:2401.08740)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.random import normal
from l3m_like.distributed.mesh import Mesh
from l3m_like.generate.sampler import Inference, collect, deal, sampling
from l3m_like.generate.solvers import SOLVERS, dopri5, tolerances
from l3m_like.layers.interpolant import Coefficients, Interpolant, shift_time

#: what a model predicts, or the velocity, as a function of x [B, C, H, W] and times t [B]
Field = Callable[[Tensor, Tensor], Tensor]

#: the inference graph of a model: keys -> keys
Model = Callable[[dict[str, Any]], dict[str, Any]]

#: D(t) of the reverse SDE, as a function of t and the path's coefficients there
DIFFUSIONS: dict[str, Callable[[Tensor, Coefficients], Tensor]] = {
    "constant": lambda t, at: torch.ones_like(t),
    "sbdm": lambda t, at: at.diffusion,
    "sigma": lambda t, at: at.sigma,
    "linear": lambda t, at: 1 - t,
    "decreasing": lambda t, at: (torch.cos(math.pi * t) + 1).square() / 4,
    "bump": lambda t, at: torch.sin(math.pi * t).square(),
}
LAST_STEPS = ("mean", "tweedie", "euler", "none")


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


@dataclass
class FlowSampler:
    """What the samplers of flows share: noise that is a function of (seed, row), labels, guidance, times.

    Supplies   <stream>_noised [B, C, H, W]; <stream>_time [B]; <stream>_class_id [B] int64 (``classes`` is the null class)
    Takes      <stream>_prediction [B, C, H, W]

    A sample does not depend on its batch or the mesh.

    Args:
        shape: (C, H, W) of one sample.
        classes: number of real classes.
        steps: of time.
        path, prediction: that the model was trained with, see ``Interpolant``.
        margin: distance of the times from singular ends (None: as published, see ``Interpolant.interval``).
        shift: steps are shorter near noise, see ``shift_time``; that of the training is usual.
        last: where the grid of times ends before it is shifted (RAE stops at 0.999).
        guidance: w of classifier-free guidance, null + w (conditional - null) (arXiv:2207.12598). 1: the plain conditional
            model; another w needs a model trained with dropped labels, and doubles the rows of an evaluation.
        guidance_interval: times [first, last] within which guidance acts (arXiv:2404.07724).
        guidance_channels: guidance acts on this many channels, the others are the conditional model's (None: all). The
            published SiT samples were made with 3 of 4.
        num_samples: how many.
        labels: class numbers, repeated until there are enough; None: all classes in order.
        batch: rows computed at a time, per rank.
        seed: of the noise.
        stream: of the model's blocks.
        embeddings: of texts instead of classes: a ``.npy`` file of ``classes`` pooled embeddings, of which ``labels`` choose.
            Then <stream>_text [B, E] and <stream>_text_kept [B] are supplied instead of <stream>_class_id.
        decoder: makes pictures of what was integrated, e.g. ``LatentDecoder`` (None: these are the pictures).

    Raises:
        UserError: settings out of range; a model that does not fit.
    """

    shape: Sequence[int]
    classes: int
    _: KW_ONLY
    steps: int = 25
    path: str = "linear"
    prediction: str = "velocity"
    margin: float | None = None
    shift: float = 1.0
    last: float = 1.0
    guidance: float = 1.0
    guidance_interval: Sequence[float] = (0.0, 1.0)
    guidance_channels: int | None = None
    num_samples: int = 40
    labels: Sequence[int] | None = None
    batch: int = 64
    seed: int = 0
    stream: str = "image"
    decoder: Any = None
    embeddings: str | None = None
    _table: Tensor | None = field(init=False, default=None, repr=False)
    interpolant: Interpolant = field(init=False)

    def __post_init__(self) -> None:
        name = type(self).__name__
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise UserError(f"{name}: shape is {list(self.shape)}; it is [channels, height, width].")
        for setting in ("classes", "steps", "num_samples", "batch"):
            if getattr(self, setting) < 1:
                raise UserError(f"{name}: {setting} is {getattr(self, setting)}; it is at least 1.")
        if self.guidance < 0:
            raise UserError(f"{name}: guidance is {self.guidance}; 0 ignores the class, 1 is the plain model, 2 to 4 are usual.")
        if not self.shift > 0:
            raise UserError(f"{name}: shift is {self.shift}; it must be above 0 (1: none).")
        if not 0 < self.last <= 1:
            raise UserError(f"{name}: last is {self.last}; it must be above 0 and at most 1.")
        self.guidance_interval = tuple(self.guidance_interval)
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] < self.guidance_interval[1] <= 1:
            raise UserError(f"{name}: guidance_interval is {list(self.guidance_interval)}; two times in 0 .. 1, in order.")
        if self.guidance_channels is not None and not 1 <= self.guidance_channels <= self.shape[0]:
            raise UserError(f"{name}: guidance_channels is {self.guidance_channels}; samples have {self.shape[0]} channels.")
        self.labels = list(range(self.classes) if self.labels is None else self.labels)
        for label in self.labels:
            if not 0 <= label < self.classes:
                raise UserError(f"{name}: label {label} is not one of the {self.classes} classes 0 .. {self.classes - 1}.")
        if not self.labels:
            raise UserError(f"{name}: labels is empty; leave it out for all classes.")
        self.shape = tuple(self.shape)
        self.interpolant = Interpolant(self.path, self.prediction)

    def run(self, model: nn.Module, *, process: Any = None, mesh: Mesh | None = None, guide: nn.Module | None = None) -> Images:
        """Sample from ``model`` as it is now; see ``Sampler.run``. ``process`` is not needed.

        Args:
            guide: a weaker model of the same kind (smaller, or trained for less), from which guidance leads away instead of from
                the prediction without a class: guide + w (model - guide), both of the class (autoguidance, arXiv:2406.02507).
        """
        found: dict[int, Tensor] = {}
        for rows, images, count in self.chunks(model, mesh, guide):
            found |= dict(zip(rows, images.cpu(), strict=True)) if count else {}
        assert self.labels is not None
        every = torch.tensor([self.label(row) for row in range(self.num_samples)])
        return Images(torch.stack(collect(found, mesh)), every, columns=min(len(self.labels), self.num_samples, 10))

    def chunks(
        self, model: nn.Module, mesh: Mesh | None = None, guide: nn.Module | None = None
    ) -> Iterator[tuple[list[int], Tensor, bool]]:
        """This rank's samples as they are made: (their numbers, images [B, C, H, W] on the device, do they count).

        For more of them than fit into memory. Every rank yields as often; the images of a rank that has no more do not count.
        """
        if guide is not None and self.guidance == 1:
            raise UserError(
                f"{type(self).__name__}: there is a guide, and guidance is 1, which ignores it. Set guidance, say to 1.5."
            )
        with ExitStack() as models:
            graph = models.enter_context(sampling(model))
            weaker = None if guide is None else models.enter_context(sampling(guide))
            for each in (graph,) if weaker is None else (graph, weaker):
                self.check(each)
            share = -(-self.num_samples // (mesh.dp_size if mesh is not None else 1))
            for rows, count in deal(self.num_samples, self.batch, mesh):
                # the last chunk is filled up, so that all have one shape and a compiled model has one graph
                full = rows + rows[-1:] * (min(self.batch, share) - len(rows))
                row = torch.tensor(full, device=graph.device)
                labels = torch.tensor([self.label(number) for number in full], device=graph.device)
                # the state stays in float32 under a bf16 model: it sums many small steps
                noise = self.noise(row, torch.promote_types(graph.dtype, torch.float32))
                images = self.integrate(self.predict(graph, labels, weaker), noise, row, mesh)
                yield rows, (images if self.decoder is None else self.decoder(images))[: len(rows)], count

    def check(self, graph: Inference) -> None:
        """Raise a UserError unless the model reads what this sampler supplies and writes what it takes."""
        conditions = ("class_id",) if self.embeddings is None else ("text", "text_kept")
        supplied = [self._key(port) for port in ("noised", "time", *conditions)]
        graph.check(type(self).__name__, supplied, supplied, self._key("prediction"))

    def conditions(self, class_id: Tensor) -> dict[str, Tensor]:
        """The ports that say what is to be shown, of classes or of the texts with these numbers (``classes``: of none)."""
        if self.embeddings is None:
            return {"class_id": class_id}
        if self._table is None or self._table.device != class_id.device:
            self._table = self._read(self.embeddings).to(class_id.device)
        return {"text": self._table[class_id], "text_kept": class_id != self.classes}

    def _read(self, path: str) -> Tensor:
        """The embeddings [classes + 1, E], the last row zeros."""
        try:
            table = torch.from_numpy(np.load(path, allow_pickle=False)).float()
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{type(self).__name__}: embeddings = {path} cannot be read: {error}") from error
        if table.dim() != 2 or len(table) != self.classes:
            shape = f"{list(table.shape)}; [classes, E] with {self.classes} is needed"
            raise UserError(f"{type(self).__name__}: embeddings are {shape}.")
        return torch.cat((table, torch.zeros_like(table[:1])))

    def integrate(self, predict: Field, x: Tensor, row: Tensor, mesh: Mesh | None = None) -> Tensor:
        """Samples [B, C, H, W] from noise ``x`` of the rows ``row`` [B]."""
        raise NotImplementedError

    def noise(self, row: Tensor, dtype: torch.dtype, step: int | None = None) -> Tensor:
        """Standard normal [B, C, H, W]: the start of the rows ``row`` [B], or the noise of a step."""
        purpose = f"flow_ode/{self.stream}" if step is None else f"flow_sde/{self.stream}/{step}"
        return normal(row, tuple(self.shape), seed=self.seed, purpose=purpose, dtype=dtype)

    def times(self, start: float, end: float, steps: int) -> list[float]:
        """``steps`` + 1 times from ``start`` to ``end``: equal steps, then moved towards noise by ``shift``."""
        moved = shift_time(self.last * torch.arange(steps + 1, dtype=torch.float64) / steps, self.shift)
        return (start + (end - start) * moved).tolist()

    def predict(self, graph: Model, labels: Tensor, guide: Model | None = None) -> Field:
        """The guided prediction of the model ``graph`` for ``labels`` [B]; see ``run`` for ``guide``."""
        class_id = torch.cat((labels, torch.full_like(labels, self.classes)))
        first, last = self.guidance_interval
        always = (first, last) == (0, 1)
        guided_channels = self.shape[0] if self.guidance_channels is None else self.guidance_channels

        def predicted(model: Model, x: Tensor, t: Tensor, times: int) -> Tensor:
            ports = {"noised": x.repeat(times, 1, 1, 1), "time": t.to(x.dtype).repeat(times)}
            ports |= self.conditions(class_id[: times * len(x)])
            return model({self._key(port): value for port, value in ports.items()})[self._key("prediction")].to(x.dtype)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            inside = (t >= first) & (t <= last)
            # a guide may be sharded: every rank calls it, whatever the times of its rows
            guided = self.guidance != 1 and (always or guide is not None or bool(inside.any()))
            out = predicted(graph, x, t, 2 if guided and guide is None else 1)
            if not guided:
                return out
            conditional, null = out.chunk(2) if guide is None else (out, predicted(guide, x, t, 1))
            channels = torch.arange(x.shape[1], device=x.device) < guided_channels
            where = inside.view(-1, 1, 1, 1) & channels.view(1, -1, 1, 1)
            return torch.where(where, null + self.guidance * (conditional - null), conditional)

        return predict

    def _key(self, port: str) -> str:
        return f"{self.stream}_{port}"

    def label(self, row: int) -> int:
        """The class of the sample with this number."""
        assert self.labels is not None
        return self.labels[row % len(self.labels)]


@dataclass(kw_only=True)
class FlowODE(FlowSampler):
    """Integrate the probability-flow ODE dx/dt = v(x, t, class) from noise (t = 0) to data (t = 1); see ``FlowSampler``.

    Args:
        method: "euler" (order 1, one evaluation per step), "heun" (order 2, two) or "dopri5" (order 5, six; every row takes as
            many steps as it needs, so small that the error of one stays below ``atol + rtol |x|``; ``steps`` sets the length of
            the first one, and a ``shift`` is refused).
        atol, rtol: of dopri5 (None: 1e-6 and 1e-3).
    """

    method: str = "euler"
    atol: float | None = None
    rtol: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in (*SOLVERS, "dopri5"):
            raise UserError(f"FlowODE: no method '{self.method}'. {did_you_mean(self.method, (*SOLVERS, 'dopri5'))}")
        if self.method == "dopri5" and self.shift != 1:
            raise UserError(f"FlowODE: shift is {self.shift}, but dopri5 chooses its steps itself; set shift: 1, or take heun.")
        self.tolerances = tolerances("FlowODE", self.method, self.atol, self.rtol, (1e-6, 1e-3))

    def integrate(self, predict: Field, x: Tensor, row: Tensor, mesh: Mesh | None = None) -> Tensor:
        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return self.interpolant.velocity(predict(x, t), x, t)

        start, end = self.interpolant.interval(self.margin)
        if self.method == "dopri5":
            atol, rtol = self.tolerances
            end = start + (end - start) * self.last
            return dopri5(velocity, x, start, end, steps=self.steps, atol=atol, rtol=rtol, mesh=mesh)
        return SOLVERS[self.method](velocity, x, self.times(start, end, self.steps))


@dataclass(kw_only=True)
class FlowSDE(FlowSampler):
    """Integrate the reverse SDE dx = (v + D(t) score) dt + sqrt(2 D(t)) dW from noise to data; see ``FlowSampler``.

    With the exact velocity, every D gives the same distribution at every time; with a learned one they differ. The noise of
    a step is a function of (seed, row, step).

    Args:
        steps: of time, the last one included.
        method: "euler" (Euler-Maruyama, order 1 in distribution), or "heun" (the mean of the drifts at both ends of the step,
            its noise included: order 2; the published sampler of that name adds the noise first, which has order 1).
        diffusion: D(t): "constant" (1), "sbdm" (lambda, see ``Coefficients.diffusion``), "sigma" (sigma), "linear" (1 - t),
            "decreasing" ((cos(pi t) + 1)^2 / 4) or "bump" (sin(pi t)^2), each times ``norm``.
        norm: factor of D.
        last_step: from t = 1 - ``last_size`` to the end, without noise: "mean" (a step of the drift), "tweedie" (E[data | x]),
            "euler" (a step of the velocity), or "none", which ends there.
        last_size: length of the last step.
        margin: distance of the first time from 0, where alpha is 0 (None: 1e-3; on the vp path 0).
    """

    steps: int = 250
    method: str = "euler"
    diffusion: str = "sigma"
    norm: float = 1.0
    last_step: str = "mean"
    last_size: float = 0.04

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("method", tuple(SOLVERS)), ("diffusion", tuple(DIFFUSIONS)), ("last_step", LAST_STEPS)):
            if getattr(self, name) not in known:
                raise UserError(f"FlowSDE: no {name} '{getattr(self, name)}'. {did_you_mean(getattr(self, name), known)}")
        if not 0 < self.last_size < 1:
            raise UserError(f"FlowSDE: last_size is {self.last_size}; it is a part of the time, above 0 and below 1.")
        if not self.norm >= 0:
            raise UserError(f"FlowSDE: norm is {self.norm}; it is at least 0 (no noise).")
        if self.last != 1:
            raise UserError(f"FlowSDE: last is {self.last}; where its grid ends is last_size. Leave it at 1.")
        if self.steps < 2:
            raise UserError(f"FlowSDE: steps is {self.steps}; the last one has no noise, so at least 2 are needed.")

    def grid(self) -> list[float]:
        """The times of all steps but the last."""
        margin = self.margin if self.margin is not None else (0.0 if self.path == "vp" else 1e-3)
        return self.times(margin, 1 - self.last_size, self.steps - 1)

    def drift(self, predict: Field, x: Tensor, t: Tensor) -> Tensor:
        """v + D score at ``x`` and times ``t`` [B]."""
        found = predict(x, t)
        return self.interpolant.velocity(found, x, t) + self._diffusion(t, x) * self.interpolant.score(found, x, t)

    def step(self, predict: Field, x: Tensor, t: float, size: float, noise: Tensor) -> Tensor:
        """``x`` at t + ``size`` from ``x`` at t, with standard normal ``noise`` like x."""
        now = x.new_full((len(x),), t, dtype=torch.float64)
        if self.method == "euler":
            return x + size * self.drift(predict, x, now) + (2 * size * self._diffusion(now, x)).sqrt() * noise
        kick = (2 * size * self._diffusion(now + size / 2, x)).sqrt() * noise
        first = self.drift(predict, x, now)
        return x + size / 2 * (first + self.drift(predict, x + size * first + kick, now + size)) + kick

    def finish(self, predict: Field, x: Tensor) -> Tensor:
        """The last step."""
        now = x.new_full((len(x),), 1 - self.last_size, dtype=torch.float64)
        if self.last_step == "none":
            return x
        if self.last_step == "mean":
            return x + self.last_size * self.drift(predict, x, now)
        found = predict(x, now)
        if self.last_step == "tweedie":
            return self.interpolant.data(found, x, now)
        return x + self.last_size * self.interpolant.velocity(found, x, now)

    def integrate(self, predict: Field, x: Tensor, row: Tensor, mesh: Mesh | None = None) -> Tensor:
        times = self.grid()
        for number, (t, following) in enumerate(zip(times, times[1:], strict=False)):
            x = self.step(predict, x, t, following - t, self.noise(row, x.dtype, number))
        return self.finish(predict, x)

    def _diffusion(self, t: Tensor, like: Tensor) -> Tensor:
        return self.norm * DIFFUSIONS[self.diffusion](t.to(like.dtype).view(-1, 1, 1, 1), self.interpolant.at(t, like))


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
        raise UserError(f"grid: images have {channels} channels; a picture 1 or 3. Decode latents first (--decode RUN).")
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    picture = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, dtype=np.uint8)
    for number, image in enumerate(pixels):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        picture[top : top + height, left : left + width] = image
    return picture
