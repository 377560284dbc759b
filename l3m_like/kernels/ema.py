"""The step of an exponential moving average of many tensors, in one launch: 12 bytes per weight.

torch's ``_foreach_lerp_`` has one launch for many tensors only if the weight of the new value is a number of the host, and
whether a step was skipped is known on the device alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from l3m_like.kernels.launch import jit, tl
from l3m_like.kernels.table import Table

_BLOCK = 2048


def ema_reference(averages: Sequence[Tensor], weights: Sequence[Tensor], decay: float, skipped: Tensor | None = None) -> None:
    """The definition, in place, each in the average's dtype; arguments as ``EMATable.update``. No host sync."""
    for dtype in {average.dtype for average in averages}:
        share = torch.full((), 1 - decay, dtype=dtype, device=averages[0].device)
        share = share if skipped is None else share * (1 - skipped.to(dtype))
        for average, weight in zip(averages, weights, strict=True):
            if average.dtype == dtype:
                average.lerp_(weight.to(dtype), share)


class EMATable(Table):
    """Weights and the averages that follow them: float32."""

    def __init__(self, averages: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        super().__init__(list(zip(weights, averages, strict=True)), _BLOCK)

    def update(self, decay: float, skipped: Tensor | None = None) -> None:
        """``average += (1 - decay) (weight - average)`` in place by Triton; autograd's version counters do not move.

        Args:
            skipped: device scalar; where it is 1, nothing changes.
        """
        _ema_kernel[(len(self.places),)](
            self.addresses,
            self.places,
            self.places if skipped is None else skipped,
            1 - decay,
            CHECKED=skipped is not None,
            ALIGNED=self.aligned,
            BLOCK=_BLOCK,
            num_warps=8,
        )


@jit
def _ema_kernel(  # type: ignore[no-untyped-def]
    table, places, skipped, share, CHECKED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    if CHECKED and tl.load(skipped) > 0:
        return
    program = tl.program_id(0).to(tl.int64)
    row = table + 3 * tl.load(places + 2 * program).to(tl.int64)
    weight = tl.load(row).to(tl.pointer_type(tl.float32))
    average = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    size = tl.load(row + 2)
    if ALIGNED:
        weight, average = tl.multiple_of(weight, 16), tl.multiple_of(average, 16)
        size = tl.multiple_of(size, 16)  # the mask, too, keeps loads narrow
    at = tl.load(places + 2 * program + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    a = tl.load(average + at, mask=inside, other=0.0)
    a += share * (tl.load(weight + at, mask=inside, other=0.0) - a)
    tl.store(average + at, a, mask=inside)
