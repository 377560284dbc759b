"""Perplexity of text, per token, byte or word."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.kernels.linear_cross_entropy import IGNORE
from l3m_like.losses.loss import Loss

PER = ("token", "byte", "word")


class Perplexity(Loss):
    """exp of the negative log-likelihood of all targets per token, byte or word: the last two compare models of other tokenizers.

    Reads   nll [B, S] float, 0 where there is no target
    Counts  targets that are not -100, their bytes, or the words that begin in them (words are parted by ASCII whitespace; the
            first token of a document is no target, and the end token has neither bytes nor words)

    Args:
        per: "token", "byte" or "word".
        bits: show bits (log2 of the perplexity: bits per byte) instead.
        tokenizer: for bytes and words, that of the data: a ``l3m_like.data.TextTokenizer``.
    """

    def __init__(
        self,
        per: str = "token",
        *,
        bits: bool = False,
        tokenizer: Any = None,
        weight: None = None,
        **ports: Any,
    ) -> None:
        if per not in PER:
            raise UserError(f"Perplexity: per is '{per}'. {did_you_mean(per, PER)}")
        if per != "token" and tokenizer is None:
            raise UserError(
                f"Perplexity per {per} needs the tokenizer of the data: {{_target_: l3m_like.data.TextTokenizer, path: ..., "
                "vocab_size: ...}."
            )
        super().__init__(weight=weight, **ports)
        self.per, self.bits, self.tokenizer = per, bits, tokenizer

    def compute(self, nll: Tensor) -> Tensor:
        return nll.to(torch.promote_types(nll.dtype, torch.float32)).sum()

    def count(self, targets: Tensor, ids: Tensor) -> Tensor:
        real = targets != IGNORE
        if self.per == "token":
            return real.sum()
        token = targets.clamp(min=0)
        if self.per == "byte":
            return (self._table["bytes"][token] * real).sum()
        begins = self._table["first_is_word"][token] & self._table["ends_word"][ids]
        return ((self._table["words_inside"][token] + begins) * real).sum()

    def shown(self, mean: float) -> float:
        return mean / math.log(2) if self.bits else math.exp(min(mean, 700.0))  # beyond it there is no float64

    @cached_property
    def _table(self) -> dict[str, Tensor]:
        """Of every token [V]: its bytes; words that begin behind its first byte; whether its first byte is part of a word;
        whether a word behind it would be another one."""
        texts = self.tokenizer.token_bytes()
        spaces = [[byte in b" \t\n\r\v\f" for byte in text] for text in texts]
        return {
            "bytes": torch.tensor([len(text) for text in texts]),
            "words_inside": torch.tensor([sum(a and not b for a, b in zip(s, s[1:], strict=False)) for s in spaces]),
            "first_is_word": torch.tensor([bool(s) and not s[0] for s in spaces]),
            "ends_word": torch.tensor([not s or s[-1] for s in spaces]),
        }
