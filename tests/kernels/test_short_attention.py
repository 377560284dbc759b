"""The CUDA kernel of short rows, on the CPU: ``cuda_on_cpu.cpp`` runs its blocks. (On a GPU: tests/gpu/test_attention.py.)"""

from __future__ import annotations

import ctypes
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from l3m_like.kernels import short_attention
from l3m_like.kernels.attention import attention
from l3m_like.kernels.short_attention import LONGEST, THREADS, WARPS, _gradients_like, macros, products, shared_bytes, source

HERE = Path(__file__).parent
HEADS = 5  # for one block: the buffers of keys come round a second time


def gradients(
    folder: Path, qkv: Tensor, grad: Tensor, blocks: int, changed: Sequence[tuple[str, str]] = (), *, summed: bool = True
) -> tuple[Tensor, Tensor]:
    """Of qkv [B, S, 3, H, K], by the kernel with some of its text changed; and those of q and v summed over S, [2, B, H, K]."""
    batch, length, _, heads, width = qkv.shape
    text = source(width, qkv.dtype)
    for before, after in changed:
        assert before in text
        text = text.replace(before, after)
    (folder / "kernel.cu").write_text(text)
    dense, cut = heads * width, 3 * heads * width
    options = macros(length == LONGEST, width, qkv.dtype, (cut, cut, cut, dense, cut))
    built = folder / "kernel.so"
    command = ["g++", "-O1", "-std=c++17", "-fPIC", "-shared", "-w", "-fno-strict-aliasing", *options]
    command += [f"-DSHARED={shared_bytes(width)}", f'-DSOURCE="{folder / "kernel.cu"}"']
    command += [str(HERE / "cuda_on_cpu.cpp"), "-o", str(built)]
    subprocess.run(command, check=True)

    q, k, v = (x.transpose(1, 2).double() for x in qkv.unbind(2))
    scores = q @ k.mT / math.sqrt(width)
    out = (scores.softmax(-1) @ v).transpose(1, 2).to(qkv.dtype).contiguous()
    sums = scores.logsumexp(-1).float().contiguous()
    found = torch.full_like(qkv, math.nan)
    partial = torch.full((batch, WARPS, heads, 2, width) if summed else (0,), math.nan)
    tensors = [*qkv.unbind(2), out, grad, sums, *found.unbind(2), partial]
    ctypes.CDLL(str(built)).run(blocks, *(ctypes.c_void_p(x.data_ptr()) for x in tensors), batch * heads, heads, length)
    return found, partial.sum(1).movedim(-2, 0) if summed else partial


def exact(qkv: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    leaf = qkv.detach().to(dtype).requires_grad_()
    return torch.autograd.grad(attention(*leaf.unbind(2)), leaf, grad.to(dtype))[0]


def inputs(length: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    qkv = 1.5 * torch.randn(1, length, 3, HEADS, width, generator=generator)
    return qkv.to(dtype), torch.randn(1, length, HEADS, width, generator=generator).to(dtype)


def errors(found: Tensor, wanted: Tensor) -> list[float]:
    """Of the gradients of q, k and v."""
    return [error(a, b) for a, b in zip(found.unbind(2), wanted.unbind(2), strict=True)]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("length", "width", "dtype", "blocks"),
    [
        (100, 72, torch.bfloat16, 1),
        pytest.param(256, 72, torch.bfloat16, 2, marks=pytest.mark.slow),
        pytest.param(256, 64, torch.float16, 1, marks=pytest.mark.slow),
        pytest.param(65, 64, torch.float16, 2, marks=pytest.mark.slow),
        pytest.param(193, 72, torch.bfloat16, 2, marks=pytest.mark.slow),
        pytest.param(129, 64, torch.bfloat16, 1, marks=pytest.mark.slow),  # an odd number of pairs of steps
    ],
    ids=str,
)
def test_gradients(length: int, width: int, dtype: torch.dtype, blocks: int, tmp_path: Path) -> None:
    """Their errors are at most twice those of torch's attention in the same dtype."""
    qkv, grad = inputs(length, width, dtype)
    wanted = exact(qkv, grad, torch.float64)
    torchs = exact(qkv, grad, dtype)
    theirs = errors(torchs, wanted)
    found, partial = gradients(tmp_path, qkv, grad, blocks)
    ours = errors(found, wanted)
    assert all(a <= 2 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
    # their sums over the places: of q and v; that of k is 0 but for rounding
    for part, total in zip((0, 2), partial, strict=True):
        ours_of_sum = error(total, wanted[:, :, part].sum(1))
        assert ours_of_sum <= 2 * error(torchs[:, :, part].double().sum(1), wanted[:, :, part].sum(1)), (part, ours_of_sum)
    assert wanted[:, :, 1].sum(1).abs().max() <= 1e-12 * wanted[:, :, 1].abs().sum(1).max()
    if length < LONGEST:  # nobody asks for the sums
        torch.testing.assert_close(gradients(tmp_path, qkv, grad, blocks, summed=False)[0], found, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        ("lane / 4; };", "lane / 4 + (m == 1); };"),  # a key's place
        ("c, SCALE);", "c, 1.0f);"),  # the queries' scale
        ("copies_wait<1>();", ""),  # a step is used before it is there
        ("pass_gate(keys_empty", "if (0) pass_gate(keys_empty"),  # keys are written over before the last has read them
    ],
    ids=["place", "scale", "wait", "keys"],
)
def test_a_fault_is_seen(change: tuple[str, str], tmp_path: Path) -> None:
    qkv, grad = inputs(100, 72, torch.bfloat16)
    found, _ = gradients(tmp_path, qkv, grad, 1, [change])
    assert not all(error < 0.02 for error in errors(found, exact(qkv, grad, torch.float64)))


def test_sizes() -> None:
    assert shared_bytes(72) <= 227 * 1024  # of a block on Hopper
    assert f"#define WARPS {WARPS}\n" in source(72, torch.bfloat16) and THREADS == 32 * WARPS + 128
    assert "m64n72k16.f32.bf16.bf16" in products(72, "bf16") and products(64, "f16").count("DEVICE") == 3
    joint = torch.empty(2, 80, 3, 4, 64, device="meta")
    assert _gradients_like(joint.select(2, 0)).shape == joint.shape
    assert not short_attention.short_attention_takes(256, 72, torch.device("cpu"))
