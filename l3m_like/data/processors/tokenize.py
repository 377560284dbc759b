"""Text to token ids, one document at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.keys import KeySpec
from l3m_like.data.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from l3m_like.data.dataset import Visit


class Tokenize:
    """``record[field]`` -> ``ids`` int64 [T], the document's tokens and the end-of-document token.

    Args:
        tokenizer: ``"bytes"`` (UTF-8 bytes 0..255, and 256 = end of document) or the path of a Hugging Face ``tokenizer.json``
            (read at first use).
        vocab_size: the model's. With bytes exactly 257; with a file at least its number of tokens (published models have
            more rows than tokens, for alignment).
        field: which field of the record is the text (str, or UTF-8 bytes as tars hold).
        end: the end-of-document token of a ``tokenizer.json``, by its text; None: the first of ``tokenizer.END_NAMES`` that it
            has.

    Raises:
        UserError: ``vocab_size`` disagrees with the tokenizer; unknown field; unknown end token.
    """

    def __init__(self, tokenizer: str = "bytes", *, vocab_size: int, field: str = "text", end: str | None = None) -> None:
        self.tokenizer = TextTokenizer(tokenizer, vocab_size, end)
        self.field = field

    def keys(self) -> dict[str, KeySpec]:
        return {"ids": KeySpec(torch.int64, ("T",), sequence_dim=0, meaning="tokens of one document and the end token")}

    def check(self) -> None:
        """Read the tokenizer's file, if it has one, and compare it with ``vocab_size``."""
        _ = self.end_id

    def __call__(self, sample: Mapping[str, Any], visit: Visit) -> dict[str, np.ndarray]:
        if self.field not in sample:
            raise UserError(f"the record has no field '{self.field}' (key: field). {did_you_mean(self.field, sample)}")
        text = sample[self.field]
        if isinstance(text, bytes):  # a tar's member
            text = text.decode("utf-8")
        if not isinstance(text, str):
            raise UserError(f"field '{self.field}' is {type(text).__name__}, not text.")
        return {"ids": np.append(self.tokenizer.encode(text), np.int64(self.end_id))}

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without the end token."""
        return self.tokenizer.encode(text).tolist()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; the end token gives nothing, broken UTF-8 the replacement character."""
        return self.tokenizer.decode(ids)

    @property
    def end_id(self) -> int:
        """The id of the end-of-document token."""
        return self.tokenizer.end_id
