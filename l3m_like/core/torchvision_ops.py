"""Lets a CUDA build of torchvision be imported beside a CPU build of torch.

torchvision has no CPU wheel on some indexes. Its compiled operators then do not load, and ``import torchvision`` stops where
it declares the fake versions of ``nms``; timm, diffusers and parts of transformers stop with it. Declaring the two operator
signatures first is enough for everything but the operators themselves.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


class _TorchvisionOps(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self.library: Any = None  # kept alive: the declarations end with it

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname == "torchvision" and self.library is None and not _compiled_operators_load():
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                self.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None  # the module itself is found as always


def _compiled_operators_load() -> bool:
    """Whether torchvision is a build for this torch (or is not there at all): then nothing is to be done."""
    import torch

    spec = importlib.machinery.PathFinder.find_spec("torchvision")
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
    library = next(folder.glob("_C.*"), None) if folder is not None else None
    if library is None:
        return folder is None
    try:
        torch.ops.load_library(str(library))
    except OSError:
        return False
    return True


def allow_torchvision() -> None:
    """Call before the first import of timm, diffusers or transformers. Does nothing a second time, nothing if torchvision is
    never imported, and nothing if its build fits torch."""
    if "torchvision" in sys.modules or any(isinstance(finder, _TorchvisionOps) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _TorchvisionOps())
