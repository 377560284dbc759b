"""Token ids that are stored as such."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from l3m_like.core.errors import UserError
from l3m_like.core.keys import KeySpec

if TYPE_CHECKING:
    from l3m_like.data.dataset import Visit


class TokenIds:
    """``ids``, an array of integers [T] -> ``ids`` int64 [T], or [T + 1] with the end-of-document token.

    Args:
        vocab_size: the model's; every id is below it.
        end: the id of the end-of-document token, appended to each document. None: the documents have it, or need none.

    Raises:
        UserError: ids that are no integers or not of the vocabulary; an empty document.
    """

    def __init__(self, vocab_size: int, end: int | None = None) -> None:
        if end is not None and not 0 <= end < vocab_size:
            raise UserError(f"end is {end}, but ids go from 0 to vocab_size - 1 = {vocab_size - 1}.")
        self.vocab_size = vocab_size
        self.end = end

    def keys(self) -> dict[str, KeySpec]:
        return {"ids": KeySpec(torch.int64, ("T",), sequence_dim=0, meaning="tokens of one document")}

    def check(self) -> None:
        """Nothing to read ahead."""

    def __call__(self, sample: Mapping[str, Any], visit: Visit) -> dict[str, np.ndarray]:
        if "ids" not in sample:
            raise UserError(f"the sample has {sorted(sample)}; it needs 'ids'. For text use Tokenize.")
        ids = np.asarray(sample["ids"])
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size:
            raise UserError(f"'ids' is {ids.dtype} {list(ids.shape)}; it is integers [T], at least one.")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise UserError(f"'ids' go from {ids.min()} to {ids.max()}, but vocab_size is {self.vocab_size}.")
        ids = ids.astype(np.int64, copy=False)
        return {"ids": ids if self.end is None else np.append(ids, np.int64(self.end))}
