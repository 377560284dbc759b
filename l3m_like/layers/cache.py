"""Key/value cache for generation: buffers of a fixed shape, written in place under no_grad by places that lie on the device.

The first tokens (the prompt) see each other alone, as in training. Every later call sees the whole buffer behind a mask: its
shapes do not change from token to token and no number of the host is part of it, so that one compiled graph, or one recorded
CUDA graph, serves all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from l3m_like.core.errors import UserError


class LayerCache:
    """Keys and values of one layer: ``k`` [B, max_len, Hkv, K], ``v`` [B, max_len, Hkv, Kv], made at the first write (so that
    they have this rank's heads under tensor parallelism). ``places`` [S] int64: where the next tokens go; None: to the front."""

    def __init__(self, max_len: int, dtype: torch.dtype | None) -> None:
        self.max_len = max_len
        self.dtype = dtype
        self.places: Tensor | None = None
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    @property
    def first(self) -> bool:
        """Whether the next tokens are the first, which see themselves alone."""
        return self.places is None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``k``, ``v`` [B, S, Hkv, K]; returns what these tokens may look at: the first ones only themselves, later ones
        the whole buffers [B, max_len, Hkv, K] (what is not written yet is for the mask to hide)."""
        if torch.is_grad_enabled() and k.requires_grad:
            raise UserError("a key/value cache holds no gradient: generate under torch.no_grad().")
        places = self.places
        if self.k is None or self.v is None:
            # zeros: a masked key may hold anything but NaN
            self.k, self.v = (x.new_zeros(x.shape[0], self.max_len, *x.shape[2:], dtype=self.dtype or x.dtype) for x in (k, v))
        if places is None:
            self.k[:, : k.shape[1]] = k
            self.v[:, : v.shape[1]] = v
            return k, v
        self.k.index_copy_(1, places, k.to(self.k.dtype))
        self.v.index_copy_(1, places, v.to(self.v.dtype))
        return self.k.to(k.dtype), self.v.to(v.dtype)


class StaticCache:
    """The caches of a trunk's layers.

    Args:
        layers: one cache per layer (None for a layer that keeps nothing).
        batch, max_len: rows, and tokens per row.
        device: of the document ids.

    ``length`` is the number of tokens held, the same for every row, and ``place`` (int64 scalar) the same number on the device;
    rows of unequal length are padded on the left with document id -1 (and given their own positions). A row may hold several
    documents, each of which sees itself alone; the tokens that follow go on with the last one (windows are counted in places, and
    nothing may stand between a document's tokens). A recorded CUDA graph moves ``place`` alone: whoever replays it sees to it
    that the tokens fit.
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
        self.place: Tensor | None = None
        self.places: Tensor | None = None
        self.document_ids: Tensor | None = None

    def begin(self, tokens: Tensor) -> tuple[int | Tensor, int]:
        """Make room for ``tokens`` [B, S, ...], before the layers write: ``(place of the first, keys that will be looked at)``.

        Raises:
            UserError: another number of rows, or more tokens than fit.
        """
        batch, new = tokens.shape[:2]
        if batch != self.batch:
            raise UserError(f"the cache was made for {self.batch} rows, got {batch}.")
        if self.length + new > self.max_len:
            raise UserError(
                f"the cache holds {self.max_len} tokens, {self.length} are in it and {new} more do not fit: raise max_len."
            )
        self.places = None
        if self.length > 0:
            assert self.place is not None
            self.places = self.place + torch.arange(new, device=self.place.device)
        for layer in self.layers:
            if layer is not None:
                layer.places = self.places
        return (0, new) if self.places is None else (self.places[0], self.max_len)

    def end(self, tokens: Tensor) -> None:
        """``tokens`` [B, S, ...] are written: move on."""
        if self.place is None:
            self.place = torch.zeros((), dtype=torch.int64, device=tokens.device)
        self.place += tokens.shape[1]
        self.length += tokens.shape[1]

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        if not 0 <= length <= self.length:
            raise UserError(f"the cache holds {self.length} tokens; it cannot be cut to {length}.")
        self.length = length
        if self.place is not None:
            self.place.fill_(length)

    def write_documents(self, document_ids: Tensor | None) -> Tensor | None:
        """Note the documents [B, S] of the next tokens, after ``begin``; returns those of all keys that will be looked at."""
        if document_ids is None and self.document_ids is None:
            return None
        if document_ids is None or (self.document_ids is None and self.length > 0):
            raise UserError("document_ids must be given for all tokens of a cache or for none.")
        if self.document_ids is None:
            shape, device = (self.batch, self.max_len), self.device or document_ids.device
            self.document_ids = torch.full(shape, -1, dtype=document_ids.dtype, device=device)
        if self.places is None:
            self.document_ids[:, : document_ids.shape[1]] = document_ids
            return document_ids
        self.document_ids.index_copy_(1, self.places, document_ids)
        return self.document_ids
