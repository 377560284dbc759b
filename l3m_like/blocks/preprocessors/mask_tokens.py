"""Noise for masked diffusion: tokens become the mask token (LLaDA, arXiv:2502.09992; MDLM, arXiv:2406.07524)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError
from l3m_like.core.random import uniform_at
from l3m_like.kernels.linear_cross_entropy import IGNORE

#: steps of irrational length, which spread the documents of a row, and the blocks of a document, evenly over (0, 1)
_BY_DOCUMENT, _BY_BLOCK = 0.6180339887498949, 0.41421356237309515


class MaskTokens(ReadWriteBlock):
    """Replace tokens by the mask token, each with the probability of its document's time.

    A document (or each of its blocks) draws a time t, uniform in (0, 1); each of its tokens is masked with the probability
    p = p_min + (p_max - p_min) t. The tokens that were masked are the targets, in their own places, and weigh 1 / p: the sum
    of their weighted losses, divided by the number of tokens, is then an estimate of the negative evidence lower bound per
    token (LLaDA, equation 3).

    Reads   ids, positions, targets [B, S] int64; document_ids [B, S] int (-1 = padding); row [B] int64
    Writes  noised [B, S] int64, the ids with masks; masked_targets [B, S] int64, what was masked, -100 elsewhere;
            weights [B, S] float32, 1 / p at the masked ones, 0 elsewhere

    Args:
        mask_id: the mask token. The text must not hold it.
        vocab_size: V of the model.
        seed: of the run; times are functions of (seed, stream, row, document), masks of (seed, stream, row, place).
        p_min, p_max: bounds of the probability; LLaDA's are 0.001 and 1.
        strata: rows (those of a step: ``${batch.global}``) over which times are spread evenly instead of drawn one by one. Each
            is still uniform, and the loss varies less from step to step. None: all are independent.
        never: ids that are never masked.
        answers_only: mask only what the loader's targets train on: the prompt of a conversation stays as it is.
        per_document: weights are divided by the number of tokens of their document that may be masked, so that every document
            (with ``answers_only``: every answer) counts the same, as in LLaDA's finetuning (algorithm 2). Say so in the loss too.
        shift: the output at place i predicts the token at i + 1, as in a causal model (Dream, arXiv:2508.15487; DiffuLLaMA,
            arXiv:2410.17891): targets and weights stand one place earlier, and a document's first token is never masked.
        block: draw a time for every so many tokens of a document instead of one (block diffusion, arXiv:2503.09573).
        training_only: a sampler supplies the masks.
        ports: reads, writes, stream of ``ReadWriteBlock``.

    Raises:
        UserError: a mask token outside the vocabulary, settings out of range.
    """

    outputs = ("noised", "masked_targets", "weights")

    def __init__(
        self,
        mask_id: int,
        vocab_size: int,
        seed: int,
        *,
        p_min: float = 1e-3,
        p_max: float = 1.0,
        strata: int | None = None,
        never: Sequence[int] = (),
        answers_only: bool = False,
        per_document: bool = False,
        shift: bool = False,
        block: int | None = None,
        training_only: bool = True,
        **ports: Any,
    ) -> None:
        super().__init__(training_only=training_only, **ports)
        check_mask_id("MaskTokens", mask_id, vocab_size)
        if not 0 < p_min <= p_max <= 1:
            raise UserError(f"MaskTokens: p_min and p_max are {p_min} and {p_max}; it must hold 0 < p_min <= p_max <= 1.")
        for name, value in (("strata", strata), ("block", block)):
            if value is not None and value < 1:
                raise UserError(f"MaskTokens: {name} is {value}; it is at least 1 (null: none).")
        self.mask_id = mask_id
        self.seed = seed
        self.p_min, self.p_max = p_min, p_max
        self.strata = strata
        self.never = tuple(never)
        self.answers_only = answers_only
        self.per_document = per_document
        self.shift = shift
        self.block = block

    def compute(
        self, ids: Tensor, positions: Tensor, targets: Tensor, document_ids: Tensor, row: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        purpose = f"mask_tokens/{self.stream or ''}"
        probability = self.p_min + (self.p_max - self.p_min) * self._times(purpose, row, document_ids, positions)
        place = torch.arange(ids.shape[1], device=ids.device)
        masked = uniform_at(self.seed, f"{purpose}/mask", row.unsqueeze(1), place) < probability
        may_be = maskable(document_ids, positions, targets, shift=self.shift, answers_only=self.answers_only)
        masked = masked & may_be
        for token in self.never:
            masked = masked & (ids != token)
        noised = torch.where(masked, self.mask_id, ids)
        masked_targets = torch.where(masked, ids, IGNORE)
        # float32 whatever the model's dtype, so that runs in float32 and float64 see the same weights
        weights = torch.where(masked, 1 / probability, 0).to(torch.float32)
        if self.per_document:
            sizes = document_sizes(document_ids, may_be)
            weights = weights / sizes.gather(1, document_ids.to(torch.int64) + 1).clamp(min=1)
        if self.shift:
            masked_targets = torch.nn.functional.pad(masked_targets[:, 1:], (0, 1), value=IGNORE)
            weights = torch.nn.functional.pad(weights[:, 1:], (0, 1))
        return noised, masked_targets, weights

    def _times(self, purpose: str, row: Tensor, document_ids: Tensor, positions: Tensor) -> Tensor:
        """t [B, S] float64 in (0, 1) of every token."""
        document = document_ids.clamp(min=0).to(torch.int64)
        block = torch.zeros_like(document) if self.block is None else positions // self.block
        row = row.unsqueeze(1)
        if self.strata is None:
            return uniform_at(self.seed, f"{purpose}/time", row, (document << 32) | block)
        # one draw for all rows of a step, and from there even steps around the circle
        start = uniform_at(self.seed, f"{purpose}/times", row // self.strata, torch.zeros_like(row))
        around = (row % self.strata).double() / self.strata + _BY_DOCUMENT * document.double() + _BY_BLOCK * block.double()
        return (start + around) % 1.0


def maskable(document_ids: Tensor, positions: Tensor, targets: Tensor, *, shift: bool, answers_only: bool) -> Tensor:
    """Which tokens noise may mask, bool [B, S], from the loader's keys alone; arguments as in ``MaskTokens``."""
    real = document_ids >= 0
    if shift or answers_only:
        real = real & (positions > 0)
    if answers_only:  # the loader's target of a token is the next one
        real = real & torch.nn.functional.pad(targets[:, :-1] != IGNORE, (1, 0), value=False)
    return real


def document_sizes(document_ids: Tensor, counted: Tensor) -> Tensor:
    """How many ``counted`` (bool [B, S]) tokens every document of a row has: int64 [B, S + 1], padding (-1) first, for document
    ids [B, S] that begin with 0 in every row."""
    sizes = torch.zeros(len(counted), counted.shape[1] + 1, dtype=torch.int64, device=counted.device)
    return sizes.scatter_add(1, document_ids.to(torch.int64) + 1, counted.to(torch.int64))


def check_mask_id(name: str, mask_id: int, vocab_size: int) -> None:
    """An error unless the model has a row for the mask token."""
    if not 0 <= mask_id < vocab_size:
        raise UserError(
            f"{name}: mask_id is {mask_id}, but the model's ids are 0 .. {vocab_size - 1}. Name an id that the text never has: "
            f"a spare row of the vocabulary, or a new one with vocab_size: {mask_id + 1}."
        )
