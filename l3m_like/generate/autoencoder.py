"""Latents and images: generated latents through an autoencoder's decoder, and the statistics of an encoder's latents."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.blocks import NormalizeLatent
from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.data.loader import EvalLoader
from l3m_like.distributed.mesh import Mesh
from l3m_like.generate.flow import Images
from l3m_like.generate.sampler import sampling


def decode_latents(samples: Any, model: nn.Module, *, generator: nn.Module | None = None, stream: str = "image") -> Images:
    """The images of generated latents.

    Args:
        samples: what a sampler of latents returned.
        model: of an autoencoder: one of its parts writes ``<stream>_reconstruction`` from ``<stream>_latent`` at inference.
        generator: the model of the sampler; if it normalises latents (``NormalizeLatent``), that is undone first.
        stream: of the autoencoder's keys.

    Raises:
        UserError: samples that are no latents, a model without such a part, latents that do not fit it.
    """
    if not isinstance(samples, Images):
        raise UserError(f"decode: the samples are {type(samples).__name__}, no latents of images.")
    latents, result = samples.images, f"{stream}_reconstruction"
    for block in generator.modules() if generator is not None else ():
        if isinstance(block, NormalizeLatent):
            latents = block.undo(latents.to(block.mean.device)).cpu()
    with sampling(model) as graph:
        for name, part in graph.parts.items():
            steps = graph.graphs[name].steps
            if result in {key for step in steps for key in step.block.writes_in(True).values()}:
                chunks = latents.split(64)
                images = [part({f"{stream}_latent": x.to(graph.device)}, graph.graphs[name])[result].cpu() for x in chunks]
                return dataclasses.replace(samples, images=torch.cat(images))
    raise UserError(f"decode: no part of the model writes '{result}': it is no autoencoder.")


def latent_statistics(
    model: nn.Module,
    data: Any,
    *,
    samples: int | None = None,
    batch: int = 64,
    key: str = "image_latent",
    mesh: Mesh | None = None,
) -> dict[str, Tensor]:
    """``mean`` and ``variance`` [D, h, w] (float32) of the key ``key`` over a dataset, as ``NormalizeLatent`` reads them.

    Args:
        model: its parts run as at inference, up to the one that writes ``key``.
        data: the dataset.
        samples: rows that are used (None: all).
        batch: rows computed at a time, per rank.
        mesh: its data-parallel ranks share the rows.

    Raises:
        UserError: no part writes ``key``.
    """
    sums: Tensor | None = None
    size, rank = (mesh.dp_size, mesh.dp_rank) if mesh is not None else (1, 0)
    most = None if samples is None else -(-samples // (batch * size))
    with sampling(model) as graph:
        for rows, valid in itertools.islice(iter(EvalLoader(data, batch=batch, dp_rank=rank, dp_size=size)), most):
            out = {name: value.to(graph.device) if isinstance(value, Tensor) else value for name, value in rows.items()}
            for name, part in graph.parts.items():
                if key not in out:
                    out = part(out, graph.graphs[name])
            if key not in out:
                raise UserError(f"no part writes '{key}'. {did_you_mean(key, out)}")
            counts = (rows["row"] < samples if samples is not None else rows["row"] >= 0) & valid
            latent = out[key].double() * counts.to(graph.device).view(-1, 1, 1, 1)
            found = torch.stack((latent.sum(0), latent.square().sum(0), counts.sum().to(graph.device).expand(latent.shape[1:])))
            sums = found if sums is None else sums + found
    assert sums is not None  # a dataset has at least one row
    total, squares, count = (mesh.sum(sums) if mesh is not None else sums).cpu()
    mean = total / count
    return {"mean": mean.float(), "variance": (squares / count - mean.square()).clamp(min=0).float()}
