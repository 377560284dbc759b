"""Draws in one kernel are those of core/random.py."""

from __future__ import annotations

import torch

from l3m_like.core.philox import drawn
from l3m_like.core.random import key_of, normal_at, uniform_at


def test_the_same_numbers() -> None:
    stream = torch.tensor([0, 1, 7, 2**31, 2**40, 2**62 + 3]).view(-1, 1)
    element = torch.cat([torch.arange(500), torch.tensor([2**32 - 1, 2**32, 2**50 + 11])])
    keys = torch.tensor(key_of(3, "test"))
    assert torch.equal(drawn(keys, stream, element, normal=False), uniform_at(3, "test", stream, element))
    normals = normal_at(3, "test", stream, element)
    assert float((drawn(keys, stream, element, normal=True) - normals).abs().max()) < 1e-14


def test_nothing() -> None:
    assert drawn(torch.tensor([1, 2]), torch.zeros(0, 1).long(), torch.arange(3), normal=True).shape == (0, 3)
