"""How well an autoencoder gives images back, without the noise of its training."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.meta_model import Graph, Step
from l3m_like.core.wiring import parts_of
from l3m_like.data.loader import EvalLoader
from l3m_like.distributed.mesh import Mesh, gather_objects
from l3m_like.evaluations.evaluation import Findings
from l3m_like.evaluations.extractors import Extractor, Features, to_pixels
from l3m_like.evaluations.image_sets import Statistics, frechet_distance
from l3m_like.generate.flow import grid
from l3m_like.losses.reconstruction import psnr

#: of the 8-bit range, (K L)^2 with L = 255
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
#: pixels of a side
WINDOW = 11


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of pixels [B, C, H, W] in 0 .. 255 -> [B], the mean over channels (Wang et al., 2004).

    Windows are Gaussians of 1.5 pixels cut to 11 x 11; only those within the picture count.

    Raises:
        UserError: pictures of fewer than 11 pixels a side.
    """
    if min(x.shape[-2:]) < WINDOW:
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


class Reconstruction:
    """Held-out images through the inference graph: ``l1`` (of images in [-1, 1]), ``psnr`` (dB) and ``ssim`` of 8-bit pixels,
    ``lpips`` if a block of the model writes it, each a mean over rows; ``rfid``, the FID between images and reconstructions, with
    an extractor (the images' features are computed once); and a picture with every row of images above that of its
    reconstructions.

    Args:
        data: the dataset (the entry's ``data``).
        samples: rows that are compared.
        shown: rows in the picture.
        columns: of the picture.
        batch: rows computed at a time, per rank.
        extractor: of features for rFID (None: no rFID).
        stream: of the keys ``<stream>``, ``<stream>_reconstruction`` and ``<stream>_lpips``.

    Raises:
        UserError: no block of the inference graph writes the reconstruction.
    """

    def __init__(
        self,
        data: Any,
        *,
        samples: int = 1000,
        shown: int = 20,
        columns: int = 10,
        batch: int = 64,
        extractor: Extractor | None = None,
        stream: str = "image",
    ) -> None:
        for name, value in (("samples", samples), ("shown", shown), ("columns", columns), ("batch", batch)):
            if value < 1:
                raise UserError(f"Reconstruction: {name} is {value}; it is at least 1.")
        self.data = data
        self.samples = samples
        self.shown = min(shown, samples)
        self.columns = columns
        self.batch = batch
        self.extractor = extractor
        self._real: Statistics | None = None  # of the images, after the first evaluation
        self.image, self.result, self.distance = stream, f"{stream}_reconstruction", f"{stream}_lpips"

    def check(self, model: nn.Module) -> None:
        self.graphs(model)
        if self.extractor is not None:
            self.extractor.check()

    def graphs(self, model: nn.Module) -> dict[str, Graph]:
        """``{part: graph}`` of the parts up to the one that writes the reconstruction."""
        graphs: dict[str, Graph] = {}
        written: set[str] = set()
        for name, part in parts_of(model).items():
            # the perceptual distance belongs to training, but is wanted here
            steps = [
                Step(path, block)
                for path, block in part.blocks()
                if not block.training_only or self.distance in block.writes.values()
            ]
            graphs[name] = Graph(tuple(steps), inference=True)
            written |= {key for step in steps for key in step.block.writes_in(True).values()}
            if self.result in written:
                return graphs
        raise UserError(
            f"Reconstruction: no block of the inference graph writes '{self.result}'. {did_you_mean(self.result, written)}"
        )

    @torch.no_grad()
    def evaluate(self, model: nn.Module, *, mesh: Mesh, step: int, seed: int, folder: Path) -> Findings:
        graphs, parts = self.graphs(model), parts_of(model)
        sums: dict[str, Tensor] = {}
        pairs: dict[int, Tensor] = {}
        made = Statistics(("fid",))
        real = Statistics(("fid",)) if self._real is None else None
        like: Features | None = None
        most = -(-self.samples // (self.batch * mesh.dp_size))
        batches = EvalLoader(self.data, batch=self.batch, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size, seed=seed)
        for batch, valid in itertools.islice(iter(batches), most):
            data = {k: v.to(mesh.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            image = data[self.image]  # a graph drops keys after their last reader
            for name, graph in graphs.items():
                data = parts[name](data, graph)
            result = data[self.result]
            rows = batch["row"]
            counts = (rows < self.samples).to(mesh.device) & valid
            pixels = to_pixels(result), to_pixels(image)
            found = {
                "l1": (result - image).abs().flatten(1).mean(1),
                "psnr": psnr(*(x.double() / 127.5 - 1 for x in pixels)),
            }
            if min(image.shape[-2:]) >= WINDOW:
                found["ssim"] = ssim(*pixels)
            if self.distance in data:
                found["lpips"] = data[self.distance]
            for name, value in (found | {"rows": torch.ones_like(found["psnr"])}).items():
                sums[name] = sums.get(name, 0.0) + torch.where(counts, value.double(), 0.0).sum()
            if self.extractor is not None:
                for statistics, pictures in ((real, image), (made, result)):
                    if statistics is not None:
                        like = self.extractor(pictures)
                        here = counts.to(like.pooled.device)
                        kept = Features(*(part[here] for part in vars(like).values()))
                        statistics.add(kept, rows[counts.cpu()].tolist())
            if valid:
                both = torch.stack((image.to(result.dtype), result), dim=1).cpu()
                pairs |= {row: pair.clone() for row, pair in zip(rows.tolist(), both, strict=True) if row < self.shown}
        totals = dict(zip(sums, mesh.sum(torch.stack(list(sums.values()))).tolist(), strict=True))
        count = totals.pop("rows")
        every = {row: pair for part in gather_objects(pairs) for row, pair in part.items()}
        picture = self.picture(torch.stack([every[row] for row in sorted(every)]))
        values = {name: total / count for name, total in totals.items()}
        notes = {"images": str(round(count))}
        if self.extractor is not None and like is not None:
            made.merge(mesh, like)
            if real is not None:
                real.merge(mesh, like)
                self._real = real
            assert self._real is not None and self._real.pooled is not None and made.pooled is not None
            values["rfid"] = frechet_distance(self._real.pooled, made.pooled)
            notes["extractor"] = self.extractor.name
        return Findings(values, {"grid": picture}, notes)

    def picture(self, pairs: Tensor) -> Tensor:
        """[N, 2, C, H, W] -> uint8 [height, width, C]."""
        lines = [half for line in pairs.split(self.columns) for half in (line[:, 0], line[:, 1])]
        blank = [torch.ones_like(line[:1]).expand(self.columns - len(line), *line.shape[1:]) for line in lines]
        return torch.from_numpy(grid(torch.cat([torch.cat(both) for both in zip(lines, blank, strict=True)]), self.columns))
