"""LayerNorm with adaLN modulation (Peebles and Xie, arXiv:2212.09748), alone or with the gated residual before it.

``x`` and ``branch`` [B, S, D]; ``shift``, ``scale`` and ``gate`` [B, 1, D], one per row of the batch. LayerNorm has no weights
of its own. Here the gradients of shift, scale and gate are sums over the tokens of a row, which the Triton backward takes in the
same pass that computes the gradients of the tokens: a program has one tile of tokens of one row and writes its partial sums.
The forward keeps each token's mean and inverse deviation for it. The Triton kernels compute in float32 and round once.

Two more passes over memory are saved. Where x goes on as the residual stream, the backward adds the gradient that comes back from
there. And ``bias`` [D], of the linear map that gives ``branch``, is added here, so that its gradient is one more of the sums.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from l3m_like.kernels.launch import (
    TUNED,
    jit,
    load_row,
    resident_programs,
    stages_that_fit,
    store_row,
    sum_row,
    tile,
    tl,
    triton_op,
    use_triton,
    wrap_triton,
)


def modulated_norm_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The definition."""
    return F.layer_norm(x, (x.shape[-1],), eps=eps) * (1 + scale) + shift


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """``LayerNorm(x) * (1 + scale) + shift`` [B, S, D]."""
    if _use_triton(backend, x, shift, scale):
        return _modulated_norm(x, shift, scale, eps)[0]
    return modulated_norm_reference(x, shift, scale, eps)


def modulated_norm_and_residual(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``(modulated norm of x, x)``, each [B, S, D]; the second is for the residual stream."""
    if _use_triton(backend, x, shift, scale):
        return _NormAndResidual.apply(x, shift, scale, eps)
    return modulated_norm_reference(x, shift, scale, eps), x


def gated_modulated_norm(
    x: Tensor,
    gate: Tensor,
    branch: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``(modulated norm of x + gate * (branch + bias), x + gate * (branch + bias))``, each [B, S, D]."""
    if _use_triton(backend, x, gate, shift, scale) and branch.shape == x.shape:
        return _gated_modulated_norm(x, gate, branch, bias, shift, scale, eps)[:2]
    x = gated_residual_reference(x, gate, branch, bias)
    return modulated_norm_reference(x, shift, scale, eps), x


def gated_residual_reference(x: Tensor, gate: Tensor, branch: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition."""
    return x + gate * (branch if bias is None else branch + bias)


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """``x + gate * (branch + bias)`` [B, S, D]."""
    if _use_triton(backend, x, gate) and branch.shape == x.shape:
        return _gated_residual(x, gate, branch, bias)
    return gated_residual_reference(x, gate, branch, bias)


def adds_bias(x: Tensor, gate: Tensor, *, backend: str = "auto") -> bool:
    """Whether the gated forms add a bias in the pass that they make anyway; else it is better left to the linear map."""
    return _use_triton(backend, x, gate)


def _use_triton(backend: str, x: Tensor, *modulation: Tensor) -> bool:
    """Modulation of any other shape than one vector per row of the batch is left to torch."""
    fits = x.dim() == 3 and all(m.shape == (x.shape[0], 1, x.shape[2]) for m in modulation)
    return fits and use_triton("modulated_norm", backend, x, *modulation, width=x.shape[-1])


# ---- Triton --------------------------------------------------------------------------------------------------------------


@jit
def _over_rows(x):  # type: ignore[no-untyped-def]
    return tl.sum(x, axis=0)[None, :]


@jit
def _forward_kernel(
    x_ptr,
    branch_ptr,
    bias_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    out_ptr,
    sum_ptr,
    statistics_ptr,
    length,
    tiles,
    tokens_each,
    gate_stride,
    shift_stride,
    scale_stride,
    eps: tl.constexpr,  # a run-time float would arrive as float64 from compiled graphs
    D: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    NORM: tl.constexpr,
    HEAD: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    first = (program % tiles) * tokens_each
    always = tl.full([1, 1], True, tl.int1)
    if GATED:
        gate0, gate1 = load_row(gate_ptr, row * gate_stride, always, D, HEAD, REST)
    if BIASED:
        bias0, bias1 = load_row(bias_ptr, 0, always, D, HEAD, REST)
    if NORM:
        shift0, shift1 = load_row(shift_ptr, row * shift_stride, always, D, HEAD, REST)
        scale0, scale1 = load_row(scale_ptr, row * scale_stride, always, D, HEAD, REST)
        is_rest = HEAD + tl.arange(0, REST)[None, :] < D
    for done in tl.range(0, tokens_each, ROWS, num_stages=STAGES):
        number = (done + tl.arange(0, ROWS))[:, None]
        inside = (number < tokens_each) & (first + number < length)
        token = row * length + first + number
        x0, x1 = load_row(x_ptr, token * D, inside, D, HEAD, REST)
        if GATED:
            branch0, branch1 = load_row(branch_ptr, token * D, inside, D, HEAD, REST)
            if BIASED:
                branch0 += bias0
                branch1 += bias1
            dtype: tl.constexpr = sum_ptr.dtype.element_ty
            # the norm is of what is stored
            x0 = (x0 + gate0 * branch0).to(dtype).to(tl.float32)
            x1 = (x1 + gate1 * branch1).to(dtype).to(tl.float32)
            store_row(sum_ptr, token * D, inside, x0, x1, D, HEAD, REST)
        if NORM:
            mean = (tl.sum(x0, axis=1) + tl.sum(x1, axis=1))[:, None] / D
            x0 -= mean
            x1 = tl.where(is_rest, x1 - mean, 0.0)
            inverse = tl.rsqrt((tl.sum(x0 * x0, axis=1) + tl.sum(x1 * x1, axis=1))[:, None] / D + eps)
            out0 = x0 * inverse * (1.0 + scale0) + shift0
            out1 = x1 * inverse * (1.0 + scale1) + shift1
            store_row(out_ptr, token * D, inside, out0, out1, D, HEAD, REST)
            tl.store(statistics_ptr + 2 * token, mean, mask=inside)
            tl.store(statistics_ptr + 2 * token + 1, inverse, mask=inside)


@jit
def _backward_kernel(
    grad_ptr,
    grad_sum_ptr,
    x_ptr,
    branch_ptr,
    bias_ptr,
    gate_ptr,
    scale_ptr,
    statistics_ptr,
    grad_x_ptr,
    grad_branch_ptr,
    partial_ptr,
    length,
    tiles,
    tokens_each,
    gate_stride,
    scale_stride,
    D: tl.constexpr,
    RESIDUAL: tl.constexpr,  # a gradient of the residual stream comes in
    GATED: tl.constexpr,  # after a gated sum, which has that gradient
    BIASED: tl.constexpr,
    NORM: tl.constexpr,
    HEAD: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    HELD: tl.constexpr,  # gate and scale stay in registers; else they are read again for every token
):
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    first = (program % tiles) * tokens_each
    always = tl.full([1, 1], True, tl.int1)
    if GATED:
        if HELD:
            gate0, gate1 = load_row(gate_ptr, row * gate_stride, always, D, HEAD, REST)
        of_gate0, of_gate1 = tl.zeros([ROWS, HEAD], tl.float32), tl.zeros([ROWS, REST], tl.float32)
    if BIASED:
        total0, total1 = tl.zeros([ROWS, HEAD], tl.float32), tl.zeros([ROWS, REST], tl.float32)
    if NORM:
        if HELD:
            scale0, scale1 = load_row(scale_ptr, row * scale_stride, always, D, HEAD, REST)
        of_shift0, of_shift1 = tl.zeros([ROWS, HEAD], tl.float32), tl.zeros([ROWS, REST], tl.float32)
        of_scale0, of_scale1 = tl.zeros([ROWS, HEAD], tl.float32), tl.zeros([ROWS, REST], tl.float32)
    for done in tl.range(0, tokens_each, ROWS, num_stages=STAGES):
        number = (done + tl.arange(0, ROWS))[:, None]
        inside = (number < tokens_each) & (first + number < length)
        token = row * length + first + number
        # all loads before the sums over a token, which make the warps wait for each other
        if GATED:
            branch0, branch1 = load_row(branch_ptr, token * D, inside, D, HEAD, REST)
        if RESIDUAL:
            grad_x0, grad_x1 = load_row(grad_sum_ptr, token * D, inside, D, HEAD, REST)
        if NORM:
            x0, x1 = load_row(x_ptr, token * D, inside, D, HEAD, REST)
            grad0, grad1 = load_row(grad_ptr, token * D, inside, D, HEAD, REST)
            mean = tl.load(statistics_ptr + 2 * token, mask=inside, other=0.0)
            inverse = tl.load(statistics_ptr + 2 * token + 1, mask=inside, other=0.0)
            if not HELD:
                scale0, scale1 = load_row(scale_ptr, row * scale_stride, always, D, HEAD, REST)
            x0 = (x0 - mean) * inverse
            x1 = (x1 - mean) * inverse
            of_shift0 += grad0
            of_shift1 += grad1
            of_scale0 += grad0 * x0
            of_scale1 += grad1 * x1
            grad0 *= 1.0 + scale0
            grad1 *= 1.0 + scale1
            sum0, along0 = sum_row(grad0, grad0 * x0)
            sum1, along1 = sum_row(grad1, grad1 * x1)
            mean = (sum0 + sum1) / D
            along = (along0 + along1) / D
            if RESIDUAL:
                grad_x0 += inverse * (grad0 - mean - x0 * along)
                grad_x1 += inverse * (grad1 - mean - x1 * along)
            else:
                grad_x0 = inverse * (grad0 - mean - x0 * along)
                grad_x1 = inverse * (grad1 - mean - x1 * along)
            store_row(grad_x_ptr, token * D, inside, grad_x0, grad_x1, D, HEAD, REST)
        if GATED:
            if not HELD:
                gate0, gate1 = load_row(gate_ptr, row * gate_stride, always, D, HEAD, REST)
            of_gate0 += grad_x0 * branch0
            of_gate1 += grad_x1 * branch1
            if BIASED:
                total0 += grad_x0
                total1 += grad_x1
            store_row(grad_branch_ptr, token * D, inside, grad_x0 * gate0, grad_x1 * gate1, D, HEAD, REST)
    partial = program * (4 * D)  # [B, tiles, (shift, scale, gate, bias), D]
    if NORM:
        store_row(partial_ptr, partial, always, _over_rows(of_shift0), _over_rows(of_shift1), D, HEAD, REST)
        store_row(partial_ptr, partial + D, always, _over_rows(of_scale0), _over_rows(of_scale1), D, HEAD, REST)
    if GATED:
        of_gate0, of_gate1 = _over_rows(of_gate0), _over_rows(of_gate1)
        if BIASED:
            # the bias and the gate are those of every token: neither takes part in the sums
            if not HELD:
                gate0, gate1 = load_row(gate_ptr, row * gate_stride, always, D, HEAD, REST)
            bias0, bias1 = load_row(bias_ptr, 0, always, D, HEAD, REST)
            total0, total1 = _over_rows(total0), _over_rows(total1)
            of_gate0 += total0 * bias0
            of_gate1 += total1 * bias1
            store_row(partial_ptr, partial + 3 * D, always, total0 * gate0, total1 * gate1, D, HEAD, REST)
        store_row(partial_ptr, partial + 2 * D, always, of_gate0, of_gate1, D, HEAD, REST)


def _forward_cut(x: Tensor, read: int) -> tuple[int, int, dict[str, int]]:
    """``(tiles of a row, tokens of a tile, launch arguments)``: small tiles, as no sums over tokens are kept. ``read``: how many
    tensors like ``x``."""
    length, dim = x.shape[1:]
    sizes, tuned = tile(dim, "modulated_norm"), TUNED["modulated_norm"]
    tokens = sizes["ROWS"] * tuned.iterations
    stages = stages_that_fit("modulated_norm", _bytes(x, sizes, read), x.device)
    return max(1, -(-length // tokens)), tokens, {"STAGES": stages, **sizes}


def _backward_cut(x: Tensor, read: int, kernel: str = "modulated_norm_backward") -> tuple[int, int, dict[str, int]]:
    """The same: about as many tiles in all as ``kernel`` has programs."""
    batch, length, dim = x.shape
    tiles = max(1, min(length, resident_programs(x.device, kernel) // max(1, batch)))
    tokens, sizes = max(1, -(-length // tiles)), tile(dim, kernel)
    stages = stages_that_fit(kernel, _bytes(x, sizes, read), x.device)
    return max(1, -(-length // tokens)), tokens, {"STAGES": stages, **sizes}


def _bytes(x: Tensor, sizes: dict[str, int], read: int) -> int:
    return read * sizes["ROWS"] * (sizes["HEAD"] + sizes["REST"]) * x.element_size()


def _empty(x: Tensor, *others: Tensor) -> Tensor:
    """Like ``x``, in the dtype that arithmetic with ``others`` gives."""
    dtype = x.dtype
    for other in others:
        dtype = torch.promote_types(dtype, other.dtype)
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _or_any(bias: Tensor | None, other: Tensor) -> Tensor:
    """``bias`` with neighbouring entries adjacent in memory, or, for a kernel that reads none, any tensor."""
    return other if bias is None else bias.contiguous()


def _vectors(x: Tensor) -> Tensor:
    """[B, 1, D], possibly cut out of a wider tensor, with neighbouring columns adjacent in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton_op("l3m_like::modulated_norm", mutates_args=())
def _modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, and each token's mean and inverse deviation [B, S, 2] float32."""
    x, shift, scale = x.contiguous(), _vectors(shift), _vectors(scale)
    batch, length, dim = x.shape
    out = _empty(x, shift, scale)
    statistics = torch.empty(batch, length, 2, dtype=torch.float32, device=x.device)
    tiles, tokens, sizes = _forward_cut(x, 1)
    wrap_triton(_forward_kernel)[(batch * tiles,)](
        x, x, x, shift, shift, scale, out, x, statistics, length, tiles, tokens,
        0, shift.stride(0), scale.stride(0), eps, D=dim, GATED=False, BIASED=False, NORM=True, **sizes,
    )  # fmt: skip
    return out, statistics


@triton_op("l3m_like::gated_modulated_norm", mutates_args=())
def _gated_modulated_norm(
    x: Tensor, gate: Tensor, branch: Tensor, bias: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, the sum, and each token's mean and inverse deviation [B, S, 2] float32."""
    x, branch = x.contiguous(), branch.contiguous()
    gate, shift, scale = _vectors(gate), _vectors(shift), _vectors(scale)
    batch, length, dim = x.shape
    total = _empty(x, gate, branch)
    out = _empty(total, shift, scale)
    statistics = torch.empty(batch, length, 2, dtype=torch.float32, device=x.device)
    tiles, tokens, sizes = _forward_cut(x, 2)
    wrap_triton(_forward_kernel)[(batch * tiles,)](
        x, branch, _or_any(bias, x), gate, shift, scale, out, total, statistics, length, tiles, tokens,
        gate.stride(0), shift.stride(0), scale.stride(0), eps,
        D=dim, GATED=True, BIASED=bias is not None, NORM=True, **sizes,
    )  # fmt: skip
    return out, total, statistics


@triton_op("l3m_like::gated_residual", mutates_args=())
def _gated_residual(x: Tensor, gate: Tensor, branch: Tensor, bias: Tensor | None) -> Tensor:
    x, branch, gate = x.contiguous(), branch.contiguous(), _vectors(gate)
    batch, length, dim = x.shape
    total = _empty(x, gate, branch)
    tiles, tokens, sizes = _forward_cut(x, 2)
    wrap_triton(_forward_kernel)[(batch * tiles,)](
        x, branch, _or_any(bias, x), gate, gate, gate, x, total, x, length, tiles, tokens,
        gate.stride(0), 0, 0, 0.0,
        D=dim, GATED=True, BIASED=bias is not None, NORM=False, **sizes,
    )  # fmt: skip
    return total


@triton_op("l3m_like::modulated_norm_backward", mutates_args=())
def _modulated_norm_backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, scale: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x, with ``grad_sum`` [B, S, D] from the residual stream added, and [B, 2, D] float32: of shift and scale."""
    x, grad, scale = x.contiguous(), grad.contiguous(), _vectors(scale)
    residual = grad if grad_sum is None else grad_sum.contiguous()
    batch, length, dim = x.shape
    tiles, tokens, sizes = _backward_cut(x, 3)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(batch, tiles, 4, dim, dtype=torch.float32, device=x.device)
    wrap_triton(_backward_kernel)[(batch * tiles,)](
        grad, residual, x, x, x, scale, scale, statistics, grad_x, x, partial, length, tiles, tokens, 0, scale.stride(0),
        D=dim, RESIDUAL=grad_sum is not None, GATED=False, BIASED=False, NORM=True, HELD=True, **sizes,
    )  # fmt: skip
    return grad_x, partial[:, :, :2].sum(1)


@triton_op("l3m_like::gated_modulated_norm_backward", mutates_args=())
def _gated_modulated_norm_backward(
    grad: Tensor,
    grad_sum: Tensor,
    total: Tensor,
    gate: Tensor,
    branch: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum ``total`` and of branch, and [B, 3 or 4, D] float32: of shift, scale, gate and, row by row, bias."""
    total, branch, grad, grad_sum = total.contiguous(), branch.contiguous(), grad.contiguous(), grad_sum.contiguous()
    gate, scale = _vectors(gate), _vectors(scale)
    batch, length, dim = total.shape
    tiles, tokens, sizes = _backward_cut(total, 6, "gated_modulated_norm_backward")
    grad_total = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    grad_branch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    partial = torch.empty(batch, tiles, 4, dim, dtype=torch.float32, device=total.device)
    wrap_triton(_backward_kernel)[(batch * tiles,)](
        grad, grad_sum, total, branch, _or_any(bias, total), gate, scale, statistics, grad_total, grad_branch, partial,
        length, tiles, tokens, gate.stride(0), scale.stride(0),
        # the sums of both leave no registers for gate and scale
        D=dim, RESIDUAL=True, GATED=True, BIASED=bias is not None, NORM=True, HELD=False, **sizes,
    )  # fmt: skip
    return grad_total, grad_branch, partial[:, :, : 3 if bias is None else 4].sum(1)


@triton_op("l3m_like::gated_residual_backward", mutates_args=())
def _gated_residual_backward(grad: Tensor, gate: Tensor, branch: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of branch and, [B, 1 or 2, D] float32, of gate and, row by row, bias; that of x is ``grad`` itself."""
    grad, branch, gate = grad.contiguous(), branch.contiguous(), _vectors(gate)
    batch, length, dim = branch.shape
    tiles, tokens, sizes = _backward_cut(branch, 2)
    grad_branch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    partial = torch.empty(batch, tiles, 4, dim, dtype=torch.float32, device=branch.device)
    wrap_triton(_backward_kernel)[(batch * tiles,)](
        grad, grad, grad, branch, _or_any(bias, branch), gate, gate, grad, grad, grad_branch, partial,
        length, tiles, tokens, gate.stride(0), 0,
        D=dim, RESIDUAL=True, GATED=True, BIASED=bias is not None, NORM=False, HELD=True, **sizes,
    )  # fmt: skip
    return grad_branch, partial[:, :, 2 : 3 if bias is None else 4].sum(1)


# ---- gradients -----------------------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, shift, scale, _ = inputs
    statistics = output[1]
    ctx.mark_non_differentiable(statistics)
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(x, scale, statistics)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, grad, None)


def _gradients(ctx: Any, grad: Tensor, grad_sum: Tensor | None) -> tuple[Tensor | None, ...]:
    x, scale, statistics = ctx.saved_tensors
    grad_x, sums = _modulated_norm_backward(grad, grad_sum, x, scale, statistics)
    return grad_x, sums[:, 0:1].to(ctx.shift_dtype), sums[:, 1:2].to(scale.dtype), None


class _NormAndResidual(torch.autograd.Function):
    """Around the operation, which cannot return its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, statistics = _modulated_norm(x, shift, scale, eps)
        ctx.shift_dtype = shift.dtype
        ctx.save_for_backward(x, scale, statistics)
        return out, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad, grad_sum)


def _setup_gated(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, gate, branch, bias, shift, scale, _ = inputs
    _, total, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.x_dtype, ctx.shift_dtype = x.dtype, shift.dtype
    ctx.save_for_backward(total, gate, branch, bias, scale, statistics)


def _backward_gated(ctx: Any, grad: Tensor, grad_sum: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    total, gate, branch, bias, scale, statistics = ctx.saved_tensors
    grad_x, grad_branch, sums = _gated_modulated_norm_backward(grad, grad_sum, total, gate, branch, bias, scale, statistics)
    return (
        grad_x.to(ctx.x_dtype),
        sums[:, 2:3].to(gate.dtype),
        grad_branch,
        None if bias is None else sums[:, 3].sum(0).to(bias.dtype),
        sums[:, 0:1].to(ctx.shift_dtype),
        sums[:, 1:2].to(scale.dtype),
        None,
    )


def _setup_residual(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gate, branch, bias = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(gate, branch, bias)


def _backward_residual(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gate, branch, bias = ctx.saved_tensors
    grad_branch, sums = _gated_residual_backward(grad, gate, branch, bias)
    of_bias = None if bias is None else sums[:, 1].sum(0).to(bias.dtype)
    return grad.to(ctx.x_dtype), sums[:, 0:1].to(gate.dtype), grad_branch, of_bias


_modulated_norm.register_autograd(_backward, setup_context=_setup)
_gated_modulated_norm.register_autograd(_backward_gated, setup_context=_setup_gated)
_gated_residual.register_autograd(_backward_residual, setup_context=_setup_residual)
