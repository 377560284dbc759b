"""FLOPs of a step, by the blocks' own declarations, and the shares of the chip's peak that they are (MFU, HFU)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from l3m_like.core.meta_model import Frozen
from l3m_like.core.wiring import Trace
from l3m_like.distributed.mesh import Mesh

#: dense bf16 (matrix engine) peak, FLOP/s, by datasheet
PEAK = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "A10": 125e12}

FORMULA = (
    "model FLOPs = 3 x forward of trained blocks (forward 1, backward 2) + 1 x forward of frozen ones; matrix products of "
    "tokens (no padding; logits: with a target) and attention over real document lengths (causal: half of the square); no "
    "embedding table, no recomputation; "
    "MFU = model FLOPs / seconds / (devices x peak); "
    "HFU likewise, with 1 x forward of what activation checkpointing runs again (full: all units, n: every n-th, selective: no "
    "matrix product)"
)


class Work(NamedTuple):
    """FLOPs of one rank's share of a step."""

    model: float
    #: what activation checkpointing runs a second time, at most: torch stops before a unit's last product if no gradient needs it
    recomputed: float

    @property
    def hardware(self) -> float:
        return self.model + self.recomputed


class StepFlops:
    """FLOPs of this rank's micro-batches, or None when a block with parameters does not declare its own.

    Args:
        trace: of the run.
        checkpointing: ``parallel.checkpoint`` of the run. The units of one block count as equal.
    """

    def __init__(self, trace: Trace, checkpointing: str | int = "none") -> None:
        self.trace = trace
        self.undeclared = trace.undeclared()
        self.unknown = f"{', '.join(self.undeclared)} have parameters but no flops(...)" if self.undeclared else None
        if any(_partly_frozen(block) for block, _ in trace.flops_by_block()):
            # a frozen matrix has no gradient to compute: less than two forward passes, by how much no block says
            self.unknown = "some matrices of trained blocks are frozen (lora)"
        if any(program.inference for program in trace.wiring.programs):
            self.unknown = "parts run whose weights get no gradient in that update (updates.*.inference)"
        every = 1 if checkpointing == "full" else checkpointing if isinstance(checkpointing, int) else None
        parts = {id(part): part for program in trace.wiring.programs for part in program.parts.values()}
        #: of the units that checkpointing wraps, in the order in which it takes every n-th
        self._again: set[int] = set()
        for part in parts.values() if every else ():
            units = [unit for _, block in part.blocks() for unit in block.shard_units()]
            self._again |= {id(unit) for unit in units[::every]}

    def of(self, micro: Iterable[Mapping[str, Any]]) -> Work | None:
        if self.unknown:
            return None
        model = recomputed = 0.0
        for batch in micro:
            for block, flops in self.trace.flops_by_block(batch):
                if isinstance(block, Frozen):
                    # no backward pass, or one to its inputs alone; nothing is run again for it
                    model += flops * (2 if block.passes_gradients else 1)
                else:
                    model += 3.0 * flops
                    recomputed += flops * self._share_run_again(block)
        return Work(model, recomputed)

    def _share_run_again(self, block: Any) -> float:
        units = [id(unit) for unit in block.shard_units()] if self._again else []
        return sum(unit in self._again for unit in units) / len(units) if units else 0.0

    def describe(self, peak: float | None) -> str | None:
        """How MFU is counted, for a run's first lines, or why there is none; None where the devices' ``peak`` is not known."""
        if peak is None:
            return None
        if self.unknown:
            return f"no MFU: {self.unknown}"
        return f"{FORMULA}; peak {peak / 1e12:g} TFLOP/s"


def _partly_frozen(block: nn.Module) -> bool:
    trained = {parameter.requires_grad for parameter in block.parameters() if parameter.ndim > 1}
    return not isinstance(block, Frozen) and False in trained


def peak_flops(mesh: Mesh) -> float | None:
    """The dense bf16 peak of all devices of the mesh in FLOP/s, or None where it is not known (then no MFU is reported)."""
    if mesh.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(mesh.device)
    return next((peak * mesh.world_size for key, peak in PEAK.items() if key in name), None)
