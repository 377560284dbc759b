"""Attention of every query to every key of its row, for rows of at most 256 places: images in patches and latents.

q, k and v are [B, S, H, K], K 64 or 72, fp16 or bf16, on Hopper. The forward is cuDNN's. Its backward takes three kernels for
short rows, adds gradients of queries up in float32 in no fixed order and, for heads of 72, computes as for 128 columns; ours is
one, in CUDA C++ (``short_attention.cu``: 72 is no power of two, as Triton would have it), and repeats its bits. It also writes
the three gradients as one tensor: where q, k and v are cut from one product (``joint_short_attention``), nobody joins them again;
and it sums them over all places, which is the gradient of that product's bias, while they are in registers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l3m_like.kernels.nvrtc import Kernel, compiled, has_nvrtc

#: longest row (shorter than 65, others are faster), and widths of heads that the kernel is written for
SHORTEST, LONGEST = 65, 256
HEAD_DIMS = (64, 72)
#: of a block; the warps that multiply
THREADS, WARPS = 384, 8


@functools.cache
def short_attention_takes(length: int, head_dim: int, device: torch.device) -> bool:
    """Whether the kernel can be had for full attention of these sizes, in half precision, where cuDNN's can."""
    if device.type != "cuda" or not SHORTEST <= length <= LONGEST or head_dim not in HEAD_DIMS:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0) and has_nvrtc()


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention [B, S, H, K] with scores scaled by 1 / sqrt(K)."""
    return _short_attention(q, k, v)[0]


def joint_short_attention(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same of q, k, v = qkv.unbind(2), qkv [B, S, 3, H, K], whose gradient is one tensor too.

    ``bias`` [3 H K] was added in what gave ``qkv``, and has no gradient there: it has it from here. That of the keys' bias is 0,
    as it adds the same to all scores of a query.
    """
    return _joint_short_attention(qkv, bias)[0]


# ---- CUDA ----------------------------------------------------------------------------------------------------------------


def _product(name: str, columns: int, kind: str, *, registers: bool = False, transposed: tuple[int, int]) -> str:
    """A function of CUDA: 64 x ``columns`` sums over 16, of operands in shared memory, or the first in registers;
    ``transposed``: whether what is summed over is rows of the operands in memory."""
    sums = columns // 2
    places = ",".join(f"%{i}" for i in range(sums))
    outputs = ",".join(f'"+f"(c[{i}])' for i in range(sums))
    if registers:
        first, taken = "{" + ",".join(f"%{sums + i}" for i in range(4)) + "}", 4
        given = ",".join(f'"r"(a[{i}])' for i in range(4))
        flags = f"1, 1, {transposed[1]}"
    else:
        first, taken, given = f"%{sums}", 1, '"l"(a)'
        flags = f"1, 1, {transposed[0]}, {transposed[1]}"
    # "keep": add to what is there
    return (
        f"DEVICE void {name}(float* c, {'const u32* a' if registers else 'u64 a'}, u64 b, int keep) {{\n"
        f'  asm volatile("{{.reg .pred p; setp.ne.b32 p, %{sums + taken + 1}, 0; '
        f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} "
        f'{{{places}}}, {first}, %{sums + taken}, p, {flags};}}" : {outputs} : {given}, "l"(b), "r"(keep));\n}}\n'
    )


def products(head_dim: int, kind: str) -> str:
    """The kernel's products of matrices, for operands of ``kind`` ("bf16" or "f16")."""
    return "".join(
        (
            _product("product_32", 32, kind, transposed=(0, 0)),
            _product("product_heads", head_dim, kind, registers=True, transposed=(0, 1)),
            _product("product_queries", head_dim, kind, transposed=(1, 1)),
        )
    )


def source(head_dim: int, dtype: torch.dtype) -> str:
    text = Path(__file__).with_suffix(".cu").read_text(encoding="utf-8")
    return text.replace("// PRODUCTS", products(head_dim, "bf16" if dtype == torch.bfloat16 else "f16"))


def macros(even: bool, head_dim: int, dtype: torch.dtype, tokens: Sequence[int]) -> tuple[str, ...]:
    """Options of the compiler; ``even``: rows are of LONGEST places; ``tokens``: elements from one token to the next, of q, k, v,
    O and the gradients."""
    names = ("Q_TOKEN", "K_TOKEN", "V_TOKEN", "OUT_TOKEN", "GRAD_TOKEN")
    return (
        f"-DHEAD_DIM={head_dim}",
        f"-DIS_BF16={int(dtype == torch.bfloat16)}",
        f"-DEVEN={int(even)}",
        f"-DSCALE={1 / math.sqrt(head_dim)!r}f",
        *(f"-D{name}={count}" for name, count in zip(names, tokens, strict=True)),
    )


def shared_bytes(head_dim: int) -> int:
    """Shared memory of a block: k and v of two heads, three steps, gradients of scores, zeros and gates."""
    chunks = head_dim // 8
    return 4 * chunks * 4112 + 3 * (3 * chunks * 528 + 256) + 8 * 4112 + 1024 + 64


@functools.cache
def _kernel(even: bool, head_dim: int, dtype: torch.dtype, tokens: tuple[int, ...], device: torch.device) -> tuple[Kernel, int]:
    """The kernel, and how many blocks run at a time."""
    code = compiled(source(head_dim, dtype), "sm_90a", macros(even, head_dim, dtype, tokens))
    blocks = torch.cuda.get_device_properties(device).multi_processor_count
    return Kernel(code, "short_attention_backward", shared_bytes(head_dim)), blocks


def _even(x: Tensor) -> Tensor:
    """``x`` [B, S, H, K] with only the distance of tokens free, in steps of 16 bytes from a multiple of them."""
    batch, length, _, width = x.shape
    token = x.stride(1)
    x = x if x.stride() == (length * token, token, width, 1) and token % 8 == 0 else x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _launch(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, summed: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients [B, S, 3, H, K] of q, k and v, and if ``summed`` float32 [B, WARPS, H, 2, K]: parts of the sums over S of those
    of q and v; sums [B, H, S, 1] float32: logarithms of the sums of exponentials."""
    q, k, v, out, grad, sums = _even(q), _even(k), _even(v), _even(out.contiguous()), _even(grad.contiguous()), sums.contiguous()
    batch, length, heads, width = q.shape
    # the kernel would read or leave out what is elsewhere
    assert q.shape == k.shape == v.shape and SHORTEST <= length <= LONGEST and width in HEAD_DIMS
    grads = torch.empty(batch, length, 3, heads, width, dtype=q.dtype, device=q.device)
    partial = torch.empty(_partial_shape(q) if summed else 0, dtype=torch.float32, device=q.device)
    if q.numel() > 0:
        tokens = (q.stride(1), k.stride(1), v.stride(1), out.stride(1), grads.stride(1))
        with torch.cuda.device(q.device):
            kernel, blocks = _kernel(length == LONGEST, width, q.dtype, tokens, q.device)
            total = batch * heads
            kernel(min(blocks, total), THREADS, q, k, v, out, grad, sums, *grads.unbind(2), partial, total, heads, length)
    return grads, partial


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False)
    return out.transpose(1, 2).contiguous(), sums


@torch.library.custom_op("l3m_like::short_attention", mutates_args=())
def _short_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention and, [B, H, S, 1] float32, the logarithms of the sums of exponentials."""
    return _forward(q, k, v)


@torch.library.custom_op("l3m_like::joint_short_attention", mutates_args=())
def _joint_short_attention(qkv: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    return _forward(q, k, v)


@torch.library.custom_op("l3m_like::short_attention_backward", mutates_args=())
def _short_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor) -> Tensor:
    return _launch(grad, q, k, v, out, sums)[0]


@torch.library.custom_op("l3m_like::joint_short_attention_backward", mutates_args=())
def _joint_short_attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, sums: Tensor, biased: bool
) -> tuple[Tensor, Tensor]:
    """As ``_launch``."""
    q, k, v = qkv.unbind(2)
    return _launch(grad, q, k, v, out, sums, biased)


def _like(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, length, 1, dtype=torch.float32)


def _gradients_like(q: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:2], 3, *q.shape[2:])


def _partial_shape(q: Tensor) -> tuple[int, ...]:
    batch, _, heads, width = q.shape
    return batch, WARPS, heads, 2, width


_short_attention.register_fake(lambda q, k, v: _like(q))
_joint_short_attention.register_fake(lambda qkv, bias: _like(qkv.select(2, 0)))
_short_attention_backward.register_fake(lambda grad, q, k, v, out, sums: _gradients_like(q))
_joint_short_attention_backward.register_fake(
    lambda grad, qkv, out, sums, biased: (
        _gradients_like(out),
        out.new_empty(_partial_shape(out) if biased else 0, dtype=torch.float32),
    )
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, ...]:
    return _short_attention_backward(grad, *ctx.saved_tensors).unbind(2)


def _joint_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, bias = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, *output)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _joint_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor | None]:
    biased = ctx.needs_input_grad[1]
    grads, partial = _joint_short_attention_backward(grad, *ctx.saved_tensors, biased)
    if not biased:
        return grads, None
    of_q, of_v = partial.sum((0, 1)).unbind(1)
    return grads, torch.stack((of_q, torch.zeros_like(of_q), of_v)).flatten().to(ctx.bias_dtype)


_short_attention.register_autograd(_backward, setup_context=_setup)
_joint_short_attention.register_autograd(_joint_backward, setup_context=_joint_setup)
