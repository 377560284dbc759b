"""``--debug``: what went into a run's first forward passes and came out of each block, from hooks attached from outside.

Written into ``debug/`` of the run's directory: ``first_batch.safetensors`` (the loader's tensors of the first micro-batch) and
``blocks.jsonl``, a line for each tensor that a block read or wrote, and for the gradient of each that it wrote::

    {"forward": 0, "block": "trunk", "type": "Transformer", "what": "input", "port": "tokens", "key": "text_tokens",
     "shape": [16, 256, 128], "dtype": "float32", "mean": ..., "std": ..., "min": ..., "max": ..., "nan": 0, "inf": 0}

``what`` is input, output or gradient (with respect to an output); statistics are over the finite values. Other ranks than 0
write ``first_batch.1.safetensors``, ``blocks.1.jsonl`` and so on.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.meta_model import MetaModel
from l3m_like.distributed.gradients import local


class Debug:
    """Records the first training forwards of a model's parts, and turns gradient anomaly checking on (a NaN that appears in
    the backward pass is then an error whose trace shows the line of the forward that it belongs to).

    Args:
        parts: the run's parts, after ``parallelize``.
        folder: the run's directory.
        forwards: how many forward passes (micro-batches) of each part are recorded. The hooks then go away.
        rank: of this process.
    """

    def __init__(self, parts: Mapping[str, MetaModel], folder: str | Path, *, forwards: int = 2, rank: int = 0) -> None:
        self.folder = Path(folder) / "debug"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._suffix = f".{rank}" if rank else ""
        self.path = self.folder / f"blocks{self._suffix}.jsonl"
        self.path.write_text("", encoding="utf-8")
        self.forwards = forwards
        self._batch_saved = False
        self._hooks: list[Any] = []
        for name, part in parts.items():
            _PartRecorder(self, name, part)
        self._anomaly = torch.is_anomaly_enabled()
        torch.autograd.set_detect_anomaly(True)

    def close(self) -> None:
        """Take the hooks away and put anomaly checking back as it was."""
        torch.autograd.set_detect_anomaly(self._anomaly)
        while self._hooks:
            self._hooks.pop().remove()

    def save_batch(self, data: Mapping[str, Any]) -> None:
        """Write the tensors that the first part is given, once."""
        if self._batch_saved:
            return
        from safetensors.torch import save_file

        tensors = {key: local(value).detach() for key, value in data.items() if isinstance(value, Tensor)}
        tensors = {key: value.cpu().contiguous().clone() for key, value in tensors.items()}
        save_file(tensors, self.folder / f"first_batch{self._suffix}.safetensors")
        self._batch_saved = True

    def write(self, row: dict[str, Any]) -> None:
        # opened each time: a run that dies has all lines up to then
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class _PartRecorder:
    """The hooks of one part, and how many of its forwards were recorded."""

    def __init__(self, debug: Debug, name: str, part: MetaModel) -> None:
        self.debug, self.count = debug, -1
        hooks = [part.register_forward_pre_hook(self._begin)]
        for path, block in part.blocks():
            self._attach(f"{name}.{path}" if name else path, block, hooks)
        debug._hooks += hooks

    def _attach(self, path: str, block: ReadWriteBlock, hooks: list[Any]) -> None:
        def after(_: nn.Module, args: tuple[Any, ...], out: Mapping[str, Any]) -> None:
            if self._recording(block):
                self._record(path, block, args[0], out)

        hooks.append(block.register_forward_hook(after))

    def _begin(self, part: nn.Module, args: tuple[Any, ...]) -> None:
        if part.training and torch.is_grad_enabled():
            self.count += 1
            self.debug.save_batch(args[0])

    def _recording(self, block: ReadWriteBlock) -> bool:
        return 0 <= self.count < self.debug.forwards and torch.is_grad_enabled()

    def _record(self, path: str, block: ReadWriteBlock, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        common = {"forward": self.count, "block": path, "type": type(block).__name__}
        for what, ports, data in (("input", block.reads, before), ("output", block.writes, after)):
            for port, key in ports.items():
                value = data.get(key)
                if not isinstance(value, Tensor):
                    continue
                row = {**common, "what": what, "port": port, "key": key}
                self.debug.write(row | statistics(value))
                if what == "output" and value.requires_grad:
                    value.register_hook(functools.partial(self._record_gradient, row | {"what": "gradient"}))

    def _record_gradient(self, row: dict[str, Any], gradient: Tensor) -> None:
        self.debug.write(row | statistics(gradient))


@torch.no_grad()
def statistics(tensor: Tensor) -> dict[str, Any]:
    """Shape, dtype, numbers of NaN and infinite values, and mean, std, min, max of the finite ones (None if there are none)."""
    values = local(tensor).detach()
    described = {"shape": list(values.shape), "dtype": str(values.dtype).removeprefix("torch.")}
    wide = values.to(torch.float64 if values.dtype in (torch.float64, torch.int64) else torch.float32).flatten()
    finite = wide[wide.isfinite()]
    numbers: dict[str, float | None] = dict.fromkeys(("mean", "std", "min", "max"))
    if finite.numel():
        found = {"mean": finite.mean(), "std": finite.std(correction=0), "min": finite.min(), "max": finite.max()}
        numbers = {name: float(value) for name, value in found.items()}
    return described | numbers | {"nan": int(wide.isnan().sum()), "inf": int(wide.isinf().sum())}
