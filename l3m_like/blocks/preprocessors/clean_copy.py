"""Rows that hold a text twice, noisy and clean, for block diffusion (Arriola et al., arXiv:2503.09573)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError


class CleanCopy(ReadWriteBlock):
    """Put the clean tokens behind the noisy ones: one pass then denoises every block given the clean text before it.

    Reads   noised, ids, positions [B, S] int64; document_ids [B, S] int (-1 = padding)
    Writes  noised, positions, document_ids, stages [B, 2 S], in the stream ``into``: the noisy half, then the clean one; the
            stage of a token of block b is 2b if it is noisy, 2b + 1 if it is clean (what a trunk with the mask "staged" reads)

    Args:
        block: tokens per block, counted from the beginning of each document.
        into: stream of what it writes, since these rows are longer than the others of the stream.
        training_only: a sampler needs no noise.
        ports: reads, writes, stream of ``ReadWriteBlock``.
    """

    outputs = ("noised", "positions", "document_ids", "stages")

    def __init__(
        self, block: int, into: str, *, writes: Mapping[str, str] | None = None, training_only: bool = True, **ports: Any
    ) -> None:
        named = {port: f"{into}_{port}" for port in self.outputs} | dict(writes or {})
        super().__init__(writes=named, training_only=training_only, **ports)
        if block < 1:
            raise UserError(f"CleanCopy: block is {block}; it is a number of tokens, at least 1.")
        self.block = block

    def compute(
        self, noised: Tensor, ids: Tensor, positions: Tensor, document_ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        stages = 2 * (positions // self.block)
        pairs = ((noised, ids), (positions, positions), (document_ids, document_ids), (stages, stages + 1))
        both, twice, documents, numbers = (torch.cat(pair, dim=1) for pair in pairs)
        return both, twice, documents, numbers
