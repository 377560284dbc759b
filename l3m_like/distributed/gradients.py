"""Gradients over the whole mesh: partial ones are summed, the norm is one number, equal on every rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial

from l3m_like.distributed.mesh import Mesh
from l3m_like.kernels.squares import sum_of_squares


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor (the tensor itself if it is not sharded)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def set_gradient_sync(parts: Iterable[nn.Module], on: bool) -> None:
    """Reduce gradients in the next backward pass (the last micro-batch), or only accumulate them."""
    for part in parts:
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(on)


def tp_summed_parameters(parts: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters that ``parallelize`` marked: whole on every tp rank, used for this rank's heads only."""
    found = []
    for part in parts:
        for module in part.modules():
            for name in getattr(module, "tp_summed", ()):
                owner, _, leaf = name.rpartition(".")
                found.append(getattr(module.get_submodule(owner), leaf))
    return found


def sum_partial_gradients(parameters: Iterable[nn.Parameter], mesh: Mesh) -> None:
    """All-reduce over tp the gradients of ``tp_summed_parameters``, in one message."""
    grads = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if mesh.size("tp") == 1 or not grads:
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat, group=mesh["tp"].get_group())
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm over all gradients of the mesh: fp32 (or fp64) scalar, equal on all ranks, without a host sync.

    Squared norms are added per set of mesh axes over which a gradient is sharded, then all-reduced over just these.
    """
    groups: dict[tuple[Any, tuple[int, ...]], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        if isinstance(gradient, DTensor):
            if any(isinstance(p, Partial) for p in gradient.placements):
                raise RuntimeError(f"a gradient of shape {tuple(gradient.shape)} is still a partial sum")
            axes = tuple(i for i, p in enumerate(gradient.placements) if not p.is_replicate())
            groups[(gradient.device_mesh, axes)].append(gradient.to_local())
        else:
            groups[(None, ())].append(gradient)
    total: Tensor | None = None
    for (device_mesh, axes), tensors in groups.items():
        alike: dict[torch.dtype, list[Tensor]] = defaultdict(list)  # a launch is of one dtype
        for tensor in tensors:
            alike[tensor.dtype].append(tensor)
        square = torch.stack([sum_of_squares(some) for some in alike.values()]).sum()
        for axis in axes:
            dist.all_reduce(square, group=device_mesh.get_group(axis))
        total = square if total is None else total + square
    if total is None:
        raise RuntimeError("no gradients")
    return total.sqrt()
