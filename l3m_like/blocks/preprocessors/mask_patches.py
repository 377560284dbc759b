"""What an image model does not see in training: patches left out (MAE), or the rest of a prefix (AIM)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError
from l3m_like.core.random import uniform


class MaskPatches(ReadWriteBlock):
    """Leave out a random part of an image's patches (MAE, He et al., arXiv:2111.06377, section 3): the same number of every row.

    Reads   tokens [B, skip + N, D]; row [B] int64
    Writes  kept [B, skip + K, D], in the order of the draw; restore [B, N] int64, the place of each patch in that order (K and
            above: left out); masked [B, N] bool, True: left out. At inference kept alone, and it is all tokens.

    Args:
        seed: of the run; the patches are functions of (seed, stream, row).
        ratio: of the patches that are left out; K = int(N (1 - ratio)).
        skip: tokens in front that stay (a class token).
        ports: reads, writes, stream of ``ReadWriteBlock``.
    """

    outputs = ("kept", "restore", "masked")
    optional_outputs = ("restore", "masked")
    inference_outputs = ("kept",)

    def __init__(self, seed: int, ratio: float = 0.75, skip: int = 0, **ports: Any) -> None:
        super().__init__(**ports | {"writes": ports.get("writes") or list(self.outputs)})
        if not 0 < ratio < 1:
            raise UserError(f"MaskPatches: ratio is {ratio}; it is above 0 and below 1.")
        self.seed, self.ratio, self.skip = seed, ratio, skip

    def compute(self, tokens: Tensor, row: Tensor, *, outputs: Sequence[str]) -> dict[str, Tensor]:
        if tuple(outputs) == self.inference_outputs:
            return {"kept": tokens}
        front, patches = tokens[:, : self.skip], tokens[:, self.skip :]
        number = patches.shape[1]
        count = int(number * (1 - self.ratio))
        if count < 1:
            raise UserError(f"MaskPatches: ratio {self.ratio} leaves none of {number} patches.")
        noise = uniform(row, (number,), seed=self.seed, purpose=f"mask_patches/{self.stream or ''}", dtype=torch.float64)
        order = noise.argsort(dim=1)
        restore = order.argsort(dim=1)
        kept = patches.gather(1, order[:, :count, None].expand(-1, -1, patches.shape[-1]))
        return {"kept": torch.cat((front, kept), dim=1), "restore": restore, "masked": restore >= count}


class DrawPrefix(ReadWriteBlock):
    """How many patches of an image see each other, the others being predicted: uniform in 1 .. N - 1 for each row (AIM, El-Nouby
    et al., arXiv:2401.08541, section 3.2).

    Reads   tokens [B, N, D]; row [B] int64
    Writes  prefix_lengths [B] int64, for the mask "prefix" of a ``Transformer``; masked [B, N] bool, True: not in the prefix. At
            inference prefix_lengths alone, and it is N: all patches see each other.

    Args:
        seed: of the run; lengths are functions of (seed, stream, row).
        ports: reads, writes, stream of ``ReadWriteBlock``.
    """

    outputs = ("prefix_lengths", "masked")
    optional_outputs = ("masked",)
    inference_outputs = ("prefix_lengths",)

    def __init__(self, seed: int, **ports: Any) -> None:
        super().__init__(**ports | {"writes": ports.get("writes") or list(self.outputs)})
        self.seed = seed

    def compute(self, tokens: Tensor, row: Tensor, *, outputs: Sequence[str]) -> dict[str, Tensor]:
        number = tokens.shape[1]
        if tuple(outputs) == self.inference_outputs:
            return {"prefix_lengths": torch.full_like(row, number)}
        if number < 2:
            raise UserError("DrawPrefix: an image of one patch has nothing to predict; take smaller patches.")
        drawn = uniform(row, seed=self.seed, purpose=f"prefix/{self.stream or ''}", dtype=torch.float64)
        lengths = 1 + (drawn * (number - 1)).long()
        return {"prefix_lengths": lengths, "masked": torch.arange(number, device=row.device) >= lengths[:, None]}
