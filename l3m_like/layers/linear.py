"""Several linear maps of one input as one matrix product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from l3m_like.core.errors import UserError

#: with fewer rows, joining the weights costs more than the larger product saves (generation)
_ROWS = 512


def joint_linear(x: Tensor, *layers: nn.Linear) -> list[Tensor]:
    """``[layer(x) for layer in layers]``, x [..., D]; where they are ordinary layers and rows are many, as one product.

    The outputs are then views of one tensor, and so is the backward pass one product, without sums over the layers. The weights
    are joined by a copy, unless the first layer has ``joined_weight``: a tensor in which all of them lie.
    """
    if not joins(x, *layers):
        return [layer(x) for layer in layers]
    # of the weights, not `out_features`: a rank of tensor parallelism may hold a part
    return list(joined_output(x, *layers).split([layer.weight.shape[0] for layer in layers], dim=-1))


def joins(x: Tensor, *layers: nn.Linear) -> bool:
    """Whether ``joint_linear`` makes one product of ``layers``."""
    ordinary = all(is_ordinary(layer) and (layer.bias is None) == (layers[0].bias is None) for layer in layers)
    return ordinary and x.numel() >= _ROWS * x.shape[-1]


def joined_output(x: Tensor, *layers: nn.Linear, bias: Tensor | None = None) -> Tensor:
    """The one product of layers that can be joined: their outputs side by side. ``bias``: all of theirs (``joined_bias``), which
    is added and has no gradient from here."""
    weights = [layer.weight for layer in layers]
    biases = [layer.bias for layer in layers if layer.bias is not None] if bias is None else [bias.detach()]
    return _Joint.apply(x, getattr(layers[0], "joined_weight", None), *weights, *biases)


def joined_bias(*layers: nn.Linear) -> Tensor | None:
    """The biases of layers that can be joined, one behind the other."""
    return None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])


def is_ordinary(layer: nn.Module) -> bool:
    """Whether ``layer`` is ``F.linear`` of its weight and bias and nothing else: no adapter, no hook, no tensor parallelism."""
    return is_plain(layer) and not isinstance(layer.weight, DTensor)


def is_plain(layer: nn.Module) -> bool:
    """As ``is_ordinary``, but asked outside of a unit, where FSDP has its weight in shards."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    if type(layer) is not nn.Linear or hooked:
        return False
    weight = layer.weight
    return not (isinstance(weight, DTensor) and "tp" in (weight.device_mesh.mesh_dim_names or ()))


def linear(x: Tensor, layer: nn.Linear, *, biased: bool = True) -> Tensor:
    """``layer(x)``; if it is not ``biased``, which an ordinary layer need not be, without its bias."""
    return layer(x) if biased else F.linear(x, layer.weight)


def bias_apart(part: Any, *args: Any) -> tuple[Any, Tensor | None]:
    """What ``part`` returns for ``args``, and the bias [D] that its caller must add to it: that of ``last_linear``, if that is an
    ordinary layer; else None, and nothing is left to add."""
    last = last_linear(part)
    if last is None or last.bias is None or not is_ordinary(last):
        return part(*args), None
    return part(*args, biased=False), last.bias


def last_linear(part: Any) -> Any:
    """The linear layer that makes the output of ``part`` (``part.last`` names it), or None."""
    return getattr(part, part.last) if hasattr(part, "last") else None


class _Joint(torch.autograd.Function):
    """The product with the joined weights. A copy that joins them is made again in the backward pass: kept, it would hold memory
    that FSDP frees after the forward of a unit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, joined: Tensor | None, *parameters: Tensor) -> Tensor:
        # a number of weights among the arguments would become a symbol when it changes, which torch.compile breaks the graph for
        weights = [parameter for parameter in parameters if parameter.dim() == 2]
        biases = [parameter for parameter in parameters if parameter.dim() == 1]
        ctx.sizes, ctx.bias_sizes, ctx.joined = [len(w) for w in weights], [len(b) for b in biases], joined is not None
        kept = weights if joined is None else [joined]
        ctx.save_for_backward(x, *kept)
        return F.linear(x, _together(kept), torch.cat(biases) if biases else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *kept = ctx.saved_tensors
        if ctx.joined and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise UserError(
                "joint_linear: gradients of gradients (create_graph=True) would miss the joined weights; train in fp32."
            )
        rows, sizes = grad.flatten(0, -2), ctx.sizes
        grad_x = grad @ _together(kept) if ctx.needs_input_grad[0] else None
        of_weights, of_biases = ctx.needs_input_grad[2 : 2 + len(sizes)], ctx.needs_input_grad[2 + len(sizes) :]
        grad_weights = (rows.mT @ x.flatten(0, -2)).split(sizes) if any(of_weights) else [None] * len(sizes)
        grad_biases = rows.sum(0).split(ctx.bias_sizes) if any(of_biases) else [None] * len(of_biases)
        return grad_x, None, *grad_weights, *grad_biases


def _together(weights: list[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(weights)
