"""Muon on an NVIDIA GPU: the Triton kernel, half precision against float64, and a step that does not wait for the device."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from l3m_like.config.schema import Muon as MuonConfig
from l3m_like.kernels.newton_schulz import newton_schulz, newton_schulz_reference
from tests.gpu.test_gpu import config, rows_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
    pytest.mark.timeout(300),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "depth"), [(2048, 6144), (1024, 1024), (300, 1000), (129, 77), (16, 16)])
def test_symmetric_products(rows: int, depth: int, dtype: torch.dtype) -> None:
    from l3m_like.kernels.symmetric_matmul import symmetric_matmul, symmetric_matmul_reference

    torch.manual_seed(0)
    x = (torch.randn(2, rows, depth, device="cuda") / depth**0.5).to(dtype)
    add = symmetric_matmul(x, x)
    for settings in ({}, {"alpha": 0.5, "add": add, "beta": -2.0, "diagonal": 3.0}):
        ours = symmetric_matmul(x, x, **settings)
        wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in settings.items()}
        exact = symmetric_matmul_reference(x.double(), x.double(), **wide)
        assert float((ours.double() - exact).abs().max()) <= torch.finfo(dtype).eps * float(exact.abs().max())
        outside = (torch.arange(rows)[:, None] // 128 != torch.arange(rows) // 128).cuda()
        assert torch.equal(ours[:, outside], ours.mT[:, outside])


@pytest.mark.parametrize("rows", [2048, 300, 129])
def test_symmetric_products_of_a_tall_matrix(rows: int) -> None:
    """A transposed view."""
    from l3m_like.kernels.symmetric_matmul import symmetric_matmul

    x = (torch.randn(2, 1000, rows, device="cuda") / 32).half()
    exact = x.double().mT @ x.double()
    assert float((symmetric_matmul(x.mT, x.mT).double() - exact).abs().max()) <= 1e-3 * float(exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("shape", [(5, 1024, 2048), (3, 36, 50)], ids=str)
def test_passes_over_memory(shape: tuple[int, ...], split: int, dtype: torch.dtype) -> None:
    from l3m_like.kernels.muon import apply_pass, apply_pass_reference, momentum_pass, momentum_pass_reference

    torch.manual_seed(0)
    good, scale = torch.zeros((), device="cuda"), torch.full((), 1.7, device="cuda")
    grads = [None, *(torch.randn(shape[1:], device="cuda", dtype=dtype) for _ in range(shape[0] - 1))]
    momentum, weight = (torch.randn(shape, device="cuda") for _ in range(2))
    found = []
    for move, put in ((momentum_pass, apply_pass), (momentum_pass_reference, apply_pass_reference)):
        m, weights, copies = momentum.clone(), [w.clone() for w in weight], [w.bfloat16() for w in weight]
        settings = {"mu": 0.95, "nesterov": True, "dtype": torch.bfloat16, "split": split, "grad_scale": scale, "found_inf": good}
        update, norm = move(grads, m, **settings)
        put(weights, update.view(shape), rate=0.1, decay=0.01, found_inf=good, copies=copies)
        assert all(torch.equal(copy, w.bfloat16()) for w, copy in zip(weights, copies, strict=True))
        found.append((m, update.float(), norm, torch.stack(weights)))
    for ours, wanted, bound in zip(*found, (1e-5, 1e-2, 1e-3, 2e-3), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=bound, atol=bound)


@pytest.mark.parametrize("shape", [(3, 1024, 1024), (2, 1024, 2048), (2, 2048, 512), (5, 96, 200)], ids=str)
def test_half_precision_is_close_to_float64(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    rows, cols = shape[1:]
    low_rank = torch.randn(shape[0], rows, 16, device="cuda") @ torch.randn(shape[0], 16, cols, device="cuda")
    for x in (torch.randn(shape, device="cuda"), 3 * low_rank + 0.1 * torch.randn(shape, device="cuda")):
        x = x.bfloat16()
        exact = newton_schulz_reference(x.double())
        error = (newton_schulz(x).double() - exact).norm() / exact.norm()
        published = (newton_schulz_reference(x).double() - exact).norm() / exact.norm()
        assert error < 0.05 and error < published / 2


def test_a_step_does_not_wait_for_the_device() -> None:
    from l3m_like.distributed.mesh import build_mesh
    from l3m_like.training.optim import Muon, parameter_groups

    torch.manual_seed(0)
    shapes = {"a": (256, 256), "b": (256, 256), "c": (512, 128), "d": (96, 384)}
    parameters = {name: nn.Parameter(torch.randn(shape, device="cuda")) for name, shape in shapes.items()}
    groups = parameter_groups(parameters, lr=0.02, weight_decay=0.1)
    optimizer = Muon(groups, {"a": 4}, MuonConfig(per_head=True), build_mesh({}), torch.bfloat16)

    def state() -> list[Tensor]:
        return [value.detach().clone() for value in (*parameters.values(), *optimizer.named_state().values())]

    for number, bad in enumerate((0.0, 1.0, 0.0)):
        before = state()
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter) * (math.nan if bad else 1.0)
        found_inf, scale = torch.full((), bad, device="cuda"), torch.full((), 2.0, device="cuda")
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first one compiles
        try:
            optimizer.step(found_inf, scale)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) == bool(bad) for a, b in zip(before, state(), strict=True))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_it_trains(precision: str, tmp_path: Path) -> None:
    rows = rows_of(config("llm", tmp_path, "optim.name=muon", "steps=30", "log.every=1", f"parallel.precision={precision}"))
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.75 * losses[0]
