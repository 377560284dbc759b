"""What one rank will hold in memory, before any of it is allocated.

Parameters, gradients, optimizer state and averages are counted exactly, from the shards that ``parallelize`` made on the meta
device. Activations are counted by running one micro-batch forward and backward on meta tensors and following which of them
are alive, as an eager allocator would; attention counts as a fused kernel (``FusedAttention``). Gathered parameters follow
from FSDP's rules (``gathered``). The sum is an upper bound: gradients and activations are largest at different moments.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from l3m_like.distributed.activations import apply_checkpointing, apply_offload, is_matmul
from l3m_like.distributed.gradients import local
from l3m_like.distributed.parallelize import DTYPES
from l3m_like.training.updates import Update, assign_parameters


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank."""

    #: kept by the forward pass for the backward pass
    saved: int
    #: alive at once at most, without gradients and parameters
    peak: int
    #: the moment of a step at which most is needed
    worst: Moment
    #: FLOPs of matrix products and of attention's forward, of which there are more where something is computed twice
    flops: int = 0


@dataclass(frozen=True)
class Moment:
    """Bytes at one moment of a step, beside what is there for the whole run."""

    name: str
    activations: int
    gradients: int
    #: parameters put together for computing, and the buffers of gradients being reduced
    gathered: int

    @property
    def total(self) -> int:
        return self.activations + self.gradients + self.gathered


# ---- exact terms ---------------------------------------------------------------------------------------------------


def local_bytes(tensors: Iterable[Tensor], *, at_least: torch.dtype | None = None) -> int:
    """Bytes of this rank's shards; ``at_least``: of copies in that dtype, or a wider one."""
    return sum(local(t).numel() * torch.promote_types(t.dtype, at_least or t.dtype).itemsize for t in tensors)


def static_bytes(model: nn.Module, *, ema: bool, muon: Collection[str] = ()) -> dict[str, int]:
    """Bytes of parameters (and buffers), gradients, optimizer state and averages on this rank, of a model that ``parallelize``
    has sharded (it may be on meta). Gradients are as large as this when all of them are sharded.

    ``muon``: names of the parameters that Muon trains; it keeps one momentum, in at least float32.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for name, p in model.named_parameters() if name in muon]
    adamw = [p for name, p in model.named_parameters() if p.requires_grad and name not in muon]
    # AdamW: two moments like the parameter, and a float32 step count
    state = local_bytes(matrices, at_least=torch.float32) + 2 * local_bytes(adamw) + 4 * len(adamw)
    sizes = {
        "parameters": local_bytes([*model.parameters(), *model.buffers()]),
        "gradients": local_bytes(trained),
        "optimizer": state,
    }
    return sizes | ({"ema": local_bytes(trained, at_least=torch.float32)} if ema else {})


# ---- what FSDP adds ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sharding:
    """What FSDP2, or ``LowPrecision``, does to one model, in bytes on this rank; all zero where it does nothing.

    The root's parameters (those in no unit) stay gathered from forward to backward, and their gradients whole until the end of
    the backward pass. A unit's gradients leave for their shards as soon as the unit is done, unless micro-batches are being
    accumulated: then all stay whole until the last one.
    """

    #: gathered all the time: the root
    gathered: int = 0
    #: of units at work: one computes, the next is fetched, and one's gradients are in the buffer of the reduction
    working: int = 0
    #: at the end of the backward pass: the buffer and the result of the reduction of the root's gradients
    reduction: int = 0
    #: while micro-batches are accumulated: the root's gradients, whole
    root_gradients: int = 0
    #: ``{parameter of a unit: (held whole until its backward pass, the shard of its gradient)}``; held are its gradient, while
    #: micro-batches are accumulated, and the parameter itself, without ``reshard_after_forward``
    leaving: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def sharding(
    model: nn.Module, roots: Iterable[nn.Module], *, precision: str, reshard_after_forward: bool, accumulation: int
) -> Sharding:
    """Read it off a model that ``parallelize`` has sharded; ``roots`` are its parts.

    In one process there is nothing to shard: bf16 is computed with copies of the weights, which stay, and gradients are in bf16
    until others are added to them.
    """
    compute = DTYPES[precision].itemsize
    reduce = torch.promote_types(DTYPES[precision], torch.float32).itemsize
    if precision == "bf16" and not any(isinstance(module, FSDPModule) for module in model.modules()):
        sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        summed = {name: (reduce * size, reduce * size) for name, size in sizes.items()}
        copies = compute * sum(p.numel() for p in model.parameters())
        return Sharding(gathered=copies, leaving=summed if accumulation > 1 else {})
    root_ids = {id(root) for root in roots}
    names = {id(p): name for name, p in model.named_parameters()}
    root_size = root_local = largest = 0
    leaving: dict[str, tuple[int, int]] = {}
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        own = list(_own_parameters(module))
        size = sum(torch.Size(tp_shape(p)).numel() for p in own)
        if id(module) in root_ids:
            root_size += size
            root_local += local_bytes(p for p in own if p.requires_grad)
            continue
        largest = max(largest, size)
        held = (reduce if accumulation > 1 else 0) + (0 if reshard_after_forward else compute)
        for p in own:
            if p.requires_grad:
                leaving[names[id(p)]] = held * torch.Size(tp_shape(p)).numel(), local_bytes([p])
    return Sharding(
        gathered=compute * root_size,
        working=compute * largest * (3 if reshard_after_forward else 1) + reduce * largest,
        reduction=reduce * root_size + root_local,
        root_gradients=reduce * root_size if accumulation > 1 else 0,
        leaving=leaving,
    )


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that an FSDP module gathers itself: all below it but those of FSDP modules inside."""
    seen: set[int] = set()

    def below(child: nn.Module) -> Iterator[nn.Parameter]:
        for parameter in child.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter
        for inner in child.children():
            if not isinstance(inner, FSDPModule):
                yield from below(inner)

    return below(module)


def tp_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape that this rank computes with: whole, but for what tensor parallelism cuts."""
    shape = list(parameter.shape)
    if isinstance(parameter, DTensor):
        names = parameter.device_mesh.mesh_dim_names or ()
        for axis, placement in enumerate(parameter.placements):
            if axis < len(names) and names[axis] == "tp" and isinstance(placement, Shard):
                shape[placement.dim] = -(-shape[placement.dim] // parameter.device_mesh.size(axis))
    return tuple(shape)


# ---- activations ---------------------------------------------------------------------------------------------------


def become_local(model: nn.Module, sharded: nn.Module, precision: str) -> None:
    """Give the meta ``model`` the parameters that one rank computes with, in the compute dtype: those of ``sharded`` (the
    same model after ``parallelize``), gathered but for tensor parallelism. ``model`` then runs without any collective."""
    shapes = {name: tp_shape(p) for name, p in sharded.named_parameters(remove_duplicate=False)}
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        dtype = DTYPES[precision] if precision != "fp32" and parameter.is_floating_point() else parameter.dtype
        if id(parameter) not in made:  # tied parameters stay one
            empty = torch.empty(shapes[name], dtype=dtype, device="meta")
            made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, made[id(parameter)])


def measure_activations(
    model: nn.Module,
    updates: Sequence[Update],
    data: Mapping[str, Tensor],
    *,
    checkpointing: str | int | Mapping[str, Any],
    offload: Mapping[str, int] | None = None,
    shards: Sharding | None = None,
    mesh: Any = None,
) -> Activations:
    """Run every update once on the meta tensors ``data``; the most that any of them needs.

    ``model`` is as ``become_local`` leaves it; its units are put under activation checkpointing and offload in place. What
    selective checkpointing keeps counts as staying on the device also with offload (compiled, it is offloaded too).
    """
    shards = shards or Sharding()
    parts = {id(part): part for update in updates for part in update.parts.values()}
    for part in parts.values():
        units = [unit for _, block in part.blocks() for unit in block.shard_units()]
        for unit in units:  # inside of checkpointing: the mode around the whole does not reach what backward recomputes
            unit.forward = functools.partial(_fused_forward, unit.forward)  # type: ignore[method-assign]
        apply_checkpointing(units, checkpointing)
        if offload is not None:
            apply_offload(units, torch.device("meta"), **offload)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assign_parameters(updates, trained)
    known = [*model.parameters(), *data.values()]
    saved = peak = flops = 0
    worst = Moment("", 0, 0, 0)
    carried: dict[str, Tensor] = {}
    for update in updates:
        update.train_only_own(updates)
        with LiveBytes(known) as live, FusedAttention():
            leaving = {name: p for name, p in update.parameters.items() if name in shards.leaving}
            whole = shards.root_gradients + sum(shards.leaving[name][0] for name in leaving)
            live.count(whole, gradient=True)
            hooks = [
                p.register_post_accumulate_grad_hook(functools.partial(_land, live, shards.leaving[name]))
                for name, p in leaving.items()
            ]
            hooks += [
                p.register_post_accumulate_grad_hook(functools.partial(_stay, live))
                for name, p in update.parameters.items()
                if name not in leaving
            ]
            kept_bytes, kept = _forward_backward(update, {**data, **carried}, live, mesh)
        saved, peak = max(saved, kept_bytes - whole), max(peak, live.peak_activations)
        flops += live.flops
        in_backward = Moment("in the backward pass", live.at_peak[0], live.at_peak[1], shards.gathered + shards.working)
        left = live.gradients - shards.root_gradients  # the accumulated ones took the new ones in
        at_its_end = Moment(
            "when the last gradients are reduced", live.now - live.gradients, left, shards.gathered + shards.reduction
        )
        worst = max(worst, in_backward, at_its_end, key=lambda moment: moment.total)
        carried |= kept
        for hook in hooks:
            hook.remove()
        for parameter in update.parameters.values():
            parameter.grad = None
    return Activations(saved, peak, worst, flops)


def _land(live: LiveBytes, size: tuple[int, int], parameter: Tensor) -> None:
    """A unit's gradient leaves for its shard."""
    parameter.grad = None
    whole, shard = size
    live.count(shard - whole, gradient=True)


def _stay(live: LiveBytes, parameter: Tensor) -> None:
    """A gradient stays as it is: from now on it counts as one, not as an activation."""
    live.gradients += parameter.grad.nbytes if parameter.grad is not None else 0  # may be a part of a larger storage


def _forward_backward(update: Update, data: dict[str, Tensor], live: LiveBytes, mesh: Any) -> tuple[int, dict[str, Tensor]]:
    for name, part in update.parts.items():
        data = part(data, update.graphs[name])
    terms = [
        loss.weight * value / count
        for loss in update.losses.values()
        for value, count in [loss.term(data, 1.0, mesh)]
        if loss.weight is not None
    ]
    kept = {key: data[key].detach() for key in update.keep}
    del data
    saved = live.now
    torch.stack(terms).sum().backward()
    return saved, kept


class LiveBytes(TorchDispatchMode):
    """Follows the storages of tensors that operations make: bytes alive ``now``, of which ``gradients``, and their peaks; and
    counts ``flops`` (as in ``Activations``).

    Args:
        known: tensors whose storages do not count (parameters, inputs).
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = self.gradients = self.peak_activations = self.flops = 0
        #: activations and gradients at the peak
        self.at_peak = (0, 0)
        self._alive: dict[int, Any] = {}
        for tensor in known:
            self._follow(tensor, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.flops += _flops(func, args, out)
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._follow(value, value.untyped_storage().nbytes())
        return out

    def _follow(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        number = storage._cdata
        if number in self._alive:
            return
        self._alive[number] = weakref.ref(storage, self._end_of(number, size))
        self.count(size)

    def count(self, size: int, *, gradient: bool = False) -> None:
        """``size`` more bytes are alive (or fewer)."""
        self.now += size
        self.gradients += size if gradient else 0
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, (self.now - self.gradients, self.gradients)
        self.peak_activations = max(self.peak_activations, self.now - self.gradients)

    def _end_of(self, number: int, size: int) -> Callable[[Any], None]:
        def end(_: Any) -> None:
            del self._alive[number]
            self.now -= size

        return end


def _flops(func: Any, args: Any, out: Any) -> int:
    if func is torch.ops.aten._grouped_mm.default:  # which the registry has not
        return 2 * args[0].numel() * args[1].shape[-1]
    if is_matmul(func._schema.name):
        return flop_registry[func._overloadpacket](*args, out_val=out)
    if func is torch.ops.aten._scaled_dot_product_cudnn_attention.default:
        q, k, causal = args[0], args[1], len(args) > 6 and args[6]  # [B, H, S, K]; a default is not passed on
        return 4 * q.numel() * k.shape[2] // (2 if causal else 1)
    return 0


class FusedAttention(TorchFunctionMode):
    """On meta tensors ``scaled_dot_product_attention`` takes its textbook form, which keeps the scores of all pairs. Here it
    becomes what an accelerator runs in half precision, and in fp32 with as many key heads as query heads: a fused kernel. In
    fp32 with grouped heads no fused kernel exists, and the textbook form is what runs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return _fused(*args, **(kwargs or {}))


def _fused_forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with FusedAttention():
        return forward(*args, **kwargs)


def _fused(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **rest: Any) -> Tensor:
    if q.dtype.itemsize > 2 and q.shape[1] != k.shape[1]:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, **rest)
    bias = None
    if attn_mask is not None:  # kernels take no bool mask: it becomes one of numbers
        bias = torch.zeros_like(attn_mask, dtype=q.dtype) if attn_mask.dtype == torch.bool else attn_mask
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True, 0.0, is_causal)[0]
