"""Synthetic sources: functions of (seed, index), of the sizes that were asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from l3m_like.core.errors import UserError
from l3m_like.data import ClassLatent, Dataset, FitPack, LogNormal, OnePerRow, RandomLatents, RandomTokens, Stack, TokenIds


def test_documents_are_functions_of_seed_and_index() -> None:
    source = RandomTokens(100, LogNormal(70, 1.0, 4, 256))
    again, other = RandomTokens(100, LogNormal(70, 1.0, 4, 256)), RandomTokens(100, LogNormal(70, 1.0, 4, 256), seed=1)
    read = [source.read(index)["ids"] for index in range(3)]
    assert all(np.array_equal(again.read(index)["ids"], read[index]) for index in (2, 0, 1))
    assert not any(np.array_equal(other.read(index)["ids"], ids) for index, ids in enumerate(read))
    assert source.reference(2) == "random tokens#2" and len(source) == 1 << 24


def test_lengths_and_tokens_are_spread_as_asked() -> None:
    lengths = LogNormal(mean=700, sigma=1.0, shortest=1, longest=1 << 20)
    documents = [RandomTokens(50, lengths).read(index)["ids"] for index in range(2000)]
    sizes = np.array([len(ids) for ids in documents])
    assert sizes.mean() == pytest.approx(700, rel=0.1) and np.log(sizes).std() == pytest.approx(1.0, rel=0.1)
    counts = np.bincount(np.concatenate(documents), minlength=50)
    assert len(counts) == 50 and counts.min() > 0.9 * counts.mean()
    clipped = RandomTokens(50, LogNormal(700, 1.0, 500, 800))
    assert {500, 800} <= {len(clipped.read(index)["ids"]) for index in range(50)} <= set(range(500, 801))
    assert {len(RandomTokens(50, 64).read(index)["ids"]) for index in range(5)} == {64}


def test_they_fit_their_processors() -> None:
    source = RandomTokens(100, LogNormal(20, 1.0, 4, 64))
    for pack in (FitPack(64), OnePerRow(64)):
        assert Dataset(source, TokenIds(100), pack).check()["text_ids"].shape == (1, 64)
    batch = Dataset(RandomLatents(4, 8, 10), ClassLatent(8, 4), Stack()).check()
    assert batch["image"].shape == (1, 4, 8, 8) and 0 <= int(batch["image_label"]) < 10
    latents = [Dataset(RandomLatents(4, 8, 10), ClassLatent(8, 4), Stack()).item(index).data["image"] for index in range(40)]
    assert torch.from_numpy(np.stack(latents)).std().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("wrong", [lambda: RandomTokens(0, 8), lambda: LogNormal(0, 1, 1, 8), lambda: LogNormal(8, 1, 9, 8),
                                   lambda: RandomTokens(8, 0), lambda: RandomLatents(4, 0, 8)])  # fmt: skip
def test_impossible_sizes_are_refused(wrong) -> None:
    with pytest.raises(UserError, match="at least|above"):
        wrong()
