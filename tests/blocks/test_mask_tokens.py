"""Noise of masked diffusion: who is masked how often, by what draws, and what becomes a target."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from l3m_like.blocks import CleanCopy, MaskTokens, NoisyHalf
from l3m_like.core.errors import UserError
from l3m_like.losses import MaskedDiffusion, MaskedNLL

V, MASK = 12, 11


def block(**settings) -> MaskTokens:
    return MaskTokens(**({"mask_id": MASK, "vocab_size": V, "seed": 3, "stream": "text"} | settings))


def rows(count: int, *lengths: int, padding: int = 0) -> dict[str, Tensor]:
    """``count`` rows of documents with these lengths, as the loader writes them."""
    size = sum(lengths) + padding
    ids = torch.randint(0, MASK, (count, size), generator=torch.Generator().manual_seed(0))
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((padding,), -1)])
    positions = torch.cat([torch.arange(n) for n in lengths] + [torch.zeros(padding, dtype=torch.int64)])
    last = torch.tensor([i + 1 == size or documents[i + 1] != documents[i] for i in range(size)]) | (documents < 0)
    targets = torch.where(last, -100, ids.roll(-1, 1))
    both = {"document_ids": documents.int().expand(count, -1), "positions": positions.expand(count, -1)}
    return {"ids": ids, "targets": targets, "row": torch.arange(count), **both}


def test_what_is_written() -> None:
    data = rows(200, 30, 20, padding=6)
    noised, targets, weights = block().compute(**data)
    masked = targets != -100
    assert torch.equal(noised, torch.where(masked, MASK, data["ids"]))
    assert torch.equal(targets[masked], data["ids"][masked])
    assert not masked[:, 50:].any() and weights.dtype == torch.float32
    assert torch.equal(weights > 0, masked)
    for document in (slice(0, 30), slice(30, 50)):
        share, weight = masked[:, document].double().mean(1), weights[:, document].amax(1)
        some = share > 0
        # one probability per document: p = 0.001 + 0.999 t, and the share that it masks is near it
        assert torch.equal(torch.where(masked, weights, 0)[:, document].amax(1), weight)
        assert abs(float(share.mean()) - 0.5) < 0.08
        p = 1 / weight[some].double()
        assert float((share[some] - p).abs().mean()) < 0.08 and float(p.min()) > 1e-3
    assert not torch.equal(weights[:, 0:30].amax(1), weights[:, 30:50].amax(1))
    unlucky = block(never=[0, 7]).compute(**data)[1]
    assert not torch.isin(unlucky, torch.tensor([0, 7])).any() and torch.isin(unlucky, torch.tensor([1, 6])).any()


def test_draws_are_functions_of_seed_row_document_and_place() -> None:
    data = rows(8, 5, 11)
    for settings in ({}, {"strata": 4}, {"block": 4}, {"block": 4, "strata": 8}):
        whole = block(**settings).compute(**data)
        for start in (0, 3, 6):  # however a batch is split
            part = block(**settings).compute(**{key: value[start : start + 3] for key, value in data.items()})
            assert all(torch.equal(a[start : start + 3], b) for a, b in zip(whole, part, strict=True))
        assert not torch.equal(whole[0], block(seed=4, **settings).compute(**data)[0])
        assert not torch.equal(whole[0], block(stream="speech", **settings).compute(**data)[0])


def times(settings: dict, data: dict[str, Tensor]) -> Tensor:
    made = block(**settings)
    return made._times("mask_tokens/text", data["row"], data["document_ids"], data["positions"])


def test_strata_spread_the_times_of_a_step_evenly() -> None:
    data = rows(64, 3, 3)
    first, second = times({"strata": 16}, data)[:, 0], times({"strata": 16}, data)[:, 3]
    for document in (first, second):
        for step in range(4):
            ordered = document[16 * step : 16 * step + 16].sort().values
            assert torch.allclose(ordered.diff(), torch.full((15,), 1 / 16, dtype=torch.float64))
    assert not torch.allclose(first[:16], first[16:32])  # another start in every step
    many = times({"strata": 4}, rows(4000, 2, 2))
    for document in (many[:, 0], many[:, 2]):  # each by itself is uniform
        assert abs(float(document.mean()) - 0.5) < 0.03 and abs(float(document.var()) - 1 / 12) < 0.01
    blocks = times({"block": 2, "strata": 4}, rows(4, 5))
    assert torch.equal(blocks[:, 0], blocks[:, 1]) and torch.equal(blocks[:, 2], blocks[:, 3])
    assert len({round(t, 9) for t in blocks[0].tolist()}) == 3


STEPS, BATCH, LENGTH = 400, 8, 32


@pytest.mark.parametrize("settings", [{}, {"strata": BATCH}, {"p_min": 0.3, "p_max": 0.8}, {"block": 4}], ids=str)
def test_the_unigram_distribution_has_its_cross_entropy(settings: dict) -> None:
    """Of a model that predicts unigram frequencies, whatever it is shown, the loss is the mean NLL of the text."""
    data = rows(STEPS * BATCH, LENGTH)
    unigram = torch.arange(1, V + 1, dtype=torch.float64).log_softmax(0)
    nll = -unigram[data["ids"]]
    count = MaskedDiffusion().count(data["document_ids"], data["positions"], data["targets"])
    assert count == STEPS * BATCH * LENGTH
    _, targets, weights = block(**settings).compute(**data)
    weighted = torch.where(targets == -100, 0, nll) * weights
    loss = MaskedDiffusion().compute(weighted) / count
    deviation = float((weighted.mean(1) - nll.mean(1)).std()) / math.sqrt(STEPS * BATCH)
    assert deviation < 0.01 * float(nll.mean()) and abs(float(loss - nll.mean())) < 3 * deviation
    metric, masked = MaskedNLL().compute(weighted, weights)
    assert masked == (targets != -100).sum()
    assert abs(float(metric / masked - nll[targets != -100].mean())) < 1e-6


def test_strata_lower_the_noise_of_a_model_that_uses_what_it_is_shown() -> None:
    """Its NLL grows with the share of masks, here from 0 to 3; the loss of a step then varies with the step's times."""
    data = rows(STEPS * BATCH, LENGTH)
    spread = {}
    for name, settings in {"independent": {}, "strata": {"strata": BATCH}}.items():
        _, targets, weights = block(**settings).compute(**data)
        probability = 0.001 + 0.999 * times(settings, data)
        loss = (torch.where(targets == -100, 0, 3 * probability) * weights).view(STEPS, -1).mean(1)
        spread[name] = float(loss.std())
        assert abs(float(loss.mean()) - 1.5) < 4 * spread[name] / math.sqrt(STEPS)
    assert 0.25 < spread["independent"] < 0.4 and spread["strata"] < 0.5 * spread["independent"], spread  # 0.31 and 0.13


def test_answers_only() -> None:
    data = rows(300, 10, 10)
    trained = torch.zeros(300, 20, dtype=torch.bool)
    trained[:, 5:10] = trained[:, 13:17] = True
    data["targets"] = torch.where(trained.roll(-1, 1), data["targets"], -100)
    assert (data["targets"] != -100).sum() == 300 * 9
    targets = block(answers_only=True).compute(**data)[1]
    masked = targets != -100
    assert not masked[:, ~trained[0]].any() and masked[:, trained[0]].any(0).all()
    keys = [data[key] for key in ("document_ids", "positions", "targets")]
    assert MaskedDiffusion(answers_only=True).count(*keys) == 300 * 9
    assert MaskedDiffusion().count(*keys) == 300 * 20
    only = torch.arange(20) < 10
    assert MaskedDiffusion(answers_only=True).count(*keys, only.expand(300, -1)) == 300 * 5


def test_shift() -> None:
    """As a causal model: the output at i is for the token at i + 1, and nothing predicts the first of a document."""
    data = rows(300, 6, 4, padding=2)
    noised, targets, weights = block(shift=True).compute(**data)
    masked = noised == MASK
    assert not masked[:, [0, 6, 10, 11]].any() and masked[:, [1, 5, 7, 9]].any(0).all()
    assert torch.equal(targets[:, :-1] != -100, masked[:, 1:]) and (targets[:, -1] == -100).all()
    assert torch.equal(targets[:, :-1][masked[:, 1:]], data["ids"][:, 1:][masked[:, 1:]])
    assert torch.equal(weights > 0, targets != -100)
    there = targets != -100
    assert torch.equal(targets[there], data["targets"][there])  # what the causal loss would have there
    keys = [data[key] for key in ("document_ids", "positions", "targets")]
    assert MaskedDiffusion(shift=True).count(*keys) == 300 * 8 == (data["targets"] != -100).sum()


def test_clean_copy() -> None:
    data = rows(2, 5, 4, padding=1)
    noised = data["ids"] + 100
    ports = {"ids": data["ids"], "positions": data["positions"], "document_ids": data["document_ids"]}
    copy = CleanCopy(2, "paired", stream="text")
    both, positions, documents, stages = copy.compute(noised, **ports)
    assert torch.equal(both, torch.cat((noised, data["ids"]), 1)) and torch.equal(positions[:, :10], positions[:, 10:])
    assert documents[0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, -1] * 2
    assert stages[0, :9].tolist() == [0, 0, 2, 2, 4, 0, 0, 2, 2] and torch.equal(stages[:, 10:], stages[:, :10] + 1)
    assert copy.writes == {port: f"paired_{port}" for port in copy.outputs} and copy.training_only
    assert CleanCopy(2, "paired", writes={"stages": "mine"}).writes["stages"] == "mine"
    half = NoisyHalf().compute(both.unsqueeze(-1), noised)
    assert torch.equal(half.squeeze(-1), noised) and NoisyHalf().compute(both) is both


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mask_id": 12}, "ids are 0 .. 11.*vocab_size: 13"),
        ({"mask_id": -1}, "ids are 0 .. 11"),
        ({"p_min": 0.0}, "0 < p_min <= p_max <= 1"),
        ({"p_max": 1.5}, "0 < p_min <= p_max <= 1"),
        ({"strata": 0}, "strata is 0"),
        ({"block": 0}, "block is 0"),
    ],
)
def test_bad_settings(settings, words) -> None:
    with pytest.raises(UserError, match=words):
        block(**settings)


def test_bad_block() -> None:
    with pytest.raises(UserError, match="block is 0"):
        CleanCopy(0, "paired")
