"""Likelihood of images under a flow, by the change of variables along its ODE (Song et al., arXiv:2011.13456)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor, nn

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.random import uniform
from l3m_like.distributed.mesh import Mesh
from l3m_like.generate.flow import Field
from l3m_like.generate.sampler import sampling
from l3m_like.generate.solvers import SOLVERS, dopri5, tolerances
from l3m_like.layers.interpolant import Interpolant

DIVERGENCES = ("hutchinson", "exact")


@dataclass
class FlowLikelihood:
    """log p(image | class) in nats: log N(x_0; 0, I) - integral of div v dt, along the ODE from the image back to noise.

    Args:
        classes: number of real classes.
        steps: of time (dopri5 takes as many as it needs, the first one 1 / ``steps`` of the way long).
        method: "euler", "heun" or "dopri5", see ``FlowODE``.
        divergence: "hutchinson", the unbiased estimate e^T (dv/dx) e with random signs e that are functions of (seed, row); or
            "exact", one backward pass per number of an image.
        path, prediction, margin: as of ``FlowODE``.
        seed: of the signs.
        stream: of the model's blocks.
        atol, rtol: of dopri5 (None: 1e-5 both).

    Raises:
        UserError: settings out of range; a model that does not fit.
    """

    classes: int
    _: KW_ONLY
    steps: int = 100
    method: str = "heun"
    divergence: str = "hutchinson"
    path: str = "linear"
    prediction: str = "velocity"
    margin: float | None = None
    seed: int = 0
    stream: str = "image"
    atol: float | None = None
    rtol: float | None = None
    interpolant: Interpolant = field(init=False)

    def __post_init__(self) -> None:
        methods = (*SOLVERS, "dopri5")
        if self.method not in methods:
            raise UserError(f"FlowLikelihood: no method '{self.method}'. {did_you_mean(self.method, methods)}")
        if self.divergence not in DIVERGENCES:
            raise UserError(f"FlowLikelihood: no divergence '{self.divergence}'. {did_you_mean(self.divergence, DIVERGENCES)}")
        for setting in ("classes", "steps"):
            if getattr(self, setting) < 1:
                raise UserError(f"FlowLikelihood: {setting} is {getattr(self, setting)}; it is at least 1.")
        self.tolerances = tolerances("FlowLikelihood", self.method, self.atol, self.rtol, (1e-5, 1e-5))
        self.interpolant = Interpolant(self.path, self.prediction)

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, rows: Tensor, *, mesh: Mesh | None = None) -> Tensor:
        """Nats [B] of ``images`` [B, C, H, W] of the classes ``labels`` [B] (``classes``: the null class), whose running
        numbers are ``rows`` [B] int64. Every rank of ``mesh`` calls it, with as many images."""
        keys = [f"{self.stream}_{port}" for port in ("noised", "time", "class_id")]
        result = f"{self.stream}_prediction"
        with sampling(model) as graph, _only_inputs(model):
            graph.check("FlowLikelihood", keys, keys, result)
            dtype = torch.promote_types(graph.dtype, torch.float32)
            given = labels.to(graph.device)

            def predict(x: Tensor, t: Tensor) -> Tensor:
                return graph(dict(zip(keys, (x, t.to(x.dtype), given), strict=True)))[result].to(x.dtype)

            return self.of(predict, images.to(graph.device, dtype), rows.to(graph.device), mesh=mesh)

    def of(self, predict: Field, images: Tensor, rows: Tensor, *, mesh: Mesh | None = None) -> Tensor:
        """Nats [B] of ``images`` [B, C, H, W] under the prediction of a model."""
        numbers = images[0].numel()
        signs = uniform(rows, tuple(images.shape[1:]), seed=self.seed, purpose=f"flow_likelihood/{self.stream}")
        signs = torch.where(signs < 0.5, -1.0, 1.0).to(images.dtype)
        first, last = self.interpolant.interval(self.margin)

        def backwards(state: Tensor, back: Tensor) -> Tensor:
            """d(x, integral of the divergence) / d(-t), at t = ``last`` - ``back``."""
            with torch.enable_grad():
                x = state[:, :numbers].reshape(images.shape).detach().requires_grad_()
                t = last - back
                velocity = self.interpolant.velocity(predict(x, t), x, t)
                divergence = self._divergence(velocity, x, signs)
            return torch.cat((-velocity.detach().flatten(1), -divergence.view(-1, 1)), dim=1)

        state = torch.cat((images.flatten(1), images.new_zeros(len(images), 1)), dim=1)
        if self.method == "dopri5":
            atol, rtol = self.tolerances
            state = dopri5(backwards, state, 0.0, last - first, steps=self.steps, atol=atol, rtol=rtol, mesh=mesh)
        else:
            times = [(last - first) * step / self.steps for step in range(self.steps + 1)]
            state = SOLVERS[self.method](backwards, state, times)
        noise, integral = state[:, :numbers], -state[:, numbers]
        prior = -0.5 * (noise.square().sum(1) + numbers * math.log(2 * math.pi))
        return prior - integral

    def _divergence(self, velocity: Tensor, x: Tensor, signs: Tensor) -> Tensor:
        if self.divergence == "hutchinson":
            (product,) = torch.autograd.grad(velocity, x, signs)
            return (product * signs).flatten(1).sum(1)
        flat = velocity.flatten(1)
        total = x.new_zeros(len(x))
        for number in range(flat.shape[1]):
            (row,) = torch.autograd.grad(flat[:, number].sum(), x, retain_graph=True)
            total = total + row.flatten(1)[:, number]
        return total


def bits_per_dimension(nats: Tensor, numbers: int, levels: int = 256) -> Tensor:
    """Bits per number of images in [-1, 1] that have ``levels`` values, from the nats of images with uniform noise of one level
    added (dequantised, arXiv:1511.01844): -nats / (numbers ln 2) + log2((levels - 1) / 2): a level is 2 / (levels - 1)."""
    return -nats / (numbers * math.log(2)) + math.log2((levels - 1) / 2)


@contextmanager
def _only_inputs(model: nn.Module) -> Iterator[None]:
    """Gradients reach the inputs alone: those of the parameters are neither computed nor exchanged."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
