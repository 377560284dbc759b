"""Sets of pictures, as batches that the ranks share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.core.random import normal
from l3m_like.data.dataset import Dataset
from l3m_like.data.loader import EvalLoader
from l3m_like.data.paths import DataMissing
from l3m_like.data.processors.pixels import EXTENSIONS, decode
from l3m_like.distributed.mesh import Mesh
from l3m_like.generate.sampler import deal

#: (running numbers, images [B, C, H, W] in [-1, 1], do they count)
Batches = Iterator[tuple[Sequence[int], Tensor, bool]]


@dataclass(frozen=True)
class Pictures:
    """A set of pictures: how many there are on all ranks together, this rank's, and their classes where they are known.

    ``label`` gives the class of the picture with a running number (that has come in a batch).
    """

    count: int
    batches: Batches
    label: Callable[[int], int] | None = None


def of_dataset(data: Dataset, batch: int, mesh: Mesh, limit: int | None = None) -> Pictures:
    """The (first ``limit``) pictures of a dataset, ``image`` in [-1, 1]."""
    keys = data.keys()
    if "image" not in keys:
        raise UserError(f"the dataset has no 'image' to compare with; it has {', '.join(keys)}.")
    count = len(data) if limit is None else min(limit, len(data))
    labels: dict[int, int] = {}

    def batches() -> Batches:
        for number, (rows, valid) in enumerate(EvalLoader(data, batch=batch, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size)):
            if number * mesh.dp_size * batch >= count:  # on all ranks
                return
            left = max(0, min(len(rows["row"]), count - int(rows["row"][0]))) if valid else 0
            images = rows["image"][: left or 1].to(mesh.device)
            if "image_label" in keys:
                labels.update(zip(rows["row"].tolist(), rows["image_label"].tolist(), strict=True))
            yield (rows["row"][:left].tolist(), images, True) if left else ([0], images, False)

    return Pictures(count, batches(), labels.__getitem__ if "image_label" in keys else None)


def of_gaussians(data: Dataset, batch: int, mesh: Mesh, limit: int | None = None) -> Pictures:
    """As many (or ``limit``) pictures as a dataset has, of its classes in turn, of independent pixels: each is drawn from the
    normal distribution with the mean and deviation of that pixel in that class. What a model must be better than.

    Raises:
        UserError: a dataset without ``image`` or ``image_label``; a class with a single picture.
    """
    keys = data.keys()
    for key in ("image", "image_label"):
        if key not in keys:
            raise UserError(f"the dataset has no '{key}', of which means and deviations are taken; it has {', '.join(keys)}.")
    sums: dict[int, Tensor] = {}  # class -> [3, C, H, W]: pictures, their sum, that of their squares
    for rows, _ in EvalLoader(data, batch=batch):  # all of them on every rank, so that all draw alike
        images = rows["image"].double()
        for label in rows["image_label"].unique().tolist():
            some = images[rows["image_label"] == label]
            parts = torch.stack((torch.full_like(some[0], len(some)), some.sum(0), some.square().sum(0)))
            sums[label] = parts + sums.get(label, 0)
    labels = sorted(sums)
    number, first, second = torch.stack([sums[label] for label in labels]).unbind(1)
    if number.min() < 2:
        raise UserError("a class of the dataset has a single picture, and so no deviation.")
    mean = first / number
    deviation = ((second - number * mean.square()) / (number - 1)).clamp_min(0).sqrt()
    count = len(data) if limit is None else limit

    def batches() -> Batches:
        for rows, counts in deal(count, batch, mesh):
            row = torch.tensor(rows)
            at = row % len(labels)
            draws = normal(row, tuple(mean.shape[1:]), seed=0, purpose="class_gaussians", dtype=torch.float64)
            yield rows, (mean[at] + deviation[at] * draws).float().to(mesh.device), counts

    return Pictures(count, batches(), lambda row: labels[row % len(labels)])


def of_files(path: Path, batch: int, mesh: Mesh, limit: int | None = None) -> Pictures:
    """The (first ``limit``) pictures of a folder (PNG, JPEG, WebP at any depth, in sorted order), or of an ``.npz`` file whose
    first array is uint8 [N, H, W, 3], as reference batches are published.

    Raises:
        DataMissing: nothing there. UserError: fewer pictures than processes; another array.
    """
    if path.suffix == ".npz":
        array = _array(path)[:limit]
        count, own = len(array), iter(array[mesh.dp_rank :: mesh.dp_size])
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix[1:].lower() in EXTENSIONS)[:limit]
        count = len(files)
        own = (np.asarray(decode(file.read_bytes(), 3)) for file in files[mesh.dp_rank :: mesh.dp_size])
    else:
        raise DataMissing(str(path), f"no pictures at {path}: give a run, a folder of pictures or an .npz file.")
    if count < mesh.dp_size:
        raise UserError(f"{path} holds {count} pictures, fewer than there are processes ({mesh.dp_size}).")

    def batches() -> Batches:
        number = mesh.dp_rank
        for _, alike in itertools.groupby(own, key=lambda picture: picture.shape):  # pictures of one size make a batch
            while chunk := list(itertools.islice(alike, batch)):
                rows = [number + mesh.dp_size * place for place in range(len(chunk))]
                number = rows[-1] + mesh.dp_size
                pixels = torch.from_numpy(np.stack(chunk)).permute(0, 3, 1, 2).to(mesh.device)
                yield rows, pixels.float() / 127.5 - 1, True

    return Pictures(count, batches())


def _array(path: Path) -> np.ndarray:
    if not path.is_file():
        raise DataMissing(str(path), f"no pictures at {path}.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            array = arrays[arrays.files[0]]
    except (ValueError, BadZipFile, IndexError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8:
        raise UserError(f"{path} holds {array.dtype} {list(array.shape)}; pictures are uint8 [N, H, W, 3].")
    return array
