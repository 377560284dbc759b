"""One launch over many tensors, wherever autograd and the model have put them: kernels find them by a table of addresses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from l3m_like.kernels.launch import HAS_TRITON


class Table:
    """Tensors that a launch works on element by element, a program per block. They must stay where they are.

    Attributes:
        addresses: int64 [rows, columns + 1], on the device: where each tensor is (0: None), then how many elements the row has.
        places: int32 [programs, 2], on the device: a program's row, and which block of it.
        aligned: whether all sizes and addresses are multiples of 16, as wide loads need.
    """

    def __init__(self, rows: Sequence[tuple[Tensor, *tuple[Tensor | None, ...]]], block: int) -> None:
        """``rows``: tensors of one shape each, contiguous; scalars may be among them, but not first."""
        device = rows[0][0].device
        numbers = [[0 if tensor is None else tensor.data_ptr() for tensor in row] + [row[0].numel()] for row in rows]
        self.addresses = on_device(torch.tensor(numbers, dtype=torch.int64), device)
        self.places = places_of([row[-1] for row in numbers], block, device)
        self.aligned = not any(number % 16 for row in numbers for number in row)
        self._where = [row[0] for row in numbers]

    def moved(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the rows' first tensors, ``tensors`` now, are no longer where the table says."""
        return self._where != [tensor.data_ptr() for tensor in tensors]


def places_of(sizes: Sequence[int], block: int, device: torch.device) -> Tensor:
    """A program per block of so many elements of tensors of these ``sizes``: ``Table.places``."""
    blocks = [-(-size // block) for size in sizes]
    which = np.repeat(np.arange(len(blocks), dtype=np.int32), blocks)
    first = np.repeat(np.cumsum([0, *blocks[:-1]]), blocks)
    places = np.stack((which, (np.arange(len(which)) - first).astype(np.int32)), axis=1)
    return on_device(torch.from_numpy(places), device)


def addresses(tensors: Sequence[Tensor | None], device: torch.device) -> tuple[Tensor, bool]:
    """Where the tensors are, int64 on the device, 0 for None; and whether loads of 16 bytes may be used for all of them."""
    where = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    return on_device(torch.tensor(where, dtype=torch.int64), device), not any(address % 16 for address in where)


def takes(tensor: Tensor) -> bool:
    """Whether the kernels that step weights take ``tensor`` (a shard): float32 on CUDA, contiguous."""
    return HAS_TRITON and tensor.is_cuda and tensor.dtype == torch.float32 and tensor.is_contiguous()


def on_device(numbers: Tensor, device: torch.device) -> Tensor:
    """From pinned memory, so that the host does not wait."""
    return (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)
