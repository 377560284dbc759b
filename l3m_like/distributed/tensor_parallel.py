"""Styles of tensor parallelism that torch does not have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel


class CutExperts(ParallelStyle):
    """For stacked experts: every rank holds a slice of the hidden width of all of them. The module says by ``expert_cuts`` along
    which dimension each of its parameters is cut.

    Its inputs are whole on every rank, and their gradients, each rank's part, are summed; its output, each rank's part of a sum,
    is summed.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, _cut, _enter, _leave)  # type: ignore[arg-type]


class SumGradients(ParallelStyle):
    """For a module whose inputs are whole on every rank, and of whose outputs each rank uses a part (its own heads): the
    gradients of its inputs are summed."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, None, _enter)  # type: ignore[arg-type]


class CutVocabulary(ParallelStyle):
    """For a matrix with a row for every token: each rank has an equal part of the rows.

    An embedding looks up what it has, and the ranks' vectors are summed. The matrix of a projection is cut alone: heads read it
    (``layers/vocabulary.py``), and may share it with an embedding.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, nn.Embedding):
            return RowwiseParallel(input_layouts=Replicate())._apply(module, device_mesh)
        weight = module.get_parameter("weight")
        cut = distribute_tensor(weight, device_mesh, [Shard(0)])
        module.register_parameter("weight", nn.Parameter(cut, requires_grad=weight.requires_grad))
        return module


def _cut(name: str, module: Any, mesh: DeviceMesh) -> None:
    for leaf, dim in module.expert_cuts.items():
        parameter = getattr(module, leaf)
        cut = distribute_tensor(parameter, mesh, [Shard(dim)])
        module.register_parameter(leaf, nn.Parameter(cut, requires_grad=parameter.requires_grad))


def _enter(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
    return tuple(_whole(x, mesh) if torch.is_floating_point(x) else x for x in inputs)


def _whole(x: Tensor, mesh: DeviceMesh) -> Tensor:
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def _leave(module: nn.Module, output: Tensor, mesh: DeviceMesh) -> Tensor:
    return DTensor.from_local(output, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()
