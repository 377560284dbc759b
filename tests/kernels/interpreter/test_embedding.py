"""The kernel of a table's gradient against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against import check, randn
from torch import Tensor

from l3m_like.kernels import embedding as kernel
from l3m_like.kernels.embedding import embedding

#: rows that nobody looked up, once, often, the first and the last
IDS = {
    "runs": torch.tensor([0] * 3 + [1] * 9 + [2] + [4] * 4 + [7] * 2 + [10] * 6),
    "several": torch.tensor([[3, 1, 3, 10, 0], [3, 3, 7, 10, 3]]),
    "one row": torch.full((37,), 4),
    "every row": torch.arange(11).flip(0),
    "none": torch.empty(2, 0, dtype=torch.int64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("width", [8, 13])
@pytest.mark.parametrize("span", [256, 4])
@pytest.mark.parametrize("kind", [kind for kind in IDS if kind != "none"])
def test_equals_torch(kind: str, span: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of tokens in one span, and in pieces that begin and end within spans."""
    monkeypatch.setattr(kernel, "_COLUMNS", 8)  # two programs for a wide row
    monkeypatch.setattr(kernel, "_SPAN", span)
    check(lambda weight, backend: embedding(IDS[kind], weight, backend=backend), [randn(11, width)], dtype)


def test_sums_are_float32() -> None:
    """In half precision 2048 + 1 is 2048; a gradient of any strides."""
    grad = torch.full((3001, 2), 1.0, dtype=torch.float16)
    grad[0] = 2048.0
    found = kernel.embedding_gradient(grad.T.contiguous().T, torch.zeros(3001, dtype=torch.int64), 2)
    assert torch.equal(found, torch.tensor([[5048.0] * 2, [0.0] * 2], dtype=torch.float16))


def test_nothing_is_looked_up() -> None:
    weight = torch.ones(11, 4, requires_grad=True)
    out = embedding(IDS["none"], weight, backend="triton")
    assert out.shape == (2, 0, 4)
    out.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_without_a_gradient() -> None:
    weight = torch.ones(11, 4, requires_grad=True)
    with torch.no_grad():
        found: Tensor = embedding(IDS["several"], weight, backend="triton")
    assert torch.equal(found, F.embedding(IDS["several"], weight))
