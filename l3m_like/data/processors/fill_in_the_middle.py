"""Documents with a part moved to their end, so that a model learns to fill a gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from l3m_like.core.errors import UserError
from l3m_like.core.keys import KeySpec
from l3m_like.data.processors.tokenize import Tokenize

if TYPE_CHECKING:
    from l3m_like.data.dataset import Visit

PIECES = ("prefix", "middle", "suffix")


class FillInTheMiddle:
    """Some documents of ``process``, cut at two random borders between tokens and put in another order:

    - PSM: <prefix> p <suffix> s <middle> m, end of document
    - SPM: <prefix> <suffix> s <middle> p m, end of document

    No token is lost; three are added. Source: Bavarian et al., "Efficient training of language models to fill in the middle"
    (2022), who cut between characters; here, between tokens, a gap never begins inside one.

    Args:
        process: makes the tokens, with a ``tokenizer.json``.
        tokens: ``{prefix, middle, suffix}``: the texts of the three tokens in it, e.g. ``<|fim_prefix|>``.
        rate: the part of the documents that is changed.
        spm_rate: the part of those that is written as SPM.

    Raises:
        UserError: rates outside [0, 1]; tokens that are not the three, or not in the tokenizer; tokenizer ``bytes``.
    """

    #: a document that is rearranged has three tokens more, and which ones are is drawn in every epoch
    sizes_vary = True

    def __init__(self, process: Tokenize, tokens: Mapping[str, str], rate: float = 0.5, spm_rate: float = 0.5) -> None:
        if not (0 <= rate <= 1 and 0 <= spm_rate <= 1):
            raise UserError(f"rate is {rate} and spm_rate {spm_rate}; they are from 0 to 1.")
        if set(tokens) != set(PIECES):
            raise UserError(f"tokens has {sorted(tokens)}; it needs {list(PIECES)}.")
        if process.tokenizer.is_bytes:
            raise UserError("FillInTheMiddle needs three tokens that 'bytes' does not have. Give process a tokenizer.json.")
        self.process = process
        self.tokens = dict(tokens)
        self.rate = rate
        self.spm_rate = spm_rate

    def keys(self) -> dict[str, KeySpec]:
        return self.process.keys()

    def check(self) -> None:
        """Read the tokenizer's file and find the tokens in it."""
        self.process.check()
        _ = self._ids

    def __call__(self, sample: Mapping[str, Any], visit: Visit) -> dict[str, np.ndarray]:
        ids = self.process(sample, visit)["ids"]
        draws = visit.draws("fill_in_the_middle")
        if draws.uniform() >= self.rate:
            return {"ids": ids}
        document, end = ids[:-1], ids[-1:]
        spm = draws.uniform() < self.spm_rate
        first, last = sorted(draws.integer(len(document) + 1) for _ in range(2))
        p, m, s = document[:first], document[first:last], document[last:]
        prefix, middle, suffix = (self._ids[name] for name in PIECES)
        parts = [prefix, suffix, s, middle, p, m, end] if spm else [prefix, p, suffix, s, middle, m, end]
        return {"ids": np.concatenate(parts)}

    def encode(self, text: str) -> list[int]:
        """See ``Tokenize.encode``."""
        return self.process.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Tokenize.decode``."""
        return self.process.decode(ids)

    @property
    def end_id(self) -> int:
        return self.process.end_id

    @cached_property
    def _ids(self) -> dict[str, np.ndarray]:
        """The three tokens, int64 [1] each."""
        found = {name: self.process.tokenizer.id_of(text) for name, text in self.tokens.items()}
        for name, token in found.items():
            if token is None:
                raise UserError(f"tokens: {self.process.tokenizer.path} has no token '{self.tokens[name]}' ({name}).")
        return {name: np.array([token], dtype=np.int64) for name, token in found.items()}
