"""On an NVIDIA GPU: the Triton kernels' errors against float64, beside those of torch; compiled, checkpointed, and twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from l3m_like.core.errors import UserError
from l3m_like.kernels.embedding import embedding
from l3m_like.kernels.gelu import linear_gelu
from l3m_like.kernels.modulated_norm import (
    gated_modulated_norm,
    gated_residual,
    modulated_norm,
    modulated_norm_and_residual,
)
from l3m_like.kernels.rms_norm import rms_norm, rms_norm_and_residual
from l3m_like.kernels.rope import joint_qk_norm_rope, qk_norm_rope
from l3m_like.kernels.select import AUTO, in_use, selecting
from l3m_like.kernels.squares import sum_of_squares
from l3m_like.kernels.swiglu import swiglu
from l3m_like.layers import MLP, Attention, DiTLayer, Rope, SwiGLU, TransformerLayer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
    pytest.mark.timeout(300),  # the first kernel of a kind may be compiled
]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


@dataclass
class Op:
    """``call(*inputs, backend=...)``; ``shapes`` of the inputs."""

    call: Callable[..., Any]
    shapes: list[tuple[int, ...]]


def rope_of(q: Tensor, k: Tensor, *weights: Tensor, backend: str) -> Any:
    dtype = torch.promote_types(q.dtype, torch.float32)
    cos, sin = (table.to(dtype) for table in Rope(q.shape[-1], 1e4)(torch.arange(q.shape[1], device=q.device)))
    return qk_norm_rope(q, k, cos, sin, *(weights or (None, None)), 1e-6, backend=backend)


def of_fused(qkv: Tensor, *weights: Tensor, backend: str) -> Any:
    """Views of one projection's result."""
    q, k, _ = qkv.split([4 * 128, 2 * 128, 2 * 128], dim=-1)
    return rope_of(q.unflatten(-1, (4, 128)), k.unflatten(-1, (2, 128)), *weights, backend=backend)


def joint_rope_of(qkv: Tensor, *weights: Tensor, backend: str, copies: int = 1) -> Any:
    """Two heads of keys and two of values are the last; values return as they are, and their gradient among the others."""
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    cos, sin = (table.to(dtype) for table in Rope(qkv.shape[-1], 1e4)(torch.arange(qkv.shape[1], device=qkv.device)))
    return joint_qk_norm_rope(qkv, 2, cos, sin, *(weights or (None, None)), 1e-6, copies=copies, backend=backend)


def looked_up(weight: Tensor, *, backend: str) -> Tensor:
    """One row many times, others once or never."""
    ids = torch.arange(3000, device=weight.device) * 7 % 2600
    return embedding(torch.where(ids < len(weight), ids, 5), weight, backend=backend)


def with_residual(x: Tensor, weight: Tensor, *, backend: str) -> Any:
    return rms_norm_and_residual(x, weight, 1e-6, backend=backend)


def modulated_of_one(x: Tensor, branch: Tensor, modulation: Tensor, *bias: Tensor, backend: str) -> Any:
    """Vectors cut out of one tensor, as a layer does it."""
    gate, shift, scale = modulation.chunk(3, dim=-1)
    return gated_modulated_norm(x, gate, branch, shift, scale, 1e-6, *bias, backend=backend)


def norm_of_sum(x: Tensor, residual: Tensor, weight: Tensor, *, backend: str) -> Any:
    return rms_norm(x, weight, 1e-6, residual, backend=backend)


OPS = {
    "rms_norm": Op(lambda x, w, *, backend: rms_norm(x, w, 1e-6, backend=backend), [(3, 700, 2048), (2048,)]),
    "rms_norm_odd": Op(lambda x, w, *, backend: rms_norm(x, w, 1e-6, backend=backend), [(2001, 1000), (1000,)]),
    "rms_norm_wide": Op(lambda x, w, *, backend: rms_norm(x, w, 1e-6, backend=backend), [(515, 8192), (8192,)]),
    "rms_norm_of_sum": Op(norm_of_sum, [(3, 700, 1024), (3, 700, 1024), (1024,)]),
    "rms_norm_and_residual": Op(with_residual, [(3, 700, 2048), (2048,)]),
    "modulated_norm": Op(
        lambda x, shift, scale, *, backend: modulated_norm(x, shift, scale, 1e-6, backend=backend),
        [(9, 256, 1152), (9, 1, 1152), (9, 1, 1152)],
    ),
    "modulated_norm_and_residual": Op(
        lambda x, shift, scale, *, backend: modulated_norm_and_residual(x, shift, scale, 1e-6, backend=backend),
        [(9, 256, 1152), (9, 1, 1152), (9, 1, 1152)],
    ),
    "modulated_norm_of_sum": Op(modulated_of_one, [(9, 256, 1152), (9, 256, 1152), (9, 1, 3 * 1152)]),
    "modulated_norm_of_biased_sum": Op(modulated_of_one, [(9, 256, 1152), (9, 256, 1152), (9, 1, 3 * 1152), (1152,)]),
    "modulated_norm_one_row": Op(modulated_of_one, [(1, 3001, 384), (1, 3001, 384), (1, 1, 3 * 384)]),
    "gated_residual": Op(gated_residual, [(9, 200, 1152), (9, 1, 1152), (9, 200, 1152)]),
    "gated_residual_biased": Op(gated_residual, [(9, 200, 1152), (9, 1, 1152), (9, 200, 1152), (1152,)]),
    "norm_rope": Op(rope_of, [(2, 511, 16, 128), (2, 511, 8, 128), (128,), (128,)]),
    "norm_rope_odd": Op(rope_of, [(2, 301, 12, 72), (2, 301, 3, 72), (72,), (72,)]),
    "norm_rope_fused": Op(of_fused, [(2, 511, 8 * 128), (128,), (128,)]),
    "rope": Op(rope_of, [(2, 511, 32, 64), (2, 511, 8, 64)]),
    "joint_norm_rope": Op(joint_rope_of, [(2, 511, 4 + 2 + 2, 128), (128,), (128,)]),
    "joint_norm_rope_copies": Op(partial(joint_rope_of, copies=2), [(2, 511, 4 + 2 + 2, 128), (128,), (128,)]),
    "joint_rope": Op(joint_rope_of, [(2, 511, 6 + 2 + 2, 64)]),
    "gelu_tanh": Op(partial(linear_gelu, tanh=True), [(3, 500, 384), (1536, 384), (1536,)]),
    "gelu": Op(partial(linear_gelu, tanh=False), [(3, 500, 200), (1000, 200), (1000,)]),
    "embedding": Op(looked_up, [(1500, 2001)]),
    "swiglu": Op(swiglu, [(3, 500, 6144), (3, 500, 6144)]),
    "swiglu_halves": Op(swiglu, [(3, 500, 2 * 1000)]),
}


def outputs_and_gradients(call: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = call(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    weights = [randn(*o.shape, seed=i + 1).to(o.device, o.dtype) for i, o in enumerate(outs)]
    return [o.detach() for o in (*outs, *torch.autograd.grad(outs, leaves, weights))]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_error(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Outputs and every gradient: at most twice the error of torch's operations in the same dtype."""
    op = OPS[name]
    inputs = [randn(*shape, seed=i).to(device, dtype) for i, shape in enumerate(op.shapes)]
    exact = outputs_and_gradients(partial(op.call, backend="torch"), [x.double() for x in inputs])
    theirs = outputs_and_gradients(partial(op.call, backend="torch"), inputs)
    ours = outputs_and_gradients(partial(op.call, backend="triton"), inputs)
    for number, (a, b, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert a.dtype == b.dtype == dtype and a.shape == b.shape
        assert error(a, e) <= 2 * error(b, e) + 5e-7, number  # the device's approximate exp and rsqrt


@pytest.mark.parametrize("name", OPS)
def test_the_same_twice_and_compiled(name: str, device: torch.device) -> None:
    """Bitwise: sums are taken in one order, and torch.compile runs the same kernels."""
    op = OPS[name]
    call = partial(op.call, backend="triton")
    inputs = [randn(*shape, seed=i).to(device, torch.bfloat16) for i, shape in enumerate(op.shapes)]
    first, second = outputs_and_gradients(call, inputs), outputs_and_gradients(call, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.compiler.reset()
    compiled = outputs_and_gradients(torch.compile(lambda *args: call(*args), fullgraph=True), inputs)
    for a, b in zip(compiled, first, strict=True):
        # the last, small sum over programs may be taken in another order
        assert error(a, b.double()) <= 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_norm_of_gradients(dtype: torch.dtype, device: torch.device) -> None:
    """One launch over tensors of any sizes, the same twice, nearer to float64 than 1e-6; no wait after the first call."""
    tensors = [randn(*shape, seed=i).to(device, dtype) for i, shape in enumerate(((700, 2048), (3,), (0, 5), (41, 1001)))]
    wanted = sum(float(tensor.double().square().sum()) for tensor in tensors)
    first = sum_of_squares(tensors)
    torch.cuda.set_sync_debug_mode("error")
    second = sum_of_squares(tensors)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second) and float(first) == pytest.approx(wanted, rel=1e-6)


def layer_of(kind: str, backend: str, device: torch.device) -> tuple[torch.nn.Module, list[Any]]:
    torch.manual_seed(0)
    with selecting(dict.fromkeys(AUTO, backend)):
        if kind == "transformer":
            mixer = partial(Attention, num_heads=8, num_kv_heads=2, head_dim=64, qk_norm=True)
            layer: torch.nn.Module = TransformerLayer(256, mixer=mixer, mlp=partial(SwiGLU, hidden_dim=640))
        else:
            layer = DiTLayer(1152, mixer=partial(Attention, num_heads=16, bias=True), mlp=MLP)
    layer = layer.to(device, torch.bfloat16)
    rest = Rope(64, 1e4)(torch.arange(200, device=device)) if kind == "transformer" else randn(3, 1152).to(device, torch.bfloat16)
    return layer, [rest]


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["transformer", "dit"])
def test_layers(kind: str, compiled: bool, checkpointed: bool, device: torch.device) -> None:
    """A layer with the kernels, compiled and checkpointed as `parallelize` does it, is the layer without."""
    dim = 256 if kind == "transformer" else 1152
    x, grad = (randn(3, 200, dim, seed=i).to(device, torch.bfloat16) for i in range(2))
    results = []
    for backend in ("torch", "triton"):
        layer, rest = layer_of(kind, backend, device)
        if checkpointed:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if compiled and backend == "triton":
            torch.compiler.reset()
            layer.compile()
        leaf = x.clone().requires_grad_()
        out = layer(leaf, *rest)
        out.backward(grad)
        # softmax ignores what all keys have in common: the gradient of their bias is noise
        grads = [p.grad for name, p in layer.named_parameters() if name != "mixer.k_proj.bias"]
        results.append([out.detach(), leaf.grad, *grads])
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert error(ours, theirs.double()) <= 2e-2


def test_what_is_in_use() -> None:
    choices = dict.fromkeys(AUTO, "auto")
    wanted = " ".join(f"{op}={'triton' if wins else 'torch'}" for op, wins in AUTO.items())
    assert in_use(choices, "cuda", "bf16") == f"kernels: {wanted}"
    with pytest.raises(UserError, match="kernels.rope = triton"):
        in_use({"rope": "triton"}, "cuda", "fp64")
