"""Attention masks: a description, and its lowering to what a backend wants.

The *kind* is static layer config, the tensors are keys of the data. A trunk lowers the mask once per forward. Masks are bool,
True = may attend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from l3m_like.core.errors import UserError, did_you_mean

KINDS = ("full", "causal", "prefix")


@dataclass(frozen=True)
class AttentionMask:
    """Who may attend to whom.

    Args:
        kind: "full"; "causal" (keys up to the query's place); "prefix" (causal, and the first ``prefix_lengths`` places of
            a row see each other).
        document_ids: int [B, Sq], the document of every query; only keys of the same document are seen. Negative = padding:
            attends to nothing and is seen by nothing.
        kv_document_ids: int [B, Skv] (None: ``document_ids``).
        prefix_lengths: int [B], for kind "prefix".
        query_start: place of the first query in the row of keys (tokens already in a key/value cache).
    """

    kind: str = "full"
    document_ids: Tensor | None = None
    kv_document_ids: Tensor | None = None
    prefix_lengths: Tensor | None = None
    query_start: int = 0

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if (self.kind == "prefix") != (self.prefix_lengths is not None):
            raise UserError(
                f"mask '{self.kind}' with{'out' if self.prefix_lengths is None else ''} prefix_lengths: "
                "give prefix_lengths [B] for the kind 'prefix', and only for it."
            )


class LoweredMask(NamedTuple):
    """What an attention backend gets.

    ``allowed``: bool [B or 1, 1, Sq, Skv] or None (all); ``causal``: the backend's own causal rule; ``live``: bool
    [B, 1, Sq, 1], False for queries that attend to nothing (their output is set to zero), or None if there are none.
    """

    allowed: Tensor | None = None
    causal: bool = False
    live: Tensor | None = None


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise UserError(f"no attention mask '{kind}'. {did_you_mean(kind, KINDS)}")


def lower(mask: AttentionMask, backend: str, query_length: int, kv_length: int, device: torch.device) -> LoweredMask:
    """Lower ``mask`` for ``backend`` ("reference": always dense; "sdpa": its own causal rule where that is enough)."""
    if mask.document_ids is None and backend == "sdpa":
        if mask.kind == "full" or (mask.kind == "causal" and query_length == 1 and mask.query_start + 1 == kv_length):
            return LoweredMask()
        if mask.kind == "causal" and mask.query_start == 0 and query_length == kv_length:
            return LoweredMask(causal=True)
    return _dense(mask, query_length, kv_length, device)


def _dense(mask: AttentionMask, query_length: int, kv_length: int, device: torch.device) -> LoweredMask:
    query = torch.arange(mask.query_start, mask.query_start + query_length, device=device).view(1, 1, -1, 1)
    key = torch.arange(kv_length, device=device).view(1, 1, 1, -1)
    allowed = torch.ones(1, 1, query_length, kv_length, dtype=torch.bool, device=device)
    if mask.kind != "full":
        allowed = key <= query
    if mask.prefix_lengths is not None:
        length = mask.prefix_lengths.view(-1, 1, 1, 1)
        allowed = allowed | ((query < length) & (key < length))
    if mask.document_ids is None:
        return LoweredMask(allowed)
    query_document = mask.document_ids[:, None, :, None]
    kv_ids = mask.document_ids if mask.kv_document_ids is None else mask.kv_document_ids
    allowed = allowed & (query_document == kv_ids[:, None, None, :]) & (query_document >= 0)
    # softmax over nothing is NaN: a query without a key sees every key, and its output is set to zero afterwards
    live = allowed.any(-1, keepdim=True)
    return LoweredMask(allowed | ~live, live=live)


def attended_pairs(mask: AttentionMask, batch: int, query_length: int, kv_length: int) -> int:
    """Pairs (query, key) that attention needs, for FLOP counts: by real document lengths if ``document_ids`` is a real CPU
    tensor, else as if each row were one document (causal: half of the square)."""
    ids = mask.document_ids
    if ids is None or ids.device.type != "cpu" or mask.kv_document_ids is not None:
        square = batch * query_length * kv_length
        if mask.kind == "full":
            return square
        # every query sees the places before its own block in full, and half of its own block
        return batch * query_length * (kv_length - query_length) + batch * query_length * query_length // 2
    lengths = document_lengths(ids)
    if mask.kind == "full":
        return int((lengths * lengths).sum())
    return int((lengths * (lengths + 1) // 2).sum())


def document_lengths(document_ids: Tensor) -> Tensor:
    """Lengths of all documents (runs of one id >= 0 within a row) of [B, S], in order. CPU only: its shape is data."""
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    lengths = torch.bincount(starts.flatten().cumsum(0) - 1)
    return lengths[document_ids[starts] >= 0]
