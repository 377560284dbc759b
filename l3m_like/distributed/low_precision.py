"""Computing in bf16 with fp32 master weights, in one process: what FSDP's mixed precision does, without its copies.

A module's registered parameters stay the fp32 masters: optimizers, averages and checkpoints see nothing else. Its attribute
(``module.weight``), which is what a forward reads, is a bf16 copy: an entry of the instance's own dictionary, which Python looks
up before it asks ``nn.Module`` for a parameter. The copies are made at the first forward and brought up to date, all in one
call, at the first one after the masters have changed. A copy's gradient is handed to its master, and further ones are summed
there in fp32.

Copies of weights that a layer multiplies as one matrix (``joint``: names of its linear layers) lie one behind the other, so that
they need not be joined in every step.

A deep copy of the whole module makes copies of its own. One of a part of it keeps bf16 weights that nothing brings up to date.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


class LowPrecision:
    """A forward pre-hook of ``root``, for all of its floating-point parameters but those of modules in ``leave``."""

    def __init__(self, root: nn.Module, dtype: torch.dtype, leave: Iterable[nn.Module] = ()) -> None:
        self.dtype = dtype
        self.leave = list(leave)
        self.masters: list[Any] = []
        self.copies: list[Any] = []
        self.versions: list[int] = []
        root.register_forward_pre_hook(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> LowPrecision:
        """That of a copied module: it makes copies of its own at its first forward."""
        other = object.__new__(LowPrecision)
        memo[id(self)] = other
        other.dtype, other.leave = self.dtype, deepcopy(self.leave, memo)
        other.masters, other.copies, other.versions = [], [], []
        return other

    def __call__(self, root: nn.Module, args: Any) -> None:
        if not self.copies:
            self._make(root)
        for master, copy in zip(self.masters, self.copies, strict=True):
            copy.requires_grad_(master.requires_grad)
        old = [i for i, master in enumerate(self.masters) if master._version != self.versions[i]]
        if old:
            with torch.no_grad():
                torch._foreach_copy_([self.copies[i] for i in old], [self.masters[i] for i in old])
            for i in old:
                self.versions[i] = self.masters[i]._version

    def _make(self, root: nn.Module) -> None:
        copies: dict[int, nn.Parameter] = {}
        self.left = {id(module) for module in self.leave}
        self._join(root)
        for module in root.modules():
            if id(module) in self.left:
                continue
            for name, master in module._parameters.items():
                if master is None or not master.is_floating_point():
                    continue
                if id(master) not in copies:  # a tied parameter has one copy
                    copies[id(master)] = self._copy(master)
                    self.masters.append(master)
                    self.versions.append(-1)
                module.__dict__[name] = copies[id(master)]
        self.copies = list(copies.values())

    def _join(self, root: nn.Module) -> None:
        """Make the copies of weights that are multiplied as one; their first layer gets ``joined_weight``."""
        for module in root.modules():
            for names in getattr(module, "joint", ()):
                layers = [getattr(module, name) for name in names]
                if any(type(layer) is not nn.Linear or id(layer) in self.left for layer in layers):
                    continue
                weights = [layer._parameters["weight"] for layer in layers]  # the masters
                if any(copy_of(weight) is not None for weight in weights) or len(set(weights)) < len(weights):
                    continue  # tied
                joined = torch.empty(sum(map(len, weights)), weights[0].shape[1], dtype=self.dtype, device=weights[0].device)
                for weight, place in zip(weights, joined.split([len(weight) for weight in weights]), strict=True):
                    self._copy(weight, place)
                layers[0].__dict__["joined_weight"] = joined

    def _copy(self, master: Any, place: Tensor | None = None) -> nn.Parameter:
        """The copy of ``master``, made in ``place``."""
        known = copy_of(master)  # of another part that shares the parameter
        if isinstance(known, nn.Parameter) and known.dtype == self.dtype:
            return known
        copy = nn.Parameter(torch.empty_like(master, dtype=self.dtype) if place is None else place)
        copy.register_post_accumulate_grad_hook(_hand_over_to(master))  # also of one that is trained only later
        master.low_precision_copy = copy
        master.grad_dtype = None  # any: that of the copy
        return copy


def copy_of(master: Tensor) -> Tensor | None:
    """The low-precision copy of a parameter. Whoever writes a master without autograd's knowledge (a kernel) writes it too."""
    return getattr(master, "low_precision_copy", None)


def write_copies(masters: Iterable[Tensor]) -> None:
    """Bring the copies of ``masters`` up to date, after a change that did not move their version counters."""
    pairs = [(copy, master) for master in masters if (copy := copy_of(master)) is not None]
    if pairs:
        with torch.no_grad():
            torch._foreach_copy_([copy for copy, _ in pairs], [master for _, master in pairs])


def _hand_over_to(master: nn.Parameter) -> Callable[[Tensor], None]:
    # the master holds its copy, whose hooks lie where no garbage collector looks: held by them, it would never be freed
    weak = weakref.ref(master)

    def hand_over(copy: Tensor) -> None:
        master = weak()
        assert copy.grad is not None
        if master is None:  # the module is gone, and only gradients of its inputs are wanted
            copy.grad = None
            return
        if master.grad is None:
            master.grad = copy.grad
        else:
            master.grad = master.grad.to(master.dtype).add_(copy.grad)
        copy.grad = None

    return hand_over
