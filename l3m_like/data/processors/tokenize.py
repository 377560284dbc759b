"""Text to token ids, one document at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.keys import KeySpec
from l3m_like.data.paths import resolve

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from l3m_like.data.dataset import Visit

BYTES = 256
#: what the end-of-document token is called in published tokenizers
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


class Tokenize:
    """``record[field]`` -> ``ids`` int64 [T], the document's tokens and the end-of-document token.

    Args:
        tokenizer: ``"bytes"`` (UTF-8 bytes 0..255, and 256 = end of document) or the path of a Hugging Face ``tokenizer.json``
            (read at first use).
        vocab_size: the model's. With bytes exactly 257; with a file at least its number of tokens (published models have
            more rows than tokens, for alignment).
        field: which field of the record is the text.
        end: the end-of-document token of a ``tokenizer.json``, by its text; None: the first of ``END_NAMES`` that it has.

    Raises:
        UserError: ``vocab_size`` disagrees with the tokenizer; unknown field; unknown end token.
    """

    def __init__(self, tokenizer: str = "bytes", *, vocab_size: int, field: str = "text", end: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.field = field
        self.end = end
        if tokenizer == "bytes":
            if vocab_size != BYTES + 1:
                raise UserError(
                    f"vocab_size is {vocab_size}, but tokenizer 'bytes' has {BYTES + 1} tokens (256 bytes and the end of a "
                    f"document). Set vocab_size: {BYTES + 1}."
                )
            if end is not None:
                raise UserError(f"end: '{end}' has no meaning with tokenizer 'bytes' (its end is {BYTES}). Remove it.")

    def keys(self) -> dict[str, KeySpec]:
        return {"ids": KeySpec(torch.int64, ("T",), sequence_dim=0, meaning="tokens of one document and the end token")}

    def check(self) -> None:
        """Read the tokenizer's file, if it has one, and compare it with ``vocab_size``."""
        _ = self.end_id

    def __call__(self, sample: Mapping[str, Any], visit: Visit) -> dict[str, np.ndarray]:
        if self.field not in sample:
            raise UserError(f"the record has no field '{self.field}' (key: field). {did_you_mean(self.field, sample)}")
        if not isinstance(sample[self.field], str):
            raise UserError(f"field '{self.field}' is {type(sample[self.field]).__name__}, not text.")
        return {"ids": np.append(self._encode(sample[self.field]), np.int64(self.end_id))}

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without the end token."""
        return [int(token) for token in self._encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; the end token gives nothing, broken UTF-8 the replacement character."""
        if self.tokenizer == "bytes":
            return bytes(token for token in ids if token < BYTES).decode("utf-8", errors="replace")
        return self._file.decode([int(token) for token in ids if token != self.end_id])

    @cached_property
    def end_id(self) -> int:
        """The id of the end-of-document token."""
        if self.tokenizer == "bytes":
            return BYTES
        names = END_NAMES if self.end is None else (self.end,)
        ids = [self._file.token_to_id(name) for name in names]
        found = [token for token in ids if token is not None]
        if not found:
            raise UserError(f"end: {self.tokenizer} has none of the tokens {list(names)}. Name its end token in `end`.")
        return found[0]

    def _encode(self, text: str) -> np.ndarray:
        if self.tokenizer == "bytes":
            return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)
        return np.array(self._file.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    @cached_property
    def _file(self) -> Tokenizer:
        from tokenizers import Tokenizer  # heavy, and not needed for bytes

        (path,) = resolve(self.tokenizer)
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"tokenizer: {path} is not a tokenizer.json: {error}") from error
        size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        if size > self.vocab_size:
            raise UserError(
                f"vocab_size is {self.vocab_size}, but tokenizer '{self.tokenizer}' has {size} tokens. Set vocab_size: {size} "
                "or more."
            )
        return tokenizer
