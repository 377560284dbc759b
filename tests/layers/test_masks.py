"""Masks against their definition, pair by pair."""

from __future__ import annotations

import pytest
import torch

from l3m_like.core.errors import UserError
from l3m_like.kernels.attention import LoweredMask
from l3m_like.layers import AttentionMask, attended_pairs, lower

CPU = torch.device("cpu")
IDS = torch.tensor([[0, 0, 0, 1, 1, -1], [4, 4, 4, 4, 4, 9]], dtype=torch.int32)


def by_definition(mask: AttentionMask, batch: int, queries: int, keys: int) -> torch.Tensor:
    out = torch.zeros(batch, queries, keys, dtype=torch.bool)
    for b in range(batch):
        for q in range(queries):
            for k in range(keys):
                place = mask.query_start + q
                allowed = mask.kind == "full" or k <= place
                if mask.prefix_lengths is not None:
                    allowed |= max(place, k) < int(mask.prefix_lengths[b])
                if mask.window is not None:
                    allowed &= abs(place - k) < mask.window
                if mask.document_ids is not None:
                    kv = mask.document_ids if mask.kv_document_ids is None else mask.kv_document_ids
                    allowed &= bool(mask.document_ids[b, q] == kv[b, k]) and bool(mask.document_ids[b, q] >= 0)
                out[b, q, k] = allowed
    return out


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("ids", [None, IDS], ids=["rows", "documents"])
@pytest.mark.parametrize("window", [None, 2, 9])
@pytest.mark.parametrize("kind", ["full", "causal", "prefix"])
def test_lowering(kind: str, window: int | None, ids, backend: str) -> None:
    prefix = torch.tensor([2, 4]) if kind == "prefix" else None
    mask = AttentionMask(kind, ids, prefix_lengths=prefix, window=window)
    expected = by_definition(mask, 2, 6, 6)
    lowered = lower(mask, backend, 2, 6, 6, CPU)
    live = expected.any(-1)
    if lowered.causal:
        assert (
            backend == "sdpa"
            and lowered.allowed is None
            and torch.equal(expected, torch.ones(6, 6).tril().bool().expand(2, 6, 6))
        )
        return
    if lowered.allowed is None:
        assert expected.all()
        return
    seen = lowered.allowed[:, 0].expand(2, 6, 6)
    assert torch.equal(seen[live], expected[live])
    assert seen.any(-1).all()  # no row without a key reaches a backend
    assert lowered.live is None if ids is None else torch.equal(lowered.live[..., 0, 0], live)


def test_queries_behind_a_cache() -> None:
    for ids in (None, IDS):
        mask = AttentionMask("causal", None if ids is None else ids[:, 4:], ids, query_start=4)
        expected = by_definition(mask, 2, 2, 6)
        lowered = lower(mask, "sdpa", 2, 2, 6, CPU)
        live = expected.any(-1)
        assert torch.equal(lowered.allowed[:, 0].expand(2, 2, 6)[live], expected[live])
    assert lower(AttentionMask("causal", query_start=5), "sdpa", 2, 1, 6, CPU) == LoweredMask()


@pytest.mark.parametrize("kind", ["full", "causal", "prefix"])
@pytest.mark.parametrize("window", [None, 2])
def test_a_place_on_the_device_hides_what_is_not_written(kind: str, window: int | None) -> None:
    """Two queries behind three keys, in a buffer of six: as if the buffer ended with the last query."""
    prefix = torch.tensor([2, 6]) if kind == "prefix" else None
    for ids in (None, IDS):
        asked = None if ids is None else ids[:, 3:5]
        written = AttentionMask(kind, asked, None if ids is None else ids[:, :5], prefix, 3, window=window)
        expected = by_definition(written, 2, 2, 5)
        place = torch.tensor(3)
        lowered = lower(AttentionMask(kind, asked, ids, prefix, place, window=window), "sdpa", 2, 2, 6, CPU)
        seen, live = lowered.allowed[:, 0].expand(2, 2, 6), expected.any(-1)
        assert torch.equal(seen[..., :5][live], expected[live]) and not seen[..., 5][live].any()
        blocks = lower(AttentionMask(kind, asked, ids, prefix, place, window=window), "flex", 2, 2, 6, CPU).blocks
        at = torch.meshgrid(torch.arange(2), torch.arange(2), torch.arange(6), indexing="ij")
        pairs = blocks.mask_mod(at[0], 0, at[1], at[2]).expand(2, 2, 6)
        assert torch.equal(pairs[..., :5], expected) and not pairs[..., 5].any()


def test_attended_pairs() -> None:
    for kind in ("full", "causal"):
        for window in (None, 1, 2, 3, 6, 9):
            mask = AttentionMask(kind, IDS, window=window)
            assert attended_pairs(mask, 2, 6, 6) == by_definition(mask, 2, 6, 6).sum()
            if kind == "full" and window:
                mask = AttentionMask(kind, window=window)
                assert attended_pairs(mask, 2, 6, 6) == by_definition(mask, 2, 6, 6).sum()
        assert attended_pairs(AttentionMask(kind, IDS.to("meta")), 2, 6, 6) == (72 if kind == "full" else 36)
    assert attended_pairs(AttentionMask("causal", query_start=4), 2, 2, 6) == 2 * (2 * 4 + 2)


def test_errors() -> None:
    with pytest.raises(UserError, match="Did you mean 'causal'"):
        AttentionMask("casual")
    with pytest.raises(UserError, match="window is 0"):
        AttentionMask("causal", window=0)
    with pytest.raises(UserError, match="prefix_lengths"):
        AttentionMask("prefix")
    with pytest.raises(UserError, match="prefix_lengths"):
        AttentionMask("causal", prefix_lengths=torch.tensor([1]))
