"""Several linear maps of one input as one matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

#: with fewer rows, joining the weights costs more than the larger product saves (generation)
_ROWS = 512


def joint_linear(x: Tensor, *layers: nn.Linear) -> list[Tensor]:
    """``[layer(x) for layer in layers]``, x [..., D]; where they are ordinary layers and rows are many, as one product.

    The outputs are then views of one tensor, and so is the backward pass one product, without sums over the layers.
    """
    ordinary = all(
        type(layer) is nn.Linear
        and (layer.bias is None) == (layers[0].bias is None)
        and not isinstance(layer.weight, DTensor)
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        for layer in layers
    )
    if not ordinary or x.numel() < _ROWS * x.shape[-1]:
        return [layer(x) for layer in layers]
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    # of the weights, not `out_features`: a rank of tensor parallelism may hold a part
    return list(F.linear(x, weight, bias).split([layer.weight.shape[0] for layer in layers], dim=-1))
