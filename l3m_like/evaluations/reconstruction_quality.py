"""How well an autoencoder gives back its pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.data.dataset import Dataset
from l3m_like.data.loader import EvalLoader
from l3m_like.distributed.mesh import Mesh
from l3m_like.evaluations.evaluation import Findings
from l3m_like.evaluations.extractors import Extractor, to_pixels
from l3m_like.evaluations.image_sets import Statistics, frechet_distance
from l3m_like.generate.sampler import sampling

#: of the 8-bit range, (K L)^2 with L = 255
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pixels [B, C, H, W] in 0 .. 255 -> [B]; equal pictures give infinity."""
    error = (x.double() - y.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of pixels [B, C, H, W] in 0 .. 255 -> [B], the mean over channels (Wang et al., 2004).

    Windows are Gaussians of 1.5 pixels cut to 11 x 11; only those within the picture count.

    Raises:
        UserError: pictures of fewer than 11 pixels a side.
    """
    if min(x.shape[-2:]) < 11:
        raise UserError(f"ssim: pictures are {x.shape[-2]}x{x.shape[-1]}; the window has 11x11 pixels.")
    x, y = x.double(), y.double()
    at = torch.arange(11, dtype=torch.float64, device=x.device) - 5
    line = (-at.square() / (2 * 1.5**2)).exp()
    line = line / line.sum()
    channels = x.shape[1]

    def mean(values: Tensor) -> Tensor:
        values = F.conv2d(values, line.view(1, 1, 11, 1).expand(channels, 1, 11, 1), groups=channels)
        return F.conv2d(values, line.view(1, 1, 1, 11).expand(channels, 1, 1, 11), groups=channels)

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x.square(), mean(y * y) - mean_y.square()
    cov = mean(x * y) - mean_x * mean_y
    map = (2 * mean_x * mean_y + C1) * (2 * cov + C2) / ((mean_x.square() + mean_y.square() + C1) * (var_x + var_y + C2))
    return map.flatten(1).mean(1)


class ReconstructionQuality:
    """PSNR, SSIM and rFID (the FID between pictures and their reconstructions) over held-out pictures, as 8-bit pixels.

    Args:
        data: the pictures, in [-1, 1].
        image, reconstruction: keys of the picture and of what the inference graph makes of it.
        extractor: of features for rFID (None: no rFID).
        distances: further ones, ``{name: function of (x, y) in [-1, 1] -> [B]}``, e.g. LPIPS.
        samples: pictures that are read (None: all).
        batch: pictures at a time, per rank.

    Raises:
        UserError: the data or the model has no such key.
    """

    def __init__(
        self,
        data: Dataset,
        reconstruction: str,
        image: str = "image",
        extractor: Extractor | None = None,
        distances: Mapping[str, Callable[[Tensor, Tensor], Tensor]] | None = None,
        samples: int | None = None,
        batch: int = 64,
    ) -> None:
        self.data, self.image, self.reconstruction = data, image, reconstruction
        self.extractor, self.distances, self.samples, self.batch = extractor, dict(distances or {}), samples, batch
        keys = data.keys()
        if image not in keys:
            raise UserError(f"ReconstructionQuality: the data has no '{image}'. {did_you_mean(image, keys)}")

    def check(self, model: nn.Module) -> None:
        if self.extractor is not None:
            self.extractor.check()

    def evaluate(self, model: nn.Module, *, mesh: Mesh, step: int, seed: int, folder: Path) -> Findings:
        names = ["psnr", "ssim", *self.distances]
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=mesh.device)
        real, made = Statistics(("fid",)), Statistics(("fid",))
        loader = EvalLoader(self.data, batch=self.batch, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size, seed=seed)
        rounds = math.inf if self.samples is None else -(-self.samples // (self.batch * mesh.dp_size))
        like = None
        with sampling(model) as graph:
            for number, (batch, valid) in enumerate(loader):
                if number >= rounds:
                    break
                device = {key: value.to(mesh.device) for key, value in batch.items()}
                out = graph(device)
                if self.reconstruction not in out:
                    raise UserError(
                        f"ReconstructionQuality: the model writes no '{self.reconstruction}'. "
                        f"{did_you_mean(self.reconstruction, out)}"
                    )
                # the dataset's own picture: a graph drops keys after their last reader
                x, y = device[self.image], out[self.reconstruction]
                left = len(x) if self.samples is None else max(0, min(len(x), self.samples - int(batch["row"][0])))
                if self.extractor is not None:
                    like = self.extractor(x), self.extractor(y)
                if not valid or not left:
                    continue
                rows = batch["row"][:left].tolist()
                pixels = to_pixels(x[:left]), to_pixels(y[:left])
                found = [psnr(*pixels), ssim(*pixels), *(distance(x[:left], y[:left]) for distance in self.distances.values())]
                sums += torch.stack([*(values.double().sum() for values in found), sums.new_tensor(float(left))])
                if like is not None:
                    for statistics, features in zip((real, made), like, strict=True):
                        statistics.add(type(features)(*(part[:left] for part in vars(features).values())), rows)
        *totals, count = mesh.sum(sums).tolist()
        values = {name: total / count for name, total in zip(names, totals, strict=True)}
        notes = {"pictures": str(round(count))}
        if self.extractor is not None and like is not None:
            for statistics, features in zip((real, made), like, strict=True):
                statistics.merge(mesh, features)
            assert real.pooled is not None and made.pooled is not None
            values["rfid"] = frechet_distance(real.pooled, made.pooled)
            notes["extractor"] = self.extractor.name
        return Findings(values, notes=notes)
