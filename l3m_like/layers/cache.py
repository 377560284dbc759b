"""Key/value cache for generation. Written in place under no_grad; the one mutable value of the data_dict."""

from __future__ import annotations

import torch
from torch import Tensor

from l3m_like.core.errors import UserError


class LayerCache:
    """Keys and values of one attention layer: ``k``, ``v`` [B, max_len, Hkv, K], made at the first write (so that they have
    this rank's heads under tensor parallelism)."""

    def __init__(self, max_len: int, dtype: torch.dtype | None) -> None:
        self.max_len = max_len
        self.dtype = dtype
        self.length = 0
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``k``, ``v`` [B, S, Hkv, K] behind what is there; returns all of it, [B, length, Hkv, K]."""
        if torch.is_grad_enabled() and k.requires_grad:
            raise UserError("a key/value cache holds no gradient: generate under torch.no_grad().")
        start, end = self.length, self.length + k.shape[1]
        if self.k is None or self.v is None:
            rows, dtype = (k.shape[0], self.max_len), self.dtype or k.dtype
            self.k = torch.zeros(*rows, *k.shape[2:], dtype=dtype, device=k.device)
            self.v = torch.zeros(*rows, *v.shape[2:], dtype=dtype, device=v.device)
        with torch.no_grad():
            self.k[:, start:end] = k
            self.v[:, start:end] = v
        self.length = end
        return self.k[:, :end].to(k.dtype), self.v[:, :end].to(v.dtype)


class StaticCache:
    """The caches of a trunk's layers.

    Args:
        layers: one cache per layer (None for a layer that keeps nothing).
        batch, max_len: rows, and tokens per row.
        device: of the document ids.

    ``length`` is the number of tokens held, the same for every row; rows of unequal length are padded on the left with
    document id -1 (and given their own positions).
    """

    def __init__(
        self, layers: list[LayerCache | None], batch: int, max_len: int, device: torch.device | str | None = None
    ) -> None:
        if batch < 1 or max_len < 1:
            raise UserError(f"a cache needs batch and max_len of at least 1, got {batch} and {max_len}.")
        self.layers = layers
        self.batch = batch
        self.max_len = max_len
        self.device = device
        self.length = 0
        self.document_ids: Tensor | None = None

    def reserve(self, batch: int, new: int) -> None:
        """Check that ``new`` more tokens of ``batch`` rows fit; call before the layers write."""
        if batch != self.batch:
            raise UserError(f"the cache was made for {self.batch} rows, got {batch}.")
        if self.length + new > self.max_len:
            raise UserError(
                f"the cache holds {self.max_len} tokens, {self.length} are in it and {new} more do not fit: raise max_len."
            )

    def write_documents(self, document_ids: Tensor | None, new: int) -> Tensor | None:
        """Note the documents [B, new] of the next tokens; returns those of all tokens, [B, length + new]."""
        if document_ids is None and self.document_ids is None:
            return None
        if document_ids is None or (self.document_ids is None and self.length > 0):
            raise UserError("document_ids must be given for all tokens of a cache or for none.")
        if self.document_ids is None:
            self.document_ids = torch.full((self.batch, self.max_len), -1, dtype=document_ids.dtype, device=self.device)
        end = self.length + new
        with torch.no_grad():
            self.document_ids[:, self.length : end] = document_ids
        return self.document_ids[:, :end]
