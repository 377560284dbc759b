"""Newton-Schulz against its definition and a transcription of the published code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from l3m_like.kernels import newton_schulz as module
from l3m_like.kernels.newton_schulz import method_for, newton_schulz, newton_schulz_flops, newton_schulz_reference

SHAPES = [(1, 24, 24), (2, 16, 40), (3, 40, 16), (1, 1, 7), (2, 30, 31)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def published(g: Tensor, steps: int) -> Tensor:
    """zeropower_via_newtonschulz5 of KellerJordan/Muon, in the dtype of g."""
    a, b, c = (3.4445, -4.7750, 2.0315)
    x = g
    if g.size(-2) > g.size(-1):
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        big_a = x @ x.mT
        big_b = b * big_a + c * big_a @ big_a
        x = a * x + big_b @ x
    return x.mT if g.size(-2) > g.size(-1) else x


def spectra(rows: int, cols: int) -> dict[str, Tensor]:
    u, v = torch.linalg.qr(randn(rows, rows))[0], torch.linalg.qr(randn(cols, rows, seed=1))[0]
    decay = torch.logspace(0, -4, rows, dtype=torch.float64)
    noise = 0.1 * randn(rows, cols, seed=2)
    return {
        "gaussian": randn(rows, cols),
        "condition 1e4": (u * decay) @ v.mT,
        "rank 16 and noise": 3 * randn(rows, 16) @ randn(16, cols, seed=1) + noise,
        "rank 1 and noise": 30 * randn(rows, 1) @ randn(1, cols, seed=1) + noise,
        "rank 1": randn(rows, 1) @ randn(1, cols, seed=1),
        "one large row": torch.cat((1000 * randn(1, cols), randn(rows - 1, cols, seed=1))),
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", ["plain", "symmetric", "gram"])
@pytest.mark.parametrize("steps", [1, 3, 5, 7])
def test_equals_the_definition(shape: tuple[int, ...], method: str, steps: int) -> None:
    x = randn(*shape)
    expected = published(x, steps)
    torch.testing.assert_close(newton_schulz_reference(x, steps=steps), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(newton_schulz(x, steps=steps, method=method), expected, rtol=1e-11, atol=1e-11)


def test_singular_values_go_to_one() -> None:
    out = newton_schulz(randn(1, 32, 96))
    values = torch.linalg.svdvals(out)
    assert float(values.min()) > 0.6 and float(values.max()) < 1.21


@pytest.mark.parametrize("method", ["symmetric", "gram"])
@pytest.mark.parametrize("name", spectra(20, 40))
def test_float16_is_closer_than_published_in_bfloat16(name: str, method: str) -> None:
    x = spectra(96, 192)[name].bfloat16().unsqueeze(0)
    exact = published(x.double(), 5)
    ours = newton_schulz(x, method=method)
    assert ours.dtype == torch.bfloat16
    error = (ours.double() - exact).norm() / exact.norm()
    theirs = (published(x, 5).double() - exact).norm() / exact.norm()
    assert error < theirs / 2, f"{error} against {theirs}"
    values, wanted = torch.linalg.svdvals(ours.double()), torch.linalg.svdvals(exact)
    assert float((values - wanted).abs().max()) < 0.01


@pytest.mark.parametrize("span", [5, 4])
def test_a_gram_matrix_kept_too_long_is_unstable(monkeypatch: pytest.MonkeyPatch, span: int) -> None:
    """Why it is formed anew after three steps: the twin without."""
    x = spectra(96, 192)["condition 1e4"].unsqueeze(0)
    exact = published(x, 5)

    def error() -> float:
        return float((newton_schulz(x.half(), method="gram").double() - exact).norm() / exact.norm())

    good = error()
    monkeypatch.setattr(module, "_SPAN", span)
    assert error() > 1.5 * good


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 8, 24), (2, 16, 16)], ids=str)
def test_zeros_and_small_numbers(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.stack([torch.zeros(shape[1:]), 1e-3 * randn(*shape[1:])]).to(dtype)
    out = newton_schulz(x)
    assert not out[0].any() and out.isfinite().all()
    torch.testing.assert_close(out[1], newton_schulz(1024 * x)[1], rtol=0.02, atol=0.002)


def test_flops() -> None:
    """By counting the products of the definition; the others by hand."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        newton_schulz_reference(torch.empty(1, 16, 48, device="meta"))
    assert newton_schulz_flops(48, 16, method="plain") == counter.get_total_flops() == newton_schulz_flops(16, 48, method="plain")
    assert newton_schulz_flops(16, 48, method="symmetric") == 5 * (3 * 48 + 16) * 16**2
    assert newton_schulz_flops(16, 48, method="gram") == (2 * 3 * 48 + 14 * 16) * 16**2
    assert method_for(16, 48, torch.float32) == "plain" and method_for(16, 31, torch.bfloat16) == "symmetric"
    assert method_for(48, 16, torch.bfloat16) == "gram"


def test_flops_of_qwen3() -> None:
    """The table of docs/optimizers.md."""
    matrices = [(2048, 2048), (2048, 2048), (1024, 2048), (1024, 2048), (6144, 2048), (6144, 2048), (2048, 6144)]

    def tera(method: str | None) -> float:
        return sum(
            newton_schulz_flops(*shape, method=method or method_for(*shape, torch.bfloat16)) * 28 / 1e12 for shape in matrices
        )

    assert [round(tera(method), 1) for method in ("plain", "symmetric", None)] == [67.9, 47.8, 34.3]
