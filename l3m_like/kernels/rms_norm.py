"""RMSNorm over the last dimension, alone or with the addition to the residual stream before it.

``x`` [..., D], ``weight`` [D]. Statistics in at least float32; the normalised value is cast to the weight's dtype *before* the
multiplication with it (Zhang and Sennrich, 2019; rounding of Llama and Qwen). The Triton backward is one pass over the rows: it
computes the norm again, adds the gradient of the residual stream, and each program keeps a partial sum of the weight's gradient.
"""

from __future__ import annotations

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from l3m_like.kernels.launch import TUNED, jit, resident_programs, rows_of, tile, tl, triton_op, use_triton, wrap_triton


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition: [..., D] in the weight's dtype."""
    # one fused op; without a weight it has no multiplication to round
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, (x.shape[-1],), eps=eps).to(weight.dtype) * weight


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: None = None, *, backend: str = "auto") -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, backend: str = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """The norm of ``x`` in the weight's dtype; with a ``residual`` [..., D], ``(norm of x + residual, x + residual)``."""
    if use_triton("rms_norm", backend, x, weight, residual, width=x.shape[-1]):
        return _rms_norm(x, weight, eps) if residual is None else _add_rms_norm(x, residual, weight, eps)
    if residual is None:
        return rms_norm_reference(x, weight, eps)
    x = x + residual
    return rms_norm_reference(x, weight, eps), x


# ---- Triton --------------------------------------------------------------------------------------------------------------


@jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    num_rows,
    x_stride,
    residual_stride,
    eps: tl.constexpr,  # a run-time float would arrive as float64 from compiled graphs
    D: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < num_rows) & (columns < D)
    x = tl.load(x_ptr + rows * x_stride + columns, mask=inside, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + rows * residual_stride + columns, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + rows * D + columns, x, mask=inside)
    x = x.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0)
    normed = x * tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
    out = normed.to(weight.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + rows * D + columns, out.to(weight.dtype), mask=inside)


@jit
def _backward_kernel(
    grad_ptr,
    grad_sum_ptr,
    x_ptr,
    weight_ptr,
    grad_x_ptr,
    partial_ptr,
    num_rows,
    rows_each,
    grad_stride,
    grad_sum_stride,
    x_stride,
    eps: tl.constexpr,  # a run-time float would arrive as float64 from compiled graphs
    D: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * rows_each
    columns = tl.arange(0, BLOCK)[None, :]
    stored = tl.load(weight_ptr + columns, mask=columns < D, other=0.0)
    weight = stored.to(tl.float32)
    partial = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for done in tl.range(0, rows_each, ROWS, num_stages=STAGES):
        number = (done + tl.arange(0, ROWS))[:, None]
        rows = first + number
        inside = (number < rows_each) & (rows < num_rows) & (columns < D)
        # all loads before the sums over a row, which make the warps wait for each other
        x = tl.load(x_ptr + rows * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + rows * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            grad_sum = tl.load(grad_sum_ptr + rows * grad_sum_stride + columns, mask=inside, other=0.0)
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        normed = x * scale
        partial += grad * normed.to(stored.dtype).to(tl.float32)
        grad = grad * weight
        grad_x = scale * (grad - normed * (tl.sum(grad * normed, axis=1) / D)[:, None])
        if ADD:
            grad_x += grad_sum.to(tl.float32)
        tl.store(grad_x_ptr + rows * D + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    total = tl.sum(partial, axis=0)[None, :]
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * D + columns, total, mask=columns < D)


@triton_op("l3m_like::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x2, dim = rows_of(x), x.shape[-1]
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    sizes = tile(dim, "rms_norm")
    grid = (max(1, -(-x2.shape[0] // sizes["ROWS"])),)
    wrap_triton(_forward_kernel)[grid](
        x2, x2, weight, out, x2, x2.shape[0], x2.stride(0), x2.stride(0), eps, D=dim, ADD=False, **sizes
    )
    return out


@triton_op("l3m_like::add_rms_norm", mutates_args=())
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x2, residual2, dim = rows_of(x), rows_of(residual), x.shape[-1]
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    sizes = tile(dim, "rms_norm")
    grid = (max(1, -(-x2.shape[0] // sizes["ROWS"])),)
    wrap_triton(_forward_kernel)[grid](
        x2, residual2, weight, out, total, x2.shape[0], x2.stride(0), residual2.stride(0), eps, D=dim, ADD=True, **sizes
    )
    return out, total


@triton_op("l3m_like::rms_norm_backward", mutates_args=())
def _rms_norm_backward(grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x (in its dtype) and weight; ``grad_sum`` [..., D] is what comes from the residual stream."""
    x2, grad2, dim = rows_of(x), rows_of(grad), x.shape[-1]
    grad_sum2 = grad2 if grad_sum is None else rows_of(grad_sum)
    sizes = tile(dim, "rms_norm_backward")
    programs = min(resident_programs(x.device, "rms_norm_backward"), max(1, -(-x2.shape[0] // sizes["ROWS"])))
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(programs, dim, dtype=torch.float32, device=x.device)
    wrap_triton(_backward_kernel)[(programs,)](
        grad2,
        grad_sum2,
        x2,
        weight,
        grad_x,
        partial,
        x2.shape[0],
        -(-x2.shape[0] // programs),
        grad2.stride(0),
        grad_sum2.stride(0),
        x2.stride(0),
        eps,
        D=dim,
        ADD=grad_sum is not None,
        STAGES=TUNED["rms_norm_backward"].stages,
        **sizes,
    )
    return grad_x, partial.sum(0).to(weight.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight = ctx.saved_tensors
    return *_rms_norm_backward(grad, None, x, weight, ctx.eps), None


def _setup_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, ctx.eps = inputs
    ctx.dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(output[1], weight)


def _backward_add(ctx: Any, grad: Tensor, grad_sum: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    total, weight = ctx.saved_tensors
    grad_total, grad_weight = _rms_norm_backward(grad, grad_sum, total, weight, ctx.eps)
    return grad_total.to(ctx.dtypes[0]), grad_total.to(ctx.dtypes[1]), grad_weight, None


_rms_norm.register_autograd(_backward, setup_context=_setup)
_add_rms_norm.register_autograd(_backward_add, setup_context=_setup_add)
