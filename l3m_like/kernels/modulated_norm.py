"""LayerNorm with adaLN modulation (Peebles and Xie, arXiv:2212.09748), alone or with the gated residual before it.

``x`` and ``branch`` [B, S, D]; ``shift``, ``scale`` and ``gate`` [B, 1, D], one per row of the batch. LayerNorm has no weights
of its own. Here the gradients of shift, scale and gate are sums over the tokens of a row, which the Triton backward takes in the
same pass that computes the gradients of the tokens: a program has one tile of tokens of one row and writes its partial sums.
The Triton kernels compute in float32 and round once, at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from l3m_like.kernels.launch import TUNED, jit, resident_programs, tile, tl, triton_op, use_triton, wrap_triton


def modulated_norm_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The definition."""
    return F.layer_norm(x, (x.shape[-1],), eps=eps) * (1 + scale) + shift


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """``LayerNorm(x) * (1 + scale) + shift`` [B, S, D]."""
    if _use_triton(backend, x, shift, scale):
        return _modulated_norm(x, shift, scale, eps)
    return modulated_norm_reference(x, shift, scale, eps)


def gated_modulated_norm(
    x: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, eps: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``(modulated norm of x + gate * branch, x + gate * branch)``, each [B, S, D]."""
    if _use_triton(backend, x, gate, shift, scale) and branch.shape == x.shape:
        return _gated_modulated_norm(x, gate, branch, shift, scale, eps)
    x = x + gate * branch
    return modulated_norm_reference(x, shift, scale, eps), x


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor, *, backend: str = "auto") -> Tensor:
    """``x + gate * branch`` [B, S, D]."""
    if _use_triton(backend, x, gate) and branch.shape == x.shape:
        return _gated_residual(x, gate, branch)
    return x + gate * branch


def _use_triton(backend: str, x: Tensor, *modulation: Tensor) -> bool:
    """Modulation of any other shape than one vector per row of the batch is left to torch."""
    fits = x.dim() == 3 and all(m.shape == (x.shape[0], 1, x.shape[2]) for m in modulation)
    return fits and use_triton("modulated_norm", backend, x, *modulation, width=x.shape[-1])


# ---- Triton --------------------------------------------------------------------------------------------------------------


@jit
def _forward_kernel(
    x_ptr,
    branch_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    out_ptr,
    sum_ptr,
    length,
    tiles,
    tokens_each,
    gate_stride,
    shift_stride,
    scale_stride,
    eps: tl.constexpr,  # a run-time float would arrive as float64 from compiled graphs
    D: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    first = (program % tiles) * tokens_each
    columns = tl.arange(0, BLOCK)[None, :]
    is_column = columns < D
    if GATED:
        gate = tl.load(gate_ptr + row * gate_stride + columns, mask=is_column, other=0.0).to(tl.float32)
    if NORM:
        shift = tl.load(shift_ptr + row * shift_stride + columns, mask=is_column, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row * scale_stride + columns, mask=is_column, other=0.0).to(tl.float32)
    for done in range(0, tokens_each, ROWS):
        number = (done + tl.arange(0, ROWS))[:, None]
        token = first + number
        inside = (number < tokens_each) & (token < length) & is_column
        place = (row * length + token) * D + columns
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            branch = tl.load(branch_ptr + place, mask=inside, other=0.0).to(tl.float32)
            rounded = (x + gate * branch).to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + place, rounded, mask=inside)
            x = rounded.to(tl.float32)
        if NORM:
            centred = tl.where(is_column, x - (tl.sum(x, axis=1) / D)[:, None], 0.0)
            normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=1) / D + eps)[:, None]
            out = normed * (1.0 + scale) + shift
            tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    grad_ptr,
    grad_sum_ptr,
    x_ptr,
    branch_ptr,
    gate_ptr,
    scale_ptr,
    grad_x_ptr,
    grad_branch_ptr,
    partial_ptr,
    length,
    tiles,
    tokens_each,
    gate_stride,
    scale_stride,
    eps: tl.constexpr,  # a run-time float would arrive as float64 from compiled graphs
    D: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    first = (program % tiles) * tokens_each
    columns = tl.arange(0, BLOCK)[None, :]
    is_column = columns < D
    if GATED:
        gate = tl.load(gate_ptr + row * gate_stride + columns, mask=is_column, other=0.0).to(tl.float32)
        sum_gate = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    if NORM:
        scale = 1.0 + tl.load(scale_ptr + row * scale_stride + columns, mask=is_column, other=0.0).to(tl.float32)
        sum_shift = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        sum_scale = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for done in tl.range(0, tokens_each, ROWS, num_stages=STAGES):
        number = (done + tl.arange(0, ROWS))[:, None]
        token = first + number
        inside = (number < tokens_each) & (token < length) & is_column
        place = (row * length + token) * D + columns
        # all loads before the sums over a token, which make the warps wait for each other
        if GATED:
            branch = tl.load(branch_ptr + place, mask=inside, other=0.0)
            grad_sum = tl.load(grad_sum_ptr + place, mask=inside, other=0.0)
        if NORM:
            x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
            centred = tl.where(is_column, x - (tl.sum(x, axis=1) / D)[:, None], 0.0)
            inverse = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + eps)[:, None]
            normed = centred * inverse
            sum_shift += grad
            sum_scale += grad * normed
            grad = grad * scale
            mean = (tl.sum(grad, axis=1) / D)[:, None]
            along = (tl.sum(grad * normed, axis=1) / D)[:, None]
            grad_x = inverse * (grad - mean - normed * along)
            if GATED:
                grad_x += grad_sum.to(tl.float32)
            tl.store(grad_x_ptr + place, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        else:
            grad_x = grad_sum.to(tl.float32)
        if GATED:
            sum_gate += grad_x * branch.to(tl.float32)
            grad_branch = grad_x * gate
            tl.store(grad_branch_ptr + place, grad_branch.to(grad_branch_ptr.dtype.element_ty), mask=inside)
    partial_ptr += program * (3 * D) + columns  # [B, tiles, (shift, scale, gate), D]
    if NORM:
        tl.store(partial_ptr, tl.sum(sum_shift, axis=0)[None, :], mask=is_column)
        tl.store(partial_ptr + D, tl.sum(sum_scale, axis=0)[None, :], mask=is_column)
    if GATED:
        tl.store(partial_ptr + 2 * D, tl.sum(sum_gate, axis=0)[None, :], mask=is_column)


def _tiles(x: Tensor, kernel: str) -> tuple[int, int]:
    """``(tiles of a row, tokens of a tile)``: about as many tiles in all as ``kernel`` has programs."""
    batch, length, _ = x.shape
    tiles = max(1, min(length, resident_programs(x.device, kernel) // max(1, batch)))
    tokens = -(-length // tiles)
    return max(1, -(-length // max(1, tokens))), tokens


def _backward_tile(dim: int) -> dict[str, int]:
    return {"STAGES": TUNED["modulated_norm_backward"].stages, **tile(dim, "modulated_norm_backward")}


def _empty(x: Tensor, *others: Tensor) -> Tensor:
    """Like ``x``, in the dtype that arithmetic with ``others`` gives."""
    dtype = x.dtype
    for other in others:
        dtype = torch.promote_types(dtype, other.dtype)
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _vectors(x: Tensor) -> Tensor:
    """[B, 1, D], possibly cut out of a wider tensor, with neighbouring columns adjacent in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton_op("l3m_like::modulated_norm", mutates_args=())
def _modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    x, shift, scale = x.contiguous(), _vectors(shift), _vectors(scale)
    batch, length, dim = x.shape
    out = _empty(x, shift, scale)
    tiles, tokens = _tiles(x, "modulated_norm")
    wrap_triton(_forward_kernel)[(batch * tiles,)](
        x, x, shift, shift, scale, out, x, length, tiles, tokens,
        0, shift.stride(0), scale.stride(0), eps, D=dim, GATED=False, NORM=True, **tile(dim, "modulated_norm"),
    )  # fmt: skip
    return out


@triton_op("l3m_like::gated_modulated_norm", mutates_args=())
def _gated_modulated_norm(
    x: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x, branch = x.contiguous(), branch.contiguous()
    gate, shift, scale = _vectors(gate), _vectors(shift), _vectors(scale)
    batch, length, dim = x.shape
    total = _empty(x, gate, branch)
    out = _empty(total, shift, scale)
    tiles, tokens = _tiles(x, "modulated_norm")
    wrap_triton(_forward_kernel)[(batch * tiles,)](
        x, branch, gate, shift, scale, out, total, length, tiles, tokens,
        gate.stride(0), shift.stride(0), scale.stride(0), eps, D=dim, GATED=True, NORM=True, **tile(dim, "modulated_norm"),
    )  # fmt: skip
    return out, total


@triton_op("l3m_like::gated_residual", mutates_args=())
def _gated_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    x, branch, gate = x.contiguous(), branch.contiguous(), _vectors(gate)
    batch, length, dim = x.shape
    total = _empty(x, gate, branch)
    tiles, tokens = _tiles(x, "modulated_norm")
    wrap_triton(_forward_kernel)[(batch * tiles,)](
        x, branch, gate, gate, gate, x, total, length, tiles, tokens,
        gate.stride(0), 0, 0, 0.0, D=dim, GATED=True, NORM=False, **tile(dim, "modulated_norm"),
    )  # fmt: skip
    return total


@triton_op("l3m_like::modulated_norm_backward", mutates_args=())
def _modulated_norm_backward(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x, and [B, 2, D] float32: of shift and scale."""
    x, grad, scale = x.contiguous(), grad.contiguous(), _vectors(scale)
    batch, length, dim = x.shape
    tiles, tokens = _tiles(x, "modulated_norm_backward")
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(batch, tiles, 3, dim, dtype=torch.float32, device=x.device)
    wrap_triton(_backward_kernel)[(batch * tiles,)](
        grad, grad, x, x, scale, scale, grad_x, x, partial, length, tiles, tokens,
        0, scale.stride(0), eps, D=dim, GATED=False, NORM=True, **_backward_tile(dim),
    )  # fmt: skip
    return grad_x, partial[:, :, :2].sum(1)


@triton_op("l3m_like::gated_modulated_norm_backward", mutates_args=())
def _gated_modulated_norm_backward(
    grad: Tensor, grad_sum: Tensor, total: Tensor, gate: Tensor, branch: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``total`` = x + gate * branch and of branch, and [B, 3, D] float32: of shift, scale and gate."""
    total, branch, grad, grad_sum = total.contiguous(), branch.contiguous(), grad.contiguous(), grad_sum.contiguous()
    gate, scale = _vectors(gate), _vectors(scale)
    batch, length, dim = total.shape
    tiles, tokens = _tiles(total, "modulated_norm_backward")
    grad_total = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    grad_branch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    partial = torch.empty(batch, tiles, 3, dim, dtype=torch.float32, device=total.device)
    wrap_triton(_backward_kernel)[(batch * tiles,)](
        grad, grad_sum, total, branch, gate, scale, grad_total, grad_branch, partial, length, tiles, tokens,
        gate.stride(0), scale.stride(0), eps, D=dim, GATED=True, NORM=True, **_backward_tile(dim),
    )  # fmt: skip
    return grad_total, grad_branch, partial.sum(1)


@triton_op("l3m_like::gated_residual_backward", mutates_args=())
def _gated_residual_backward(grad: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of branch and, [B, 1, D] float32, of gate; that of x is ``grad`` itself."""
    grad, branch, gate = grad.contiguous(), branch.contiguous(), _vectors(gate)
    batch, length, dim = branch.shape
    tiles, tokens = _tiles(branch, "modulated_norm_backward")
    grad_branch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    partial = torch.empty(batch, tiles, 3, dim, dtype=torch.float32, device=branch.device)
    wrap_triton(_backward_kernel)[(batch * tiles,)](
        grad, grad, grad, branch, gate, gate, grad, grad_branch, partial, length, tiles, tokens,
        gate.stride(0), 0, 0.0, D=dim, GATED=True, NORM=False, **_backward_tile(dim),
    )  # fmt: skip
    return grad_branch, partial[:, :, 2:].sum(1)


# ---- gradients -----------------------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, shift, scale, ctx.eps = inputs
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(x, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale = ctx.saved_tensors
    grad_x, sums = _modulated_norm_backward(grad, x, scale, ctx.eps)
    return grad_x, sums[:, 0:1].to(ctx.shift_dtype), sums[:, 1:2].to(scale.dtype), None


def _setup_gated(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gate, branch, shift, scale, ctx.eps = inputs
    ctx.x_dtype, ctx.shift_dtype = x.dtype, shift.dtype
    ctx.save_for_backward(output[1], gate, branch, scale)


def _backward_gated(ctx: Any, grad: Tensor, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
    total, gate, branch, scale = ctx.saved_tensors
    grad_x, grad_branch, sums = _gated_modulated_norm_backward(grad, grad_sum, total, gate, branch, scale, ctx.eps)
    of_shift, of_scale, of_gate = sums.split(1, dim=1)
    return (
        grad_x.to(ctx.x_dtype),
        of_gate.to(gate.dtype),
        grad_branch,
        of_shift.to(ctx.shift_dtype),
        of_scale.to(scale.dtype),
        None,
    )


def _setup_residual(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gate, branch = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(gate, branch)


def _backward_residual(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate, branch = ctx.saved_tensors
    grad_branch, grad_gate = _gated_residual_backward(grad, gate, branch)
    return grad.to(ctx.x_dtype), grad_gate.to(gate.dtype), grad_branch


_modulated_norm.register_autograd(_backward, setup_context=_setup)
_gated_modulated_norm.register_autograd(_backward_gated, setup_context=_setup_gated)
_gated_residual.register_autograd(_backward_residual, setup_context=_setup_residual)
