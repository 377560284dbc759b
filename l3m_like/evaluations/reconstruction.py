"""How well an autoencoder gives images back, without the noise of its training."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.meta_model import Frozen, Graph, Step
from l3m_like.core.wiring import parts_of
from l3m_like.data.loader import EvalLoader
from l3m_like.distributed.mesh import Mesh, gather_objects
from l3m_like.evaluations.evaluation import Findings
from l3m_like.generate.flow import grid
from l3m_like.losses.reconstruction import psnr


class Reconstruction:
    """Held-out images through the inference graph: ``psnr`` (dB), ``l1`` (images in [-1, 1]), ``lpips`` if a block of the model
    writes it, each a mean over rows; and a picture with every row of images above that of its reconstructions.

    Args:
        data: the dataset (the entry's ``data``).
        samples: rows that are compared.
        shown: rows in the picture.
        columns: of the picture.
        batch: rows computed at a time, per rank.
        stream: of the keys ``<stream>``, ``<stream>_reconstruction`` and ``<stream>_lpips``.

    Raises:
        UserError: no block of the inference graph writes the reconstruction.
    """

    def __init__(
        self, data: Any, *, samples: int = 1000, shown: int = 20, columns: int = 10, batch: int = 64, stream: str = "image"
    ) -> None:
        for name, value in (("samples", samples), ("shown", shown), ("columns", columns), ("batch", batch)):
            if value < 1:
                raise UserError(f"Reconstruction: {name} is {value}; it is at least 1.")
        self.data = data
        self.samples = samples
        self.shown = min(shown, samples)
        self.columns = columns
        self.batch = batch
        self.image, self.result, self.distance = stream, f"{stream}_reconstruction", f"{stream}_lpips"

    def check(self, model: nn.Module) -> None:
        self.graphs(model)

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

    def evaluate(self, model: nn.Module, *, mesh: Mesh, step: int, seed: int, folder: Path) -> Findings:
        graphs, parts = self.graphs(model), parts_of(model)
        sums: dict[str, Tensor] = {}
        pairs: dict[int, Tensor] = {}
        most = -(-self.samples // (self.batch * mesh.dp_size))
        batches = EvalLoader(self.data, batch=self.batch, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size, seed=seed)
        for batch, valid in itertools.islice(iter(batches), most):
            data = {k: v.to(mesh.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            for name, graph in graphs.items():
                data = parts[name](data, graph)
            image, result = data[self.image], data[self.result]
            counts = (batch["row"] < self.samples).to(mesh.device) & valid
            found = {"psnr": psnr(result, image.to(result.dtype)), "l1": (result - image).abs().flatten(1).mean(1)}
            if self.distance in data:
                found["lpips"] = data[self.distance]
            for name, value in (found | {"rows": torch.ones_like(found["psnr"])}).items():
                sums[name] = sums.get(name, 0.0) + torch.where(counts, value.double(), 0.0).sum()
            if valid:
                both = torch.stack((image.to(result.dtype), result), dim=1).cpu()
                pairs |= {row: pair for row, pair in zip(batch["row"].tolist(), both, strict=True) if row < self.shown}
        totals = dict(zip(sums, mesh.sum(torch.stack(list(sums.values()))).tolist(), strict=True))
        rows = totals.pop("rows")
        every = {row: pair for part in gather_objects(pairs) for row, pair in part.items()}
        picture = self.picture(torch.stack([every[row] for row in sorted(every)]))
        return Findings({n: total / rows for n, total in totals.items()}, {"grid": picture}, self.notes(graphs))

    def picture(self, pairs: Tensor) -> Tensor:
        """[N, 2, C, H, W] -> uint8 [height, width, C]."""
        lines = [half for line in pairs.split(self.columns) for half in (line[:, 0], line[:, 1])]
        blank = [torch.ones_like(line[:1]).expand(self.columns - len(line), *line.shape[1:]) for line in lines]
        return torch.from_numpy(grid(torch.cat([torch.cat(both) for both in zip(lines, blank, strict=True)]), self.columns))

    def notes(self, graphs: dict[str, Graph]) -> dict[str, str]:
        """What a reader must know about the numbers."""
        blocks = [step.block for graph in graphs.values() for step in graph.steps if self.distance in step.block.writes.values()]
        random = any(isinstance(block, Frozen) and block.random_weights and block.loaded_from is None for block in blocks)
        return {"lpips": "of a network with random weights"} if random else {}
