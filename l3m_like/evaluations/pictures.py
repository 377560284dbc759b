"""Sets of pictures, as batches that the ranks share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.data.dataset import Dataset
from l3m_like.data.loader import EvalLoader
from l3m_like.data.paths import DataMissing
from l3m_like.data.processors.pixels import EXTENSIONS, decode
from l3m_like.distributed.mesh import Mesh

#: (running numbers, images [B, C, H, W] in [-1, 1], do they count)
Batches = Iterator[tuple[Sequence[int], Tensor, bool]]


@dataclass(frozen=True)
class Pictures:
    """A set of pictures: how many there are on all ranks together, and this rank's."""

    count: int
    batches: Batches


def of_dataset(data: Dataset, batch: int, mesh: Mesh, limit: int | None = None) -> Pictures:
    """The (first ``limit``) pictures of a dataset, ``image`` in [-1, 1]."""
    keys = data.keys()
    if "image" not in keys:
        raise UserError(f"the dataset has no 'image' to compare with; it has {', '.join(keys)}.")
    count = len(data) if limit is None else min(limit, len(data))

    def batches() -> Batches:
        for number, (rows, valid) in enumerate(EvalLoader(data, batch=batch, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size)):
            if number * mesh.dp_size * batch >= count:  # on all ranks
                return
            left = max(0, min(len(rows["row"]), count - int(rows["row"][0]))) if valid else 0
            images = rows["image"][: left or 1].to(mesh.device)
            yield (rows["row"][:left].tolist(), images, True) if left else ([0], images, False)

    return Pictures(count, batches())


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
