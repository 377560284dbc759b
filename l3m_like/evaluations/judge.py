"""Does a picture show the class that it is of? A trained classifier says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.distributed.mesh import Mesh
from l3m_like.evaluations.extractors import resize, to_pixels
from l3m_like.evaluations.features import Extractor
from l3m_like.evaluations.pictures import Batches
from l3m_like.training.load import load


class Judge:
    """A classifier that a run has trained, whole in every process. It sees 8-bit pixels, as a PNG would hold them, at the size
    of its own data.

    Args:
        run: its directory, or one of its checkpoint folders (RUN/checkpoints/step_N); the model writes <stream>_logits.
        step: of the checkpoint (None: the newest).
        ema: the averaged weights.
        stream: of the classifier's blocks.

    Raises:
        UserError: no such run or checkpoint; no block writes the logits.
    """

    def __init__(self, run: str | Path, step: int | None = None, ema: bool = False, stream: str = "image") -> None:
        self.run, self.step, self.ema, self.stream = Path(run), step, ema, stream
        self._network: Extractor | None = None

    def check(self) -> None:
        """Raise a UserError if it cannot be loaded, or its data have no size of pictures."""
        self._build(torch.device("cpu"))

    def _build(self, device: torch.device) -> Extractor:
        if self._network is None:
            loaded = load(self.run, self.step, self.ema, device)
            if loaded.step is None:
                raise UserError(
                    f"Judge: {self.run} is a config, whose classifier has learned nothing; give the directory of a run."
                )
            blocks = [step.block for graph in loaded.inference.values() for step in graph.steps]
            writes = [key for block in blocks for key in block.writes_in(True).values()]
            if f"{self.stream}_logits" not in writes:
                raise UserError(
                    f"Judge: {self.run} is no classifier: no block writes {self.stream}_logits, as a ClassHead does; its last, "
                    f"{type(blocks[-1]).__name__}, writes {writes[-1]}. Give the run of a classifier (one of vit.yaml)."
                )
            process = loaded.processor()
            if not hasattr(process, "shape"):
                raise UserError(
                    f"Judge: the data of {self.run} do not say how large pictures are; their `process` is "
                    f"{type(process).__name__}, where one of pictures (l3m_like.data.ClassImage) is needed."
                )
            keys = (self.stream, f"{self.stream}_label", "row")
            self._network = Extractor(loaded.model, f"{self.stream}_logits", keys)
            self._model, self._process = loaded.model, process
            #: stands beside each result
            self.name = f"{loaded.config.run.name}, step {loaded.step}{', averaged weights' if self.ema else ''}"
        self._model.to(device)
        return self._network

    @torch.no_grad()
    def classes(self, images: Tensor) -> Tensor:
        """The likeliest classes [B] of images [B, 1 or 3, H, W] in [-1, 1]."""
        network = self._build(images.device)
        channels, size, _ = self._process.shape
        if images.shape[1] not in (1, channels):
            raise UserError(f"{self.run} classifies grey pictures; these have {images.shape[1]} channels.")
        pixels = resize(to_pixels(images).float().expand(-1, channels, -1, -1), size)
        row = torch.arange(len(images), device=images.device)
        # blocks that mix training's images read labels too; the judge is not told them
        return network({self.stream: pixels / 127.5 - 1, f"{self.stream}_label": torch.zeros_like(row), "row": row}).argmax(-1)


class JudgedAccuracy:
    """The share of pictures in which ``judge`` sees the class that they are of, counted as they pass.

    Args:
        judge: of the pictures.
        label: the class of the picture with this running number.
    """

    def __init__(self, judge: Judge, label: Callable[[int], int]) -> None:
        self.judge, self.label = judge, label
        self.right, self.seen = 0, 0

    def watch(self, batches: Batches) -> Batches:
        """The same batches."""
        for rows, images, counts in batches:
            if counts:
                wanted = torch.tensor([self.label(row) for row in rows], device=images.device)
                self.right += int((self.judge.classes(images) == wanted).sum())
                self.seen += len(rows)
            yield rows, images, counts

    def result(self, mesh: Mesh) -> float:
        """Of all ranks' pictures."""
        right, seen = mesh.sum(torch.tensor([self.right, self.seen], dtype=torch.float64, device=mesh.device)).tolist()
        return right / seen
