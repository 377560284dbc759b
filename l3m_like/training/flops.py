"""Model FLOPs of a step and the share of the chip's peak that they are (MFU), by the blocks' own declarations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from l3m_like.core.meta_model import Frozen
from l3m_like.core.wiring import Trace
from l3m_like.distributed.mesh import Mesh

#: dense bf16 (matrix engine) peak, FLOP/s, by datasheet
PEAK = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "A10": 125e12}

FORMULA = (
    "model FLOPs = 3 x forward of trained blocks (forward 1, backward 2) + 1 x forward of frozen ones; matrix products and "
    "attention over real document lengths; no embedding table, no recomputation; MFU = model FLOPs / seconds / (devices x peak)"
)


class StepFlops:
    """Model FLOPs of this rank's micro-batches, or None when a block with parameters does not declare its own."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.undeclared = trace.undeclared()

    def of(self, micro: Iterable[Mapping[str, Any]]) -> float | None:
        if self.undeclared:
            return None
        return float(sum(self._one(batch) for batch in micro))

    def _one(self, batch: Mapping[str, Any]) -> float:
        total = 0.0
        for block, flops in self.trace.flops_by_block(batch):
            total += flops if isinstance(block, Frozen) else 3.0 * flops
        return total


def peak_flops(mesh: Mesh) -> float | None:
    """The dense bf16 peak of all devices of the mesh in FLOP/s, or None where it is not known (then no MFU is reported)."""
    if mesh.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(mesh.device)
    return next((peak * mesh.world_size for key, peak in PEAK.items() if key in name), None)
