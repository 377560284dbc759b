"""Rotary positions (Su et al., arXiv:2104.09864, rotate-half form) of queries and keys, after the RMSNorm over each head.

``q`` [B, S, H, K], ``k`` [B, S, Hkv, K] (of any strides but the last); ``cos`` and ``sin`` [B or 1, S, K] in at least float32:
positions of more than one axis are other tables, not other kernels. ``q_weight``, ``k_weight`` [K] are the norm's (Qwen3), or
None. A Triton program has the heads of a token, queries and keys; the backward keeps the inputs only and computes the norm
again. Where queries, keys and values are cut from one product (``joint_qk_norm_rope``), it writes their gradients as one tensor,
and nobody joins them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l3m_like.kernels.launch import (
    jit,
    power_of_2,
    resident_programs,
    stages_that_fit,
    tl,
    triton_op,
    use_triton,
    warps,
    wrap_triton,
)
from l3m_like.kernels.rms_norm import rms_norm_reference


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` [B, S, H, K] by ``cos``, ``sin`` [B or 1, S, K]; computed in their dtype, returned in that of ``x``."""
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (wide * cos.unsqueeze(2) + turned * sin.unsqueeze(2)).to(x.dtype)


def norm_rope(x: Tensor, cos: Tensor | None, sin: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
    """Of queries alone, or keys alone, in plain operations; arguments as ``qk_norm_rope``."""
    x = x if weight is None else rms_norm_reference(x, weight, eps)
    return x if cos is None or sin is None else apply_rope(x, cos, sin)


def qk_norm_rope_reference(
    q: Tensor, k: Tensor, cos: Tensor | None, sin: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The definition; arguments as ``qk_norm_rope``."""
    return norm_rope(q, cos, sin, q_weight, eps), norm_rope(k, cos, sin, k_weight, eps)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Queries and keys after the norm (if there are weights) and the rotation (if there are cosines), in their shapes."""
    if _takes(backend, q, k, cos, sin, q_weight, k_weight):
        return _launched(q, k, cos, sin, q_weight, k_weight, eps)
    return qk_norm_rope_reference(q, k, cos, sin, q_weight, k_weight, eps)


def joint_qk_norm_rope(
    qkv: Tensor,
    kv_heads: int,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    *,
    copies: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """``qk_norm_rope`` of queries and keys, and the values, of qkv [B, S, H + 2 kv_heads, K], the heads of all three.

    With ``copies``, keys and values are [copies, B, S, Hkv, K], one memory: the gradients of each are summed as they are read.
    """
    q, k, v = _cut(qkv, kv_heads)
    if _takes(backend, q, k, cos, sin, q_weight, k_weight):
        return _JointNormRope.apply(qkv, kv_heads, cos, sin, q_weight, k_weight, eps, copies)
    q, k = qk_norm_rope_reference(q, k, cos, sin, q_weight, k_weight, eps)
    return q, *_copied(k, v, copies)


def _copied(k: Tensor, v: Tensor, copies: int) -> tuple[Tensor, Tensor]:
    return (k, v) if copies == 1 else (k.expand(copies, *k.shape), v.expand(copies, *v.shape))


def _cut(qkv: Tensor, kv_heads: int) -> tuple[Tensor, ...]:
    return qkv.split((qkv.shape[2] - 2 * kv_heads, kv_heads, kv_heads), dim=2)


def _takes(
    backend: str,
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
) -> bool:
    """Whether a kernel can: one that has something to do, whose program's heads fit in registers, with float32 tables."""
    fits = (q.shape[2] + k.shape[2]) * q.shape[3] <= 32768 and q.shape[3] % 2 == 0 and (cos is None or cos.dtype == torch.float32)
    something = (q_weight is None) == (k_weight is None) and not (q_weight is None and cos is None)
    return use_triton("rope", backend, q, k, cos, sin, q_weight, k_weight) and fits and something


def _launched(
    q: Tensor, k: Tensor, cos: Tensor | None, sin: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    if q_weight is not None and k_weight is not None:
        return _norm_rope(q, k, cos, sin, q_weight, k_weight, eps)
    assert cos is not None and sin is not None
    return _rope(q, k, cos, sin)


# ---- Triton --------------------------------------------------------------------------------------------------------------


@jit
def _forward_heads(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    head_stride,
    eps: tl.constexpr,  # a run-time float would arrive as float64 from compiled graphs
    HEADS: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    HALF: tl.constexpr = K // 2
    heads = tl.arange(0, HEAD_BLOCK)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    is_column = columns < HALF
    inside = (heads < HEADS) & is_column
    place = heads * head_stride + columns
    a = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + place + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        wa = tl.load(weight_ptr + columns, mask=is_column, other=0.0)
        wb = tl.load(weight_ptr + columns + HALF, mask=is_column, other=0.0)
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / K + eps)[:, None]
        a = ((a * scale).to(wa.dtype).to(tl.float32) * wa.to(tl.float32)).to(wa.dtype).to(tl.float32)
        b = ((b * scale).to(wb.dtype).to(tl.float32) * wb.to(tl.float32)).to(wb.dtype).to(tl.float32)
    if ROPE:
        ca = tl.load(cos_ptr + columns, mask=is_column, other=0.0)
        cb = tl.load(cos_ptr + columns + HALF, mask=is_column, other=0.0)
        sa = tl.load(sin_ptr + columns, mask=is_column, other=0.0)
        sb = tl.load(sin_ptr + columns + HALF, mask=is_column, other=0.0)
        turned = a * ca - b * sa
        b = b * cb + a * sb
        a = turned
    out = heads * K + columns
    tl.store(out_ptr + out, a.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + out + HALF, b.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_out_ptr,
    k_out_ptr,
    length,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    table_batch,
    eps: tl.constexpr,  # a run-time float would arrive as float64 from compiled graphs
    H: tl.constexpr,
    HKV: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    H_BLOCK: tl.constexpr,
    HKV_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    row = number // length
    token = number % length
    table = row * table_batch + token * K
    _forward_heads(
        q_ptr + row * q_batch + token * q_token, q_weight_ptr, cos_ptr + table, sin_ptr + table,
        q_out_ptr + number * (H * K), q_head, eps, H, K, NORM, ROPE, H_BLOCK, BLOCK,
    )  # fmt: skip
    _forward_heads(
        k_ptr + row * k_batch + token * k_token, k_weight_ptr, cos_ptr + table, sin_ptr + table,
        k_out_ptr + number * (HKV * K), k_head, eps, HKV, K, NORM, ROPE, HKV_BLOCK, BLOCK,
    )  # fmt: skip


@jit
def _backward_heads(
    grad_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    sum_a,
    sum_b,
    grad_head_stride,
    grad_copy_stride,
    head_stride,
    eps: tl.constexpr,  # a run-time float would arrive as float64 from compiled graphs
    alive,
    COPIES: tl.constexpr,  # whose gradients are summed
    HEADS: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the gradient of the heads and returns the partial sums with this token's part of the weight's gradient."""
    HALF: tl.constexpr = K // 2
    heads = tl.arange(0, HEAD_BLOCK)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    is_column = columns < HALF
    inside = (heads < HEADS) & is_column & alive
    place = heads * grad_head_stride + columns
    da = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
    db = tl.load(grad_ptr + place + HALF, mask=inside, other=0.0).to(tl.float32)
    for copy in tl.static_range(1, COPIES):
        da += tl.load(grad_ptr + copy * grad_copy_stride + place, mask=inside, other=0.0).to(tl.float32)
        db += tl.load(grad_ptr + copy * grad_copy_stride + place + HALF, mask=inside, other=0.0).to(tl.float32)
    if ROPE:
        ca = tl.load(cos_ptr + columns, mask=is_column & alive, other=0.0)
        cb = tl.load(cos_ptr + columns + HALF, mask=is_column & alive, other=0.0)
        sa = tl.load(sin_ptr + columns, mask=is_column & alive, other=0.0)
        sb = tl.load(sin_ptr + columns + HALF, mask=is_column & alive, other=0.0)
        turned = da * ca + db * sb
        db = db * cb - da * sa
        da = turned
    if NORM:
        stored_a = tl.load(weight_ptr + columns, mask=is_column, other=0.0)
        stored_b = tl.load(weight_ptr + columns + HALF, mask=is_column, other=0.0)
        place = heads * head_stride + columns
        a = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + place + HALF, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / K + eps)[:, None]
        a = a * scale
        b = b * scale
        sum_a += da * a.to(stored_a.dtype).to(tl.float32)
        sum_b += db * b.to(stored_b.dtype).to(tl.float32)
        da = da * stored_a.to(tl.float32)
        db = db * stored_b.to(tl.float32)
        along = ((tl.sum(da * a, axis=1) + tl.sum(db * b, axis=1)) / K)[:, None]
        da = scale * (da - a * along)
        db = scale * (db - b * along)
    out = heads * K + columns
    tl.store(out_ptr + out, da.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + out + HALF, db.to(out_ptr.dtype.element_ty), mask=inside)
    return sum_a, sum_b


@jit
def _backward_kernel(
    q_grad_ptr,
    k_grad_ptr,
    v_grad_ptr,
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_out_ptr,
    k_out_ptr,
    partial_ptr,
    tokens,
    tokens_each,
    length,
    q_grad_batch,
    q_grad_token,
    q_grad_head,
    k_grad_batch,
    k_grad_token,
    k_grad_head,
    k_grad_copy,
    v_grad_batch,
    v_grad_token,
    v_grad_head,
    v_grad_copy,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    table_batch,
    eps: tl.constexpr,  # a run-time float would arrive as float64 from compiled graphs
    H: tl.constexpr,
    HKV: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    JOINT: tl.constexpr,  # q_out has all heads: those of the values, too, which are copied
    COPIES: tl.constexpr,
    H_BLOCK: tl.constexpr,
    HKV_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    Q_TOKEN: tl.constexpr = (H + 2 * HKV) * K if JOINT else H * K
    K_TOKEN: tl.constexpr = Q_TOKEN if JOINT else HKV * K
    if JOINT:
        k_out_ptr = q_out_ptr + H * K
    q_a = tl.zeros([H_BLOCK, BLOCK], dtype=tl.float32)
    q_b = tl.zeros([H_BLOCK, BLOCK], dtype=tl.float32)
    k_a = tl.zeros([HKV_BLOCK, BLOCK], dtype=tl.float32)
    k_b = tl.zeros([HKV_BLOCK, BLOCK], dtype=tl.float32)
    for done in tl.range(0, tokens_each, num_stages=STAGES):
        number = program * tokens_each + done
        alive = number < tokens
        row = number // length
        token = number % length
        table = row * table_batch + token * K
        q_a, q_b = _backward_heads(
            q_grad_ptr + row * q_grad_batch + token * q_grad_token, q_ptr + row * q_batch + token * q_token, q_weight_ptr,
            cos_ptr + table, sin_ptr + table, q_out_ptr + number * Q_TOKEN, q_a, q_b, q_grad_head, 0, q_head, eps, alive,
            1, H, K, NORM, ROPE, H_BLOCK, BLOCK,
        )  # fmt: skip
        k_a, k_b = _backward_heads(
            k_grad_ptr + row * k_grad_batch + token * k_grad_token, k_ptr + row * k_batch + token * k_token, k_weight_ptr,
            cos_ptr + table, sin_ptr + table, k_out_ptr + number * K_TOKEN, k_a, k_b, k_grad_head, k_grad_copy, k_head, eps,
            alive, COPIES, HKV, K, NORM, ROPE, HKV_BLOCK, BLOCK,
        )  # fmt: skip
        if JOINT:
            _backward_heads(
                v_grad_ptr + row * v_grad_batch + token * v_grad_token, v_grad_ptr, k_weight_ptr, cos_ptr, sin_ptr,
                k_out_ptr + number * K_TOKEN + HKV * K, k_a, k_b, v_grad_head, v_grad_copy, 0, eps, alive,
                COPIES, HKV, K, False, False, HKV_BLOCK, BLOCK,
            )  # fmt: skip
    if NORM:
        HALF: tl.constexpr = K // 2
        columns = tl.arange(0, BLOCK)
        partial_ptr += program * (2 * K) + columns  # [programs, (query, key), K]
        tl.store(partial_ptr, tl.sum(q_a, axis=0), mask=columns < HALF)
        tl.store(partial_ptr + HALF, tl.sum(q_b, axis=0), mask=columns < HALF)
        tl.store(partial_ptr + K, tl.sum(k_a, axis=0), mask=columns < HALF)
        tl.store(partial_ptr + K + HALF, tl.sum(k_b, axis=0), mask=columns < HALF)


def _dense(x: Tensor) -> Tensor:
    """``x`` with the elements of a head adjacent in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _sizes(q: Tensor, k: Tensor, kernel: str) -> dict[str, Any]:
    heads, kv_heads, width = q.shape[2], k.shape[2], q.shape[3]
    block, head_block = power_of_2(width // 2), power_of_2(heads)
    return {
        "H": heads,
        "HKV": kv_heads,
        "K": width,
        "H_BLOCK": head_block,
        "HKV_BLOCK": power_of_2(kv_heads),
        "BLOCK": block,
        "num_warps": warps(2 * head_block * block, kernel),
    }


def _tables(cos: Tensor | None, sin: Tensor | None, unused: Tensor) -> tuple[Tensor, Tensor, int]:
    """Cosines, sines and the step from one row of the batch to the next (0: all rows have the same)."""
    if cos is None or sin is None:
        return unused, unused, 0
    cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, cos.stride(0) if cos.shape[0] > 1 else 0


def _launch_forward(
    q: Tensor, k: Tensor, cos: Tensor | None, sin: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    q, k = _dense(q), _dense(k)
    tokens = q.shape[0] * q.shape[1]
    q_out = torch.empty(q.shape, dtype=q.dtype if q_weight is None else q_weight.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype if k_weight is None else k_weight.dtype, device=k.device)
    cos_table, sin_table, table_batch = _tables(cos, sin, q)
    if tokens > 0:
        wrap_triton(_forward_kernel)[(tokens,)](
            q,
            k,
            cos_table,
            sin_table,
            q if q_weight is None else q_weight,
            k if k_weight is None else k_weight,
            q_out,
            k_out,
            q.shape[1],
            *q.stride()[:3],
            *k.stride()[:3],
            table_batch,
            eps,
            NORM=q_weight is not None,
            ROPE=cos is not None,
            **_sizes(q, k, "rope"),
        )
    return q_out, k_out


def _launch_backward(
    q_grad: Tensor,
    k_grad: Tensor,
    v_grad: Tensor | None,
    inputs: tuple[Tensor, Tensor] | None,
    tables: tuple[Tensor | None, Tensor | None],
    weights: tuple[Tensor, Tensor] | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of q and k, or with a ``v_grad`` that of all heads [B, S, H + 2 Hkv, K] in place of the first; and, if there are
    ``weights``, partial sums of theirs [programs, 2, K] float32. Of keys and values there may be gradients of several copies,
    [copies, B, S, Hkv, K]."""
    q_grad, k_grad = _dense(q_grad), _dense(k_grad)
    # without a norm the kernel reads no inputs
    copies, one = (len(k_grad), k_grad[0]) if k_grad.dim() == 5 else (1, k_grad)
    q, k = (q_grad, one) if inputs is None else (_dense(inputs[0]), _dense(inputs[1]))
    q_weight, k_weight = (q, k) if weights is None else weights
    batch, length, heads, width = q.shape
    tokens, kv_heads = batch * length, k.shape[2]
    programs = max(1, min(resident_programs(q.device, "rope_backward"), tokens)) if weights is not None else max(1, tokens)
    # torch.compile would copy views that are written: of one tensor, the kernel finds the parts
    q_out = torch.empty(batch, length, heads + (0 if v_grad is None else 2 * kv_heads), width, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape if v_grad is None else (0,), dtype=k.dtype, device=k.device)
    joint, v_grad = v_grad is not None, k_grad if v_grad is None else _dense(v_grad)
    partial = None if weights is None else torch.empty(programs, 2, width, dtype=torch.float32, device=q.device)
    cos_table, sin_table, table_batch = _tables(*tables, q)
    sizes = _sizes(q, k, "rope_backward")
    # without a norm a program has one token
    loads = 2 * sizes["H_BLOCK"] + (1 + copies * (2 if joint else 1)) * sizes["HKV_BLOCK"]
    moved = loads * 2 * sizes["BLOCK"] * q.element_size()
    stages = 1 if weights is None else stages_that_fit("rope_backward", moved, q.device)
    wrap_triton(_backward_kernel)[(programs,)](
        q_grad,
        k_grad,
        v_grad,
        q,
        k,
        cos_table,
        sin_table,
        q_weight,
        k_weight,
        q_out,
        k_out,
        q if partial is None else partial,
        tokens,
        -(-tokens // programs),
        max(1, length),
        *q_grad.stride()[:3],
        *k_grad.stride()[-4:-1],
        k_grad.stride(0),
        *v_grad.stride()[-4:-1],
        v_grad.stride(0),
        *q.stride()[:3],
        *k.stride()[:3],
        table_batch,
        eps,
        NORM=weights is not None,
        ROPE=tables[0] is not None,
        JOINT=joint,
        COPIES=copies,
        STAGES=stages,
        **sizes,
    )
    return q_out, k_out, partial


@triton_op("l3m_like::rope", mutates_args=())
def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _launch_forward(q, k, cos, sin, None, None, 0.0)


@triton_op("l3m_like::norm_rope", mutates_args=())
def _norm_rope(
    q: Tensor, k: Tensor, cos: Tensor | None, sin: Tensor | None, q_weight: Tensor, k_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _launch_forward(q, k, cos, sin, q_weight, k_weight, eps)


@triton_op("l3m_like::rope_backward", mutates_args=())
def _rope_backward(q_grad: Tensor, k_grad: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _launch_backward(q_grad, k_grad, None, None, (cos, sin), None, 0.0)[:2]


@triton_op("l3m_like::norm_rope_backward", mutates_args=())
def _norm_rope_backward(
    q_grad: Tensor,
    k_grad: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and, [2, K] float32, of both weights."""
    q_out, k_out, partial = _launch_backward(q_grad, k_grad, None, (q, k), (cos, sin), (q_weight, k_weight), eps)
    assert partial is not None
    return q_out, k_out, partial.sum(0)


@triton_op("l3m_like::joint_rope_backward", mutates_args=())
def _joint_rope_backward(q_grad: Tensor, k_grad: Tensor, v_grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of all heads [B, S, H + 2 Hkv, K]."""
    return _launch_backward(q_grad, k_grad, v_grad, None, (cos, sin), None, 0.0)[0]


@triton_op("l3m_like::joint_norm_rope_backward", mutates_args=())
def _joint_norm_rope_backward(
    q_grad: Tensor,
    k_grad: Tensor,
    v_grad: Tensor,
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of all heads and, [2, K] float32, of both weights."""
    q, k, _ = _cut(qkv, k_grad.shape[-2])
    joint, _, partial = _launch_backward(q_grad, k_grad, v_grad, (q, k), (cos, sin), (q_weight, k_weight), eps)
    assert partial is not None
    return joint, partial.sum(0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_rope_backward(q_grad, k_grad, *ctx.saved_tensors), None, None


def _setup_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward_norm(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, cos, sin, q_weight, k_weight = ctx.saved_tensors
    dq, dk, sums = _norm_rope_backward(q_grad, k_grad, q, k, cos, sin, q_weight, k_weight, ctx.eps)
    return dq, dk, None, None, *_of_weights(sums, q_weight, k_weight), None


def _of_weights(sums: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of both, rounded together where they have one dtype."""
    sums = sums.to(q_weight.dtype) if q_weight.dtype == k_weight.dtype else sums
    return sums[0].to(q_weight.dtype), sums[1].to(k_weight.dtype)


_rope.register_autograd(_backward, setup_context=_setup)
_norm_rope.register_autograd(_backward_norm, setup_context=_setup_norm)


class _JointNormRope(torch.autograd.Function):
    """Around the operation, which cannot return a part of its input."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        kv_heads: int,
        cos: Tensor | None,
        sin: Tensor | None,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        copies: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = _cut(qkv, kv_heads)
        ctx.save_for_backward(None if q_weight is None else qkv, cos, sin, q_weight, k_weight)
        ctx.eps = eps
        q, k = _launched(q, k, cos, sin, q_weight, k_weight, eps)
        return q, *_copied(k, v, copies)

    @staticmethod
    def backward(ctx: Any, q_grad: Tensor, k_grad: Tensor, v_grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cos, sin, q_weight, k_weight = ctx.saved_tensors
        if q_weight is None:
            return _joint_rope_backward(q_grad, k_grad, v_grad, cos, sin), *[None] * 7
        joint, sums = _joint_norm_rope_backward(q_grad, k_grad, v_grad, qkv, cos, sin, q_weight, k_weight, ctx.eps)
        return joint, None, None, None, *_of_weights(sums, q_weight, k_weight), None, None
