"""Philox against published vectors; draws are functions of (seed, purpose, row, element) and of nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from l3m_like.core.random import key_of, normal, normal_at, philox, uniform, uniform_at

# kat_vectors of the Random123 distribution (Salmon et al., SC 2011), philox4x32, 10 rounds
KNOWN = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: str) -> None:
    words = philox(key, tuple(torch.tensor(word) for word in counter))
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def test_known_answers_in_a_batch() -> None:
    counters = tuple(torch.tensor([c[i] for c, key, _ in KNOWN]) for i in range(4))
    for number, (_, key, expected) in enumerate(KNOWN):
        words = philox(key, counters)
        assert " ".join(f"{int(word[number]):08x}" for word in words) == expected


def test_uniforms_are_uniform() -> None:
    x = uniform(torch.arange(64), (1000,), seed=3, purpose="test", dtype=torch.float64).flatten()
    n = x.numel()
    assert 0 < x.min() < 1e-4 and 1 - 1e-4 < x.max() < 1
    assert abs(float(x.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / n)
    counts = torch.histc(x, bins=100, min=0, max=1)
    chi2 = float(((counts - n / 100).square() / (n / 100)).sum())
    assert 56 < chi2 < 149  # 99 degrees of freedom: 99.9% on either side
    # neighbours along elements and along rows are not correlated
    for a, b in ((x[:-1], x[1:]), (x[:-1000], x[1000:])):
        assert abs(float(torch.corrcoef(torch.stack((a, b)))[0, 1])) < 4 / math.sqrt(n)


def test_normals_are_normal() -> None:
    x = normal(torch.arange(64), (1000,), seed=3, purpose="test", dtype=torch.float64).flatten()
    n = x.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(x.pow(power).mean()) - moment) < 4 * math.sqrt(variance / n)
    for bound, share in ((1.0, 0.682689), (2.0, 0.954500), (3.0, 0.997300)):
        assert abs(float((x.abs() < bound).double().mean()) - share) < 4 * math.sqrt(share * (1 - share) / n)
    assert 3.5 < float(x.abs().max()) < 6


@pytest.mark.parametrize("draw", [uniform, normal])
def test_a_row_does_not_see_its_batch(draw) -> None:
    rows = torch.tensor([5, 0, 2**40 + 7, 123456789])

    def drawn(rows: Tensor) -> Tensor:
        return draw(rows, (3, 4), seed=11, purpose="noise")

    together = drawn(rows)
    assert together.shape == (4, 3, 4) and together.dtype == torch.float32
    for index in range(4):
        assert torch.equal(drawn(rows[index : index + 1])[0], together[index])
    assert torch.equal(drawn(rows.flip(0)), together.flip(0))
    # the first elements do not depend on how many there are
    assert torch.equal(draw(rows, (5, 4), seed=11, purpose="noise")[:, :3], together)
    assert torch.equal(draw(rows, (12,), seed=11, purpose="noise"), together.flatten(1))


def test_what_a_draw_depends_on() -> None:
    rows = torch.arange(4)
    reference = uniform(rows, (8,), seed=1, purpose="a")
    assert torch.equal(uniform(rows, (8,), seed=1, purpose="a"), reference)
    others = [
        *(uniform(rows, (8,), seed=2, purpose="a"), uniform(rows, (8,), seed=1, purpose="b")),
        *(uniform(rows + 4, (8,), seed=1, purpose="a"), uniform(rows + 2**32, (8,), seed=1, purpose="a")),
    ]
    for other in others:
        assert not bool((other == reference).any())
    assert key_of(1, "a") != key_of(11, "") and key_of(1, "1/a") != key_of(11, "/a")
    torch.manual_seed(0)
    assert torch.equal(uniform(rows, (8,), seed=1, purpose="a"), reference)


def test_streams_and_elements_are_64_bit() -> None:
    big = torch.tensor([2**33 + 1, 1, 2**33, 0])
    for sample in (uniform_at, normal_at):
        for stream, element in ((big, torch.zeros(1, dtype=torch.int64)), (torch.zeros(1, dtype=torch.int64), big)):
            values = sample(0, "x", stream, element)
            assert values.dtype == torch.float64 and len(set(values.tolist())) == 4


def test_draws_work_on_meta() -> None:
    rows = torch.arange(4, device="meta")
    assert uniform(rows, (2, 2), seed=0, purpose="x").shape == normal(rows, (2, 2), seed=0, purpose="x").shape == (4, 2, 2)
