"""GELU of a linear map's result (Hendrycks and Gimpel, arXiv:1606.08415), exact or by the hyperbolic tangent.

The bias of the linear map is added here, where it costs nothing: so the backward, which passes over the gradient of every
element, also sums that of the bias. Only the product and the bias are kept. The Triton kernels compute in float32 and round once;
there ``0.5 (1 + tanh(u))`` is ``sigmoid(2 u)``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from l3m_like.kernels.launch import (
    TUNED,
    jit,
    logistic,
    power_of_2,
    resident_programs,
    rows_of,
    tl,
    triton_op,
    use_triton,
    warps,
    wrap_triton,
)


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor, tanh: bool) -> Tensor:
    """The definition."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh" if tanh else "none")


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, tanh: bool, backend: str = "auto") -> Tensor:
    """``GELU(x weight^T + bias)`` [..., F] of x [..., D], weight [F, D] and bias [F]; ``tanh``: the approximation."""
    if use_triton("gelu", backend, x, weight, bias) and x.dtype == weight.dtype == bias.dtype:
        return _bias_gelu(F.linear(x, weight), bias, tanh)
    return linear_gelu_reference(x, weight, bias, tanh)


# ---- Triton --------------------------------------------------------------------------------------------------------------


@jit
def _gelu(x, TANH: tl.constexpr):  # type: ignore[no-untyped-def]
    """The share of x that is its GELU, and x times that share's derivative."""
    if TANH:
        square = x * x
        share = logistic(x * (2.302208198144325 + 0.1029432395800235 * square))  # 2 sqrt(2 / pi) log2(e), and 0.044715 of it
        of_x = x * share
        slope = (of_x - of_x * share) * (1.5957691216057308 + 0.21406444881780073 * square)
    else:
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return share, slope


@jit
def _forward_kernel(
    x_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    blocks,
    stride,
    F: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    rows = (program // blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = (rows < num_rows) & (columns < F)
    bias = tl.load(bias_ptr + columns, mask=columns < F, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + rows * stride + columns, mask=inside, other=0.0).to(tl.float32) + bias
    share, _ = _gelu(x, TANH)
    tl.store(out_ptr + rows * F + columns, (x * share).to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    grad_ptr,
    x_ptr,
    bias_ptr,
    grad_x_ptr,
    partial_ptr,
    num_rows,
    rows_each,
    blocks,
    grad_stride,
    stride,
    F: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    part = program // blocks
    bias = tl.load(bias_ptr + columns, mask=columns < F, other=0.0).to(tl.float32)
    of_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    for done in tl.range(0, rows_each, ROWS, num_stages=STAGES):
        number = (done + tl.arange(0, ROWS))[:, None]
        rows = part * rows_each + number
        inside = (rows < num_rows) & (columns < F)
        if ROWS > 1:
            inside = inside & (number < rows_each)
        grad = tl.load(grad_ptr + rows * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + rows * stride + columns, mask=inside, other=0.0).to(tl.float32) + bias
        share, slope = _gelu(x, TANH)
        grad *= share + slope
        of_bias += grad
        tl.store(grad_x_ptr + rows * F + columns, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + part * F + columns, tl.sum(of_bias, axis=0)[None, :], mask=columns < F)


def _sizes(width: int, kernel: str, size: int) -> dict[str, int]:
    """Tiles of ``size`` elements, of up to 512 columns."""
    block = min(512, power_of_2(width))
    rows = size // block
    return {"BLOCK": block, "ROWS": rows, "num_warps": warps(rows * block, kernel)}


@triton_op("l3m_like::bias_gelu", mutates_args=())
def _bias_gelu(x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
    """GELU of ``x + bias``."""
    rows, width = rows_of(x), x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sizes = _sizes(width, "gelu", 2048)
    blocks = -(-width // sizes["BLOCK"])
    if rows.shape[0] > 0:
        wrap_triton(_forward_kernel)[(blocks * -(-rows.shape[0] // sizes["ROWS"]),)](
            rows, bias, out, rows.shape[0], blocks, rows.stride(0), F=width, TANH=tanh, **sizes
        )
    return out


@triton_op("l3m_like::bias_gelu_backward", mutates_args=())
def _bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x and bias."""
    rows, grads, width = rows_of(x), rows_of(grad), x.shape[-1]
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows.shape[0] == 0:
        return grad_x, torch.zeros_like(bias)
    sizes = _sizes(width, "gelu_backward", 512)
    blocks = -(-width // sizes["BLOCK"])
    parts = min(max(1, resident_programs(x.device, "gelu_backward") // blocks), -(-rows.shape[0] // sizes["ROWS"]))
    partial = torch.empty(parts, width, dtype=torch.float32, device=x.device)
    wrap_triton(_backward_kernel)[(blocks * parts,)](
        grads, rows, bias, grad_x, partial, rows.shape[0], -(-rows.shape[0] // parts), blocks, grads.stride(0), rows.stride(0),
        F=width, TANH=tanh, STAGES=TUNED["gelu_backward"].stages, **sizes,
    )  # fmt: skip
    return grad_x, partial.sum(0).to(bias.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.tanh = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_bias_gelu_backward(grad, *ctx.saved_tensors, ctx.tanh), None


_bias_gelu.register_autograd(_backward, setup_context=_setup)
