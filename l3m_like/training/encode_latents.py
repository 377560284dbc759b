"""The latents of a dataset, written once: what a run with a frozen encoder would compute in every epoch."""

from __future__ import annotations

import io
import itertools
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l3m_like.config import RunConfig
from l3m_like.core.errors import UserError
from l3m_like.core.meta_model import Frozen, MetaModel
from l3m_like.data.loader import EvalLoader
from l3m_like.distributed.mesh import Mesh, broadcast_object
from l3m_like.training.load import load


def encode_latents(
    config: RunConfig,
    place: str,
    out: Path,
    mesh: Mesh,
    *,
    flip: bool,
    dtype: str = "float32",
    batch: int = 64,
    shard: int = 4096,
) -> int:
    """Write the moments of every picture of the dataset at ``place`` ("data.train") as webdataset shards for ``ClassMoments``.

    Every rank calls it, and writes the shards of its own part of the pictures, in file order; a shard that is there is not made
    again. The pictures are those of epoch 0, so a processor that draws (crops, mirrors) must be told not to.

    Args:
        config: an experiment whose model has a ``Frozen`` that writes ``image_moments`` of ``image``.
        out: a folder.
        flip: also those of the mirrored pictures.
        dtype: of the arrays: float32 is exact, float16 half as large.
        batch: pictures at a time.
        shard: pictures in a shard (a multiple of ``batch`` is taken).

    Returns:
        How many pictures this rank has encoded; 0 where all shards are there.

    Raises:
        UserError: no such part of the model; a processor that mirrors by itself; data without `image` and `image_label`; a folder
            with latents of other work.
    """
    found = load(config)  # with the weights of `init`
    device = next(found.model.parameters()).device
    encoder = frozen_encoder(found.model)
    data = config.instantiate(place)
    keys = data.keys()
    if not {"image", "image_label"} <= set(keys):
        raise UserError(f"{place} gives {', '.join(keys)}; encoding needs 'image' and 'image_label'.")
    if getattr(data.process, "flip", False):
        raise UserError(f"{place}.process.flip is on: encode with flip=false, and both sides are written (--flip).")
    rounds = max(1, shard // batch)  # batches of a shard
    facts = {"data": data.describe(), "processes": mesh.dp_size, "batch": batch, "rounds": rounds, "flip": flip, "dtype": dtype}
    _claim(out, facts, mesh)
    loader = EvalLoader(data, batch=batch, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size)
    batches = (rows for rows, valid in loader if valid)
    count = 0
    for number in itertools.count():
        path = out / f"part-{mesh.dp_rank:03d}-{number:06d}.tar"
        chunk = list(itertools.islice(batches, rounds))
        if not chunk:
            return count
        if path.is_file():
            continue
        samples: list[tuple[int, dict[str, bytes]]] = []
        for rows in chunk:
            encoded = _encoded(encoder, rows, device, flip, dtype)
            samples += [(row, {k: v[at] for k, v in encoded.items()}) for at, row in enumerate(rows["row"].tolist())]
        _write(path, samples)
        count += len(samples)
    return count


def _claim(out: Path, facts: dict[str, Any], mesh: Mesh) -> None:
    """The folder is new, or of the same work."""
    kept = out / "encoding.json"
    differs = None
    if mesh.is_main:
        out.mkdir(parents=True, exist_ok=True)
        if not kept.is_file():
            kept.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        there = json.loads(kept.read_text(encoding="utf-8"))
        differs = next((f"{name} {there.get(name)!r}" for name, value in facts.items() if there.get(name) != value), None)
    differs = broadcast_object(differs)
    if differs is not None:
        raise UserError(f"{out} holds latents of other work: {differs}. Give another folder.")


def frozen_encoder(model: torch.nn.Module) -> MetaModel:
    """The frozen part of ``model`` that writes moments."""
    parts = [m for m in model.modules() if isinstance(m, Frozen) and "image_moments" in m.writes.values()]
    if len(parts) != 1:
        raise UserError(f"the model has {len(parts)} frozen parts that write 'image_moments'; encoding needs one (noise.encode).")
    return parts[0].model


@torch.no_grad()
def _encoded(encoder: MetaModel, rows: dict[str, Tensor], device: Any, flip: bool, dtype: str) -> dict[str, list[bytes]]:
    image = rows["image"].to(device)

    def moments(image: Tensor) -> list[bytes]:
        found = encoder({"image": image})["image_moments"].cpu().numpy().astype(dtype)
        return [_bytes(array) for array in found]

    values = {"npy": moments(image)} | ({"flip.npy": moments(image.flip(-1))} if flip else {})
    return values | {"cls": [str(label).encode() for label in rows["image_label"].tolist()]}


def _bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _write(path: Path, samples: list[tuple[int, dict[str, bytes]]]) -> None:
    part = path.with_suffix(".part")
    with tarfile.open(part, "w") as tar:
        for row, members in samples:
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{row:09d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    os.replace(part, path)
