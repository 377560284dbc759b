"""What a unit's forward pass keeps for its backward pass: part of it is computed again (checkpointing), or lies in host memory
in between (offload). Both wrap ``unit.forward``; no parameter changes its name.

Checkpointing is inside of the compiled unit, where the compiler cuts the graph by it. Offload is outside of it: the hooks of
autograd see what the compiled graph saves, as they see what eager operations save.
"""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.distributed.low_precision import copy_of

Forward = Callable[..., Any]

# ---- checkpointing: which operations' results are kept -------------------------------------------------------------------

MATMULS = frozenset({"mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_grouped_mm", "_scaled_grouped_mm"})


def is_matmul(name: str) -> bool:
    return name.rpartition("::")[2] in MATMULS


def is_attention(name: str) -> bool:
    """By its name, so that every backend's is found: aten's fused ones, ``torch_attn::_varlen_attn``, ``flash_attn*::*``, flex
    attention (a higher-order operator) and kernels of our own, whether or not they are installed here."""
    return ("attention" in name or "attn" in name) and "backward" not in name and "bwd" not in name


#: name in a config -> does it hold the operator with this qualified name ("aten::mm")?
GROUPS: dict[str, Callable[[str], bool]] = {"matmul": is_matmul, "attention": is_attention, "every_second_matmul": is_matmul}


@dataclass(frozen=True)
class Checkpointing:
    """``parallel.checkpoint``, understood.

    Args:
        every: of the units, every n-th is recomputed (the first is).
        save: groups, or qualified names of operators, whose results are kept; empty: only the unit's inputs are.
    """

    every: int = 1
    save: tuple[str, ...] = ()

    @classmethod
    def of(cls, mode: str | int | Mapping[str, Any]) -> Checkpointing | None:
        """None: nothing is recomputed.

        Raises:
            UserError: no such mode, group or operator.
        """
        if mode in ("none", "full", "selective"):
            return {"none": None, "full": cls(), "selective": cls(save=("matmul", "attention"))}[str(mode)]
        if isinstance(mode, Mapping):
            for key in mode:
                if key not in ("save", "every"):
                    raise UserError(f"parallel.checkpoint has no setting '{key}'. {did_you_mean(str(key), ('save', 'every'))}")
            save, every = mode.get("save", ()), mode.get("every", 1)
            names = (save,) if isinstance(save, str) else tuple(save)
            if isinstance(every, int) and every >= 1 and names:
                return cls(every, tuple(_known(str(name)) for name in names))
        elif isinstance(mode, int) and not isinstance(mode, bool) and mode >= 1:
            return cls(mode)
        raise UserError(
            f"parallel.checkpoint is {mode!r}; it is none, full, selective or a number n (every n-th unit), or what is kept: "
            "{save: [matmul, attention], every: 1}."
        )

    def keeps(self) -> Callable[[str], bool]:
        """A new rule: is the result of the next operator, of this name, kept? Every second matmul is one by order, so that a
        forward pass and its recomputation need a rule each."""
        tests = [GROUPS.get(name, name.__eq__) for name in self.save if name != "every_second_matmul"]
        alternate = "every_second_matmul" in self.save
        matmuls = 0

        def keep(name: str) -> bool:
            nonlocal matmuls
            if any(test(name) for test in tests):
                return True
            matmuls += is_matmul(name)
            return alternate and is_matmul(name) and matmuls % 2 == 1

        return keep


def _known(name: str) -> str:
    """``name`` itself, if it is a group or a registered operator."""
    space, _, short = name.rpartition("::")
    if name in GROUPS or (space and hasattr(getattr(torch.ops, space), short)):
        return name
    registered = [op.partition(".")[0] for op in torch._C._dispatch_get_all_op_names()] if space else []
    raise UserError(
        f"parallel.checkpoint.save: '{name}' is neither a group ({', '.join(GROUPS)}) nor an operator such as aten::mm. "
        f"{did_you_mean(name, dict.fromkeys([*GROUPS, *registered]))}"
    )


def apply_checkpointing(units: Sequence[nn.Module], mode: str | int | Mapping[str, Any]) -> None:
    """Recompute the chosen units in the backward pass; dropout draws the same again."""
    chosen = Checkpointing.of(mode)
    if chosen is None:
        return
    context: dict[str, Any] = {"context_fn": functools.partial(_contexts, chosen)} if chosen.save else {}
    for unit in units[:: chosen.every]:
        unit.forward = _checkpointed(unit.forward, context)  # type: ignore[method-assign]
        unit.recomputed = True  # type: ignore[assignment]


def _checkpointed(forward: Forward, context: Mapping[str, Any]) -> Forward:
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **context, **kwargs)

    return recomputed


def _contexts(chosen: Checkpointing) -> Any:
    # one rule each: torch asks again while it recomputes
    rules = {False: chosen.keeps(), True: chosen.keeps()}

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if rules[ctx.is_recompute](_name_of(op)) else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


@functools.cache
def _name_of(op: Any) -> str:
    """The qualified name: ``aten::mm``; ``higher_order::flex_attention``."""
    return op._schema.name if isinstance(op, torch._ops.OpOverload) else f"higher_order::{op.name()}"


# ---- offload ---------------------------------------------------------------------------------------------------------------


def apply_offload(
    units: Sequence[nn.Module], device: torch.device, *, keep: int = 1, every: int = 1, smallest: int = 1 << 20
) -> Offload:
    """Keep in host memory what every ``every``-th unit saves for its backward pass, but for the last ``keep`` units.

    Args:
        units: in the order in which they run.
        device: where they compute. On the CPU it is the same, synchronously; on meta the host's copies are left out.
        keep: at least 1; the backward pass begins with the last unit, so its tensors would come back at once.
        smallest: bytes; smaller tensors stay.
    """
    if units and keep >= len(units):
        raise UserError(
            f"parallel.offload.keep is {keep}, and there are {len(units)} units: nothing would be offloaded. Lower it, or set "
            "parallel.offload: null."
        )
    offload = Offload(device, smallest)
    for number, unit in enumerate(units):
        away = number < len(units) - keep and number % every == 0
        unit.forward = offload.around(unit, unit.forward, number, away)  # type: ignore[method-assign]
    return offload


def refuse_hidden(mode: str | int | Mapping[str, Any], *, compiled: bool) -> None:
    """Eager selective checkpointing holds what it keeps where autograd's hooks do not see it."""
    chosen = Checkpointing.of(mode)
    if chosen is not None and chosen.save and not compiled:
        raise UserError(
            f"parallel.offload with parallel.checkpoint {mode!r} needs parallel.compile: true. Eager, the results that are kept "
            "are out of reach and would stay on the device. Set parallel.checkpoint to none, full or a number."
        )


class Offload:
    """Copies what units save to host memory on a stream of its own, and back one unit ahead of the backward pass.

    A unit's tensors are copied when its forward has been issued, while the next unit computes; the device's memory is given up
    after that one (the compute stream waits for the copy first, so the allocator needs to know nothing). When the backward pass
    of a unit begins, the tensors of the unit before it are fetched. The host never waits. Whole storages are moved, each once,
    however many tensors look at it. Host buffers (pinned) are used again from step to step.
    """

    def __init__(self, device: torch.device, smallest: int) -> None:
        self.device, self.smallest = device, smallest
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.last: Pass | None = None
        self._free: dict[int, list[Tensor]] = defaultdict(list)

    def around(self, unit: nn.Module, forward: Forward, number: int, away: bool) -> Forward:
        def offloaded(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            # a lower number: another forward pass has begun
            previous = self.last if self.last is not None and self.last.number < number else None
            made = Pass(self, number, away, [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)], previous)
            if away:
                # FSDP frees parameters and gathers them again
                made.stay |= {storage_id(t) for t in (*unit.parameters(), *unit.buffers())}
                copies = (copy_of(parameter) for parameter in unit.parameters())
                made.stay |= {storage_id(copy) for copy in copies if copy is not None}
            with saved_tensors_hooks(made.pack, made.unpack):
                out = forward(*args, **kwargs)
            made.finish()
            self.last = made
            return out

        return offloaded

    def host_buffer(self, size: int) -> Tensor:
        """uint8, at least ``size`` long. A power of two: torch's pinned allocator takes no less anyway."""
        size = 1 << (size - 1).bit_length()
        if self._free[size]:
            return self._free[size].pop()
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def give_back(self, buffer: Tensor) -> None:
        # the next copy into it is on the same stream as the last one out of it
        self._free[buffer.numel()].append(buffer)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Copy (to, from), after everything issued so far; an event that is done when the copies are (None: they are)."""
        if self.stream is None:
            for to, source in pairs:
                to.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, event: Any) -> None:
        """What is issued from now on comes after ``event``."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


class Pass:
    """One forward pass of one unit, and its backward pass."""

    def __init__(self, offload: Offload, number: int, away: bool, inputs: Sequence[Tensor], previous: Pass | None) -> None:
        self.offload, self.number, self.away, self.previous = offload, number, away, previous
        # weak: what is gone may have left its place in memory to another
        self.inputs = {storage_id(t): weakref.ref(t) for t in inputs}
        before = previous.inputs if previous is not None else {}
        #: storages that are not moved: tables and masks are no unit's own, nor is what the unit before got as well
        self.stay = {
            number
            for t in inputs
            for number in [storage_id(t)]
            if not t.requires_grad or (number in before and before[number]() is not None)
        }
        #: by storage, until the device's memory is given up
        self.held: dict[int, Slot] = {}
        self.slots: list[weakref.ref[Slot]] = []
        self.begun = False

    def pack(self, tensor: Tensor) -> Any:
        inner = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        goes = self.away and type(inner) in (Tensor, nn.Parameter) and inner.device.type == self.offload.device.type
        storage = inner.untyped_storage() if goes else None
        if storage is None or storage.nbytes() < self.offload.smallest or storage._cdata in self.stay:
            # an operation that kept its own result would keep itself alive
            return tensor if tensor.grad_fn is None else tensor.detach()
        if storage._cdata not in self.held:
            self.held[storage._cdata] = Slot(self.offload, storage)
        return Saved(self.held[storage._cdata], inner, tensor if isinstance(tensor, DTensor) else None)

    def finish(self) -> None:
        """The forward pass has been issued: copy what it saved, and give up what the unit before had copied."""
        if self.held:
            slots = list(self.held.values())
            self.slots = [weakref.ref(slot) for slot in slots]
            leave(self.offload, slots)
        if self.previous is not None:
            for slot in self.previous.held.values():
                slot.give_up()
            self.previous.held.clear()

    def unpack(self, value: Any) -> Tensor:
        if not self.begun:
            self.begun = True
            self.held.clear()  # a backward pass that began before the next unit's forward: they are still on the device
            self.fetch()
            if self.previous is not None:
                self.previous.fetch()
                self.previous = None
        return value.tensor() if isinstance(value, Saved) else value

    def fetch(self) -> None:
        come_back(self.offload, [slot for slot in (ref() for ref in self.slots) if slot is not None])
        self.slots = []


class Slot:
    """A storage that is on the device, on the host, or both. It lives as long as a saved tensor looks at it."""

    def __init__(self, offload: Offload, storage: torch.UntypedStorage) -> None:
        self.offload, self.size = offload, storage.nbytes()
        self.storage: torch.UntypedStorage | None = storage
        self.host: Tensor | None = None
        self.event: Any = None  # of the copy that reads or writes `storage`

    def give_up(self) -> None:
        self.settle()
        self.storage = None

    def settle(self) -> None:
        """From now on the compute stream may use, or reuse, the device's memory."""
        self.offload.wait(self.event)
        self.event = None

    def __del__(self) -> None:
        self.settle()
        if self.host is not None:
            self.offload.give_back(self.host)


def leave(offload: Offload, slots: Sequence[Slot]) -> None:
    if offload.device.type == "meta":
        return
    for slot in slots:
        slot.host = offload.host_buffer(slot.size)
    event = offload.copy([(slot.host[: slot.size], _bytes(slot.storage)) for slot in slots if slot.host is not None])
    for slot in slots:
        slot.event = event


def come_back(offload: Offload, slots: Sequence[Slot]) -> None:
    gone = [slot for slot in slots if slot.storage is None]
    # allocated on the compute stream, to which the memory returns
    made = [torch.empty(slot.size, dtype=torch.uint8, device=offload.device) for slot in gone]
    pairs = [(to, slot.host[: slot.size]) for to, slot in zip(made, gone, strict=True) if slot.host is not None]
    event = offload.copy(pairs) if pairs else None
    for slot, to in zip(gone, made, strict=True):
        slot.storage, slot.event = to.untyped_storage(), event


class Saved:
    """What autograd keeps instead of a tensor: a view of a slot, and for a DTensor how it is put together."""

    def __init__(self, slot: Slot, inner: Tensor, whole: DTensor | None) -> None:
        self.slot = slot
        self.view = inner.dtype, inner.storage_offset(), inner.size(), inner.stride()
        self.whole: Any = None
        if whole is not None:
            names, context = whole.__tensor_flatten__()
            others = {name: getattr(whole, name) for name in names if name != "_local_tensor"}
            self.whole = others, context, whole.size(), whole.stride()

    def tensor(self) -> Tensor:
        self.slot.settle()
        assert self.slot.storage is not None
        dtype, offset, size, stride = self.view
        device = self.slot.storage.device
        inner = torch.empty(0, dtype=dtype, device=device).set_(self.slot.storage, offset, size, stride)
        if self.whole is None:
            return inner
        others, context, *sizes = self.whole
        return DTensor.__tensor_unflatten__({"_local_tensor": inner, **others}, context, *sizes)


def _bytes(storage: torch.UntypedStorage | None) -> Tensor:
    assert storage is not None
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def storage_id(tensor: Tensor) -> int:
    """Equal for all views of one memory, while one of them lives."""
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()._cdata
