"""RMSNorm over the last dimension, alone or with the addition to the residual stream before it.

``x`` [..., D], ``weight`` [D]. Statistics in at least float32; the normalised value is cast to the weight's dtype *before* the
multiplication with it (Zhang and Sennrich, 2019; rounding of Llama and Qwen). The Triton backward is one pass over the rows: it
adds the gradient of the residual stream, and each program keeps a partial sum of the weight's gradient.
"""

from __future__ import annotations

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from l3m_like.kernels.launch import (
    jit,
    load_row,
    resident_programs,
    rows_of,
    stages_that_fit,
    store_row,
    tile,
    tl,
    triton_op,
    use_triton,
    wrap_triton,
)


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
        return _rms_norm(x, weight, eps)[0] if residual is None else _add_rms_norm(x, residual, weight, eps)[:2]
    if residual is None:
        return rms_norm_reference(x, weight, eps)
    x = x + residual
    return rms_norm_reference(x, weight, eps), x


def rms_norm_and_residual(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """``(norm of x, x)``; the second is for the residual stream, whose gradient the norm's backward adds."""
    if use_triton("rms_norm", backend, x, weight, width=x.shape[-1]):
        return _NormAndResidual.apply(x, weight, eps)
    return rms_norm_reference(x, weight, eps), x


def adds_residual(x: Tensor, weight: Tensor, *, backend: str = "auto") -> bool:
    """Whether ``rms_norm`` adds a residual in its own pass over ``x``."""
    return use_triton("rms_norm", backend, x, weight, width=x.shape[-1])


# ---- Triton --------------------------------------------------------------------------------------------------------------


@jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    inverse_ptr,
    num_rows,
    x_stride,
    residual_stride,
    eps: tl.constexpr,  # a run-time float would arrive as float64 from compiled graphs
    D: tl.constexpr,
    ADD: tl.constexpr,
    HEAD: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = row < num_rows
    x0, x1 = load_row(x_ptr, row * x_stride, inside, D, HEAD, REST)
    if ADD:
        residual0, residual1 = load_row(residual_ptr, row * residual_stride, inside, D, HEAD, REST)
        # the norm is of what is stored
        x0 = (x0 + residual0).to(sum_ptr.dtype.element_ty).to(tl.float32)
        x1 = (x1 + residual1).to(sum_ptr.dtype.element_ty).to(tl.float32)
        store_row(sum_ptr, row * D, inside, x0, x1, D, HEAD, REST)
    weight0, weight1 = load_row(weight_ptr, 0, tl.full([1, 1], True, tl.int1), D, HEAD, REST)
    inverse = tl.rsqrt((tl.sum(x0 * x0, axis=1) + tl.sum(x1 * x1, axis=1))[:, None] / D + eps)
    tl.store(inverse_ptr + row, inverse, mask=inside)
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    out0 = (x0 * inverse).to(dtype).to(tl.float32) * weight0
    out1 = (x1 * inverse).to(dtype).to(tl.float32) * weight1
    store_row(out_ptr, row * D, inside, out0, out1, D, HEAD, REST)


@jit
def _backward_kernel(
    grad_ptr,
    grad_sum_ptr,
    x_ptr,
    weight_ptr,
    inverse_ptr,
    grad_x_ptr,
    partial_ptr,
    num_rows,
    rows_each,
    grad_stride,
    grad_sum_stride,
    x_stride,
    D: tl.constexpr,
    ADD: tl.constexpr,
    HEAD: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * rows_each
    always = tl.full([1, 1], True, tl.int1)
    weight0, weight1 = load_row(weight_ptr, 0, always, D, HEAD, REST)
    of_weight0, of_weight1 = tl.zeros([ROWS, HEAD], tl.float32), tl.zeros([ROWS, REST], tl.float32)
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    for done in tl.range(0, rows_each, ROWS, num_stages=STAGES):
        number = (done + tl.arange(0, ROWS))[:, None]
        row = first + number
        inside = (number < rows_each) & (row < num_rows)
        # all loads before the sum over a row, which makes the warps wait for each other
        x0, x1 = load_row(x_ptr, row * x_stride, inside, D, HEAD, REST)
        grad0, grad1 = load_row(grad_ptr, row * grad_stride, inside, D, HEAD, REST)
        if ADD:
            sum0, sum1 = load_row(grad_sum_ptr, row * grad_sum_stride, inside, D, HEAD, REST)
        inverse = tl.load(inverse_ptr + row, mask=inside, other=0.0)
        x0 *= inverse
        x1 *= inverse
        of_weight0 += grad0 * x0.to(dtype).to(tl.float32)
        of_weight1 += grad1 * x1.to(dtype).to(tl.float32)
        grad0 *= weight0
        grad1 *= weight1
        along = (tl.sum(grad0 * x0, axis=1) + tl.sum(grad1 * x1, axis=1))[:, None] / D
        grad0 = inverse * (grad0 - x0 * along)
        grad1 = inverse * (grad1 - x1 * along)
        if ADD:
            grad0 += sum0
            grad1 += sum1
        store_row(grad_x_ptr, row * D, inside, grad0, grad1, D, HEAD, REST)
    total0, total1 = tl.sum(of_weight0, axis=0)[None, :], tl.sum(of_weight1, axis=0)[None, :]
    store_row(partial_ptr, tl.program_id(0).to(tl.int64) * D, always, total0, total1, D, HEAD, REST)


@triton_op("l3m_like::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, and of each row [N] float32 the factor that made it."""
    x2, dim = rows_of(x), x.shape[-1]
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    inverse = torch.empty(x2.shape[0], dtype=torch.float32, device=x.device)
    sizes = tile(dim, "rms_norm")
    grid = (max(1, -(-x2.shape[0] // sizes["ROWS"])),)
    wrap_triton(_forward_kernel)[grid](
        x2, x2, weight, out, x2, inverse, x2.shape[0], x2.stride(0), x2.stride(0), eps, D=dim, ADD=False, **sizes
    )
    return out, inverse


@triton_op("l3m_like::add_rms_norm", mutates_args=())
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, the sum, and of each row [N] float32 the factor that made the norm."""
    x2, residual2, dim = rows_of(x), rows_of(residual), x.shape[-1]
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    inverse = torch.empty(x2.shape[0], dtype=torch.float32, device=x.device)
    sizes = tile(dim, "rms_norm")
    grid = (max(1, -(-x2.shape[0] // sizes["ROWS"])),)
    wrap_triton(_forward_kernel)[grid](
        x2, residual2, weight, out, total, inverse, x2.shape[0], x2.stride(0), residual2.stride(0), eps, D=dim, ADD=True, **sizes
    )
    return out, total, inverse


@triton_op("l3m_like::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x (in its dtype) and weight; ``grad_sum`` [..., D] is what comes from the residual stream."""
    x2, grad2, dim = rows_of(x), rows_of(grad), x.shape[-1]
    grad_sum2 = grad2 if grad_sum is None else rows_of(grad_sum)
    sizes = tile(dim, "rms_norm_backward")
    programs = min(resident_programs(x.device, "rms_norm_backward"), max(1, -(-x2.shape[0] // sizes["ROWS"])))
    moved = (2 if grad_sum is None else 3) * sizes["ROWS"] * (sizes["HEAD"] + sizes["REST"]) * x.element_size()
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(programs, dim, dtype=torch.float32, device=x.device)
    wrap_triton(_backward_kernel)[(programs,)](
        grad2,
        grad_sum2,
        x2,
        weight,
        inverse,
        grad_x,
        partial,
        x2.shape[0],
        -(-x2.shape[0] // programs),
        grad2.stride(0),
        grad_sum2.stride(0),
        x2.stride(0),
        D=dim,
        ADD=grad_sum is not None,
        STAGES=stages_that_fit("rms_norm_backward", moved, x.device),
        **sizes,
    )
    return grad_x, partial.sum(0).to(weight.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, None]:
    x, weight, inverse = ctx.saved_tensors
    return *_rms_norm_backward(grad, None, x, weight, inverse), None


class _NormAndResidual(torch.autograd.Function):
    """Around the operation, which cannot return its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, inverse = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_sum: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        return *_rms_norm_backward(grad, grad_sum, x, weight, inverse), None


def _setup_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, _ = inputs
    _, total, inverse = output
    ctx.mark_non_differentiable(inverse)
    ctx.dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(total, weight, inverse)


def _backward_add(ctx: Any, grad: Tensor, grad_sum: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None]:
    total, weight, inverse = ctx.saved_tensors
    grad_total, grad_weight = _rms_norm_backward(grad, grad_sum, total, weight, inverse)
    return grad_total.to(ctx.dtypes[0]), grad_total.to(ctx.dtypes[1]), grad_weight, None


_rms_norm.register_autograd(_backward, setup_context=_setup)
_add_rms_norm.register_autograd(_backward_add, setup_context=_setup_add)
