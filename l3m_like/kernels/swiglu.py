"""``silu(gate) * up`` (Shazeer, arXiv:2002.05202), of two tensors [..., F] or of the halves of one [..., 2F].

Only the inputs are kept for the backward. The Triton kernels compute in float32 and round once; the gradients of two halves are
written into one tensor, so that a projection that computes both halves gets its gradient without a copy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from l3m_like.kernels.launch import jit, power_of_2, rows_of, tl, triton_op, use_triton, warps, wrap_triton


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition."""
    return F.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """``silu(gate) * up`` [..., F]; without ``up``, ``gate`` [..., 2F] holds both, gate first."""
    if use_triton("swiglu", backend, gate) and (up is None or up.dtype == gate.dtype):
        return _swiglu(gate, up)
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return swiglu_reference(gate, up)


# ---- Triton --------------------------------------------------------------------------------------------------------------


@jit
def _forward_kernel(
    gate_ptr, up_ptr, out_ptr, blocks, gate_stride, up_stride, F: tl.constexpr, HALVES: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    if HALVES:
        up_ptr = gate_ptr + F
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=columns < F, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=columns < F, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * F + columns, out.to(out_ptr.dtype.element_ty), mask=columns < F)


@jit
def _backward_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    blocks,
    grad_stride,
    gate_stride,
    up_stride,
    F: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    if HALVES:
        up_ptr = gate_ptr + F
        grad_up_ptr = grad_gate_ptr + F
    grad = tl.load(grad_ptr + row * grad_stride + columns, mask=columns < F, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=columns < F, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=columns < F, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    grad_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    grad_up = grad * gate * sigmoid
    WIDTH: tl.constexpr = 2 * F if HALVES else F
    tl.store(grad_gate_ptr + row * WIDTH + columns, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=columns < F)
    tl.store(grad_up_ptr + row * WIDTH + columns, grad_up.to(grad_gate_ptr.dtype.element_ty), mask=columns < F)


def _sizes(width: int, kernel: str) -> dict[str, int]:
    block = min(2048, power_of_2(width))
    return {"BLOCK": block, "num_warps": warps(block, kernel)}


@triton_op("l3m_like::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor | None) -> Tensor:
    halves = up is None
    width = gate.shape[-1] // 2 if halves else gate.shape[-1]
    gate2 = rows_of(gate)
    up2 = gate2 if up is None else rows_of(up)
    out = torch.empty((*gate.shape[:-1], width), dtype=gate.dtype, device=gate.device)
    sizes = _sizes(width, "swiglu")
    blocks = -(-width // sizes["BLOCK"])
    if gate2.shape[0] > 0:
        wrap_triton(_forward_kernel)[(gate2.shape[0] * blocks,)](
            gate2, up2, out, blocks, gate2.stride(0), up2.stride(0), F=width, HALVES=halves, **sizes
        )
    return out


def _launch_backward(grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor | None, width: int) -> None:
    """``grad_up`` None: ``gate`` and ``grad_gate`` hold both halves."""
    halves = grad_up is None
    grad2, gate2, up2 = rows_of(grad), rows_of(gate), rows_of(up)
    sizes = _sizes(width, "swiglu_backward")
    blocks = -(-width // sizes["BLOCK"])
    if grad2.shape[0] > 0:
        wrap_triton(_backward_kernel)[(grad2.shape[0] * blocks,)](
            grad2,
            gate2,
            up2,
            grad_gate,
            up2 if grad_up is None else grad_up,
            blocks,
            grad2.stride(0),
            gate2.stride(0),
            up2.stride(0),
            F=width,
            HALVES=halves,
            **sizes,
        )


@triton_op("l3m_like::swiglu_backward", mutates_args=())
def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grad_up = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch_backward(grad, gate, up, grad_gate, grad_up, gate.shape[-1])
    return grad_gate, grad_up


@triton_op("l3m_like::swiglu_halves_backward", mutates_args=())
def _swiglu_halves_backward(grad: Tensor, gate: Tensor) -> Tensor:
    """Of both halves [..., 2F]."""
    grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch_backward(grad, gate, gate, grad_gate, None, gate.shape[-1] // 2)
    return grad_gate


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    gate, up = ctx.saved_tensors
    if up is None:
        return _swiglu_halves_backward(grad, gate), None
    return _swiglu_backward(grad, gate, up)


_swiglu.register_autograd(_backward, setup_context=_setup)
