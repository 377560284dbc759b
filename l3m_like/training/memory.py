"""What one rank will hold in memory, before any of it is allocated.

Parameters, gradients, optimizer state and averages are counted exactly, from the shards that ``parallelize`` made on the meta
device. Activations are counted by running one micro-batch forward and backward on meta tensors and following which of them
are alive, as an eager allocator would; attention counts as a fused kernel (``FusedAttention``). Gathered parameters follow
from FSDP's rules (``gathered``). The sum is an upper bound: gradients and activations are largest at different moments.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from l3m_like.core.meta_model import MetaModel
from l3m_like.distributed.gradients import local
from l3m_like.distributed.parallelize import DTYPES, apply_checkpointing
from l3m_like.training.updates import Update, assign_parameters


@dataclass(frozen=True)
class Term:
    """One line of the memory table: bytes, what they are, and the setting that makes them fewer."""

    name: str
    bytes: int
    what: str
    knob: str


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank: kept for the backward pass, and alive at the worst moment."""

    saved: int
    peak: int


# ---- exact terms ---------------------------------------------------------------------------------------------------


def local_bytes(tensors: Iterable[Tensor], *, at_least: torch.dtype | None = None) -> int:
    """Bytes of this rank's shards; ``at_least``: of copies in that dtype, or a wider one."""
    return sum(local(t).numel() * (t.dtype if at_least is None else torch.promote_types(t.dtype, at_least)).itemsize for t in tensors)


def static_terms(model: nn.Module, *, ema: bool) -> list[Term]:
    """What is there for the whole run, of a model that ``parallelize`` has sharded (it may be on meta)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    shard = "parallel.dp_shard: more ranks hold smaller shards"
    terms = [
        Term("parameters", local_bytes([*model.parameters(), *model.buffers()]), "master weights, sharded", shard),
        # AdamW: two moments like the parameter, and a float32 step count for each
        Term("optimizer", 2 * local_bytes(trained) + 4 * len(trained), "two moments per weight, sharded", shard),
    ]
    if ema:
        terms.append(Term("ema", local_bytes(trained, at_least=torch.float32), "averaged weights, sharded", "ema: null, or " + shard))
    return terms


# ---- gradients and gathered parameters -----------------------------------------------------------------------------


def gradients(model: nn.Module, *, precision: str, accumulation: int) -> Term:
    """Gradients of all trained parameters. While micro-batches are accumulated FSDP keeps them whole, in the reduction dtype."""
    trained = [p for p in model.parameters() if p.requires_grad]
    sharded = local_bytes(trained)
    if accumulation == 1 or not any(isinstance(p, DTensor) for p in trained):
        return Term("gradients", sharded, "sharded", "parallel.dp_shard: more ranks hold smaller shards")
    wide = torch.float32 if precision == "bf16" else torch.float32
    whole = sum(_unsharded_numel(p) * torch.promote_types(wide, DTYPES[precision]).itemsize for p in trained)
    return Term(
        "gradients",
        max(whole, sharded),
        f"whole, not sharded, while {accumulation} micro-batches are accumulated",
        "batch.micro: one micro-batch per step keeps them sharded; else parallel.tp",
    )


def gathered(parts: Iterable[MetaModel], *, precision: str, reshard_after_forward: bool) -> Term | None:
    """What FSDP puts together for computing: parameters in the compute dtype, and gradients on their way to the shards.

    The root's parameters (those in no unit) stay gathered from forward to backward, and so do their gradients; of the units,
    two at a time (one computes, the next is fetched), or all without ``reshard_after_forward``; one unit's gradients are in
    the buffer of the reduction.
    """
    compute, reduce = DTYPES[precision].itemsize, torch.promote_types(DTYPES[precision], torch.float32).itemsize
    root = units = largest = name_of_largest = 0
    sharded = False
    for part in parts:
        for module in part.modules():
            if not isinstance(module, FSDPModule):
                continue
            sharded = True
            size = sum(_unsharded_numel(p) for p in _own_parameters(module))
            if module is part:
                root += size
            else:
                units += size
                largest, name_of_largest = max((largest, name_of_largest), (size, 1))
    if not sharded:
        return None
    held = 2 * largest if reshard_after_forward else units + largest
    total = compute * (2 * root + held + largest) + reduce * max(largest, 0)
    what = f"the root's {_millions(root)} weights and gradients, {'two units' if reshard_after_forward else 'all units'} of "
    what += f"{_millions(largest)}, one unit's gradients"
    return Term("gathered", total, what, "parallel.tp" if reshard_after_forward else "parallel.reshard_after_forward: true")


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


def _unsharded_numel(parameter: Tensor) -> int:
    return torch.Size(tp_shape(parameter)).numel()


def tp_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape that this rank computes with: whole, but for what tensor parallelism cuts."""
    shape = list(parameter.shape)
    if isinstance(parameter, DTensor):
        names = parameter.device_mesh.mesh_dim_names or ()
        for axis, placement in enumerate(parameter.placements):
            if axis < len(names) and names[axis] == "tp" and placement.is_shard():
                shape[placement.dim] = -(-shape[placement.dim] // parameter.device_mesh.size(axis))
    return tuple(shape)


def _millions(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number < 1e9 else f"{number / 1e9:,.2f} B"


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
    model: nn.Module, updates: Sequence[Update], data: Mapping[str, Tensor], *, checkpointing: str | int, mesh: Any
) -> Activations:
    """Run every update once on the meta tensors ``data``; the most that any of them needs.

    ``model`` is as ``become_local`` leaves it; its units are put under activation checkpointing in place.
    """
    parts = {id(part): part for update in updates for part in update.parts.values()}
    for part in parts.values():
        units = [unit for _, block in part.blocks() for unit in block.shard_units()]
        for unit in units:  # inside of checkpointing: the mode around the whole does not reach what backward recomputes
            unit.forward = functools.partial(_fused_forward, unit.forward)  # type: ignore[method-assign]
        if checkpointing != "none":
            apply_checkpointing(units, checkpointing)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assign_parameters(updates, trained)
    # a gradient leaves for its shard as soon as it is there: it is counted by `gradients`
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in trained.values()]
    most, carried = Activations(0, 0), {}
    known = [*model.parameters(), *data.values()]
    for update in updates:
        update.train_only_own(updates)
        with LiveBytes(known) as live, FusedAttention():
            saved, kept = _forward_backward(update, {**data, **carried}, live, mesh)
        carried |= kept
        most = Activations(max(most.saved, saved), max(most.peak, live.peak))
    for hook in hooks:
        hook.remove()
    return most


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


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class LiveBytes(TorchDispatchMode):
    """Follows the storages of tensors that operations make: bytes alive ``now``, and the ``peak``.

    Args:
        known: tensors whose storages do not count (parameters, inputs).
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}
        for tensor in known:
            self._follow(tensor, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
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
        self.now += size
        self.peak = max(self.peak, self.now)

    def _end_of(self, number: int, size: int) -> Callable[[Any], None]:
        def end(_: Any) -> None:
            del self._alive[number]
            self.now -= size

        return end


class FusedAttention(TorchFunctionMode):
    """On meta tensors ``scaled_dot_product_attention`` takes its textbook form, which keeps the scores of all pairs. Here it
    becomes what an accelerator runs: FlashAttention without a mask, the memory-efficient kernel with one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return _fused(*args, **(kwargs or {}))


def _fused_forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with FusedAttention():
        return forward(*args, **kwargs)


def _fused(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **rest: Any) -> Tensor:
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    group = q.shape[1] // k.shape[1]
    if group > 1:  # this kernel takes no grouped heads: keys and values are repeated
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    bias = torch.zeros_like(attn_mask, dtype=q.dtype).expand(*q.shape[:3], k.shape[2]) if attn_mask.dtype == torch.bool else attn_mask
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, False)[0]
