"""Time of the kernels on this GPU, forward and backward together, beside the compiled reference and Liger (where installed)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from l3m_like.kernels import launch
from l3m_like.kernels.embedding import embedding
from l3m_like.kernels.gelu import _bias_gelu
from l3m_like.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from l3m_like.kernels.modulated_norm import gated_modulated_norm, gated_residual, modulated_norm_and_residual
from l3m_like.kernels.rms_norm import rms_norm, rms_norm_and_residual
from l3m_like.kernels.rope import joint_qk_norm_rope, qk_norm_rope
from l3m_like.kernels.swiglu import swiglu

EPS = 1e-6


@dataclass
class Case:
    """One operation at one shape.

    Attributes:
        moved: bytes that any version must read and write, forward and backward (0: not bound by memory).
        flops: of forward and backward, for matmuls.
        inputs: tensors; the floating-point ones of which gradients are wanted require them.
        ours, reference: of the inputs. liger: makes such a function, or raises ImportError.
    """

    op: str
    shape: str
    moved: int
    inputs: list[Tensor]
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    liger: Callable[[], Callable[..., Any]] | None = None
    flops: int = 0


def cases() -> Iterator[Case]:
    """In bf16, at the sizes of Qwen3-1.7B (2048), Qwen3-0.6B (1024) and SiT-XL (1152); made one after the other."""
    for rows, dim in ((32768, 2048), (16384, 1024)):
        size, weight = rows * dim * 2, _randn(dim)
        yield Case(
            "rms_norm", f"{rows}x{dim}", 5 * size, [_randn(rows, dim), weight],
            lambda x, w: rms_norm(x, w, EPS, backend="triton"),
            lambda x, w: rms_norm(x, w, EPS, backend="torch"),
            _liger_rms_norm,
        )  # fmt: skip
        yield Case(
            "rms_norm and residual", f"{rows}x{dim}", 6 * size, [_randn(rows, dim), weight],
            lambda x, w: rms_norm_and_residual(x, w, EPS, backend="triton"),
            lambda x, w: rms_norm_and_residual(x, w, EPS, backend="torch"),
        )  # fmt: skip
        yield Case(
            "rms_norm of sum", f"{rows}x{dim}", 8 * size, [_randn(rows, dim), _randn(rows, dim), weight],
            lambda x, r, w: rms_norm(x, w, EPS, r, backend="triton"),
            lambda x, r, w: rms_norm(x, w, EPS, r, backend="torch"),
            _liger_add_rms_norm,
        )  # fmt: skip
    for batch in (64, 256):
        shape = (batch, 256, 1152)
        size = batch * 256 * 1152 * 2
        shift, scale, gate = (_randn(batch, 1, 1152) for _ in range(3))
        yield Case(
            "modulated_norm", f"{batch}x256x1152", 6 * size, [_randn(*shape), shift, scale],
            lambda x, shift, scale: modulated_norm_and_residual(x, shift, scale, EPS, backend="triton"),
            lambda x, shift, scale: modulated_norm_and_residual(x, shift, scale, EPS, backend="torch"),
        )  # fmt: skip
        yield Case(
            "modulated_norm of sum", f"{batch}x256x1152", 10 * size,
            [_randn(*shape), gate, _randn(*shape), shift, scale, _randn(1152)],
            lambda x, gate, branch, shift, scale, bias: gated_modulated_norm(
                x, gate, branch, shift, scale, EPS, bias, backend="triton"
            ),
            lambda x, gate, branch, shift, scale, bias: gated_modulated_norm(
                x, gate, branch, shift, scale, EPS, bias, backend="torch"
            ),
        )  # fmt: skip
        yield Case(
            "gated sum", f"{batch}x256x1152", 6 * size, [_randn(*shape), gate, _randn(*shape), _randn(1152)],
            lambda x, gate, branch, bias: gated_residual(x, gate, branch, bias, backend="triton"),
            lambda x, gate, branch, bias: gated_residual(x, gate, branch, bias, backend="torch"),
        )  # fmt: skip
    q, k = _randn(8, 4096, 16, 128), _randn(8, 4096, 8, 128)
    tables = [torch.randn(1, 4096, 128, device="cuda") for _ in range(2)]
    yield Case(
        "norm and rope", "8x4096x(16+8)x128", 5 * (q.numel() + k.numel()) * 2, [q, k, *tables, _randn(128), _randn(128)],
        lambda q, k, cos, sin, wq, wk: qk_norm_rope(q, k, cos, sin, wq, wk, EPS, backend="triton"),
        lambda q, k, cos, sin, wq, wk: qk_norm_rope(q, k, cos, sin, wq, wk, EPS, backend="torch"),
        _liger_norm_rope,
    )  # fmt: skip
    yield Case(
        "norm and rope, one gradient", "8x4096x(16+8+8)x128", (5 * (q.numel() + k.numel()) + 2 * k.numel()) * 2,
        [_randn(8, 4096, 32, 128), *tables, _randn(128), _randn(128)],
        lambda qkv, cos, sin, wq, wk: joint_qk_norm_rope(qkv, 8, cos, sin, wq, wk, EPS, backend="triton"),
        lambda qkv, cos, sin, wq, wk: joint_qk_norm_rope(qkv, 8, cos, sin, wq, wk, EPS, backend="torch"),
    )  # fmt: skip
    ids = torch.randint(0, 151936, (16384,), device="cuda")
    table = torch.nn.Parameter(torch.zeros(151936, 2048, device="cuda", dtype=torch.bfloat16))
    yield Case(
        "embedding", "16384 of 151936x2048", (151936 + 4 * 16384) * 2048 * 2, [table],
        lambda table: embedding(ids, table, backend="triton"),
        lambda table: embedding(ids, table, backend="torch"),
    )  # fmt: skip
    for tanh in (True, False):
        yield Case(
            "gelu, tanh" if tanh else "gelu", "65536x4608", 5 * 65536 * 4608 * 2, [_randn(65536, 4608), _randn(4608)],
            lambda x, bias, tanh=tanh: _bias_gelu(x, bias, tanh),
            lambda x, bias, tanh=tanh: F.gelu(x + bias, approximate="tanh" if tanh else "none"),
        )  # fmt: skip
    yield Case(
        "swiglu", "32768x6144", 8 * 32768 * 6144 * 2, [_randn(32768, 6144), _randn(32768, 6144)],
        lambda gate, up: swiglu(gate, up, backend="triton"),
        lambda gate, up: swiglu(gate, up, backend="torch"),
        _liger_swiglu,
    )  # fmt: skip
    yield Case(
        "swiglu of halves", "32768x(2x6144)", 8 * 32768 * 6144 * 2, [_randn(32768, 2 * 6144)],
        lambda both: swiglu(both, backend="triton"), lambda both: swiglu(both, backend="torch"),
    )  # fmt: skip
    hidden, weight = _randn(16384, 2048), torch.nn.Parameter(torch.randn(151936, 2048, device="cuda").mul(0.02).bfloat16())
    targets = torch.randint(0, 151936, (16384,), device="cuda")
    yield Case(
        "linear_cross_entropy", "16384x2048x151936", 0, [hidden, weight, targets],
        lambda *x: linear_cross_entropy(*x).sum(), lambda *x: linear_cross_entropy_reference(*x)[0].sum(),
        _liger_linear_cross_entropy, 6 * 16384 * 2048 * 151936,
    )  # fmt: skip


def measure() -> list[dict[str, Any]]:
    """A row per case: milliseconds of every version (None: not installed), and what of the device it makes use."""
    rows = []
    for case in cases():
        torch.compiler.reset()
        ours = milliseconds(case, case.ours)
        row: dict[str, Any] = {"op": case.op, "shape": case.shape, "ours": ours}
        row["compiled"] = _attempt(case, partial(torch.compile, case.reference, dynamic=False))
        row["liger"] = None if case.liger is None else _attempt(case, case.liger)
        row["tb_per_s"] = case.moved / ours / 1e9 if case.moved else None
        row["tflops"] = case.flops / ours / 1e9 if case.flops else None
        rows.append(row)
        torch.cuda.empty_cache()
    return rows


def milliseconds(case: Case, call: Callable[..., Any]) -> float:
    """Median time of the forward and backward on the device: in a CUDA graph, so without that of launching from Python."""
    from triton.testing import do_bench, do_bench_cudagraph

    leaves = [x for x in case.inputs if x.requires_grad]
    grads: list[Tensor] = []

    def step() -> None:
        out = call(*case.inputs)
        outs = out if isinstance(out, tuple) else (out,)
        if not grads:
            grads.extend(torch.randn_like(o) for o in outs)
        torch.autograd.grad(outs, leaves, grads)

    step()  # compiles
    torch.cuda.synchronize()
    try:
        return do_bench_cudagraph(step, return_mode="median")
    except RuntimeError:  # it cannot be captured
        torch.cuda.synchronize()
        return do_bench(step, return_mode="median")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of ``measure`` as text."""
    lines = [f"{'forward + backward, ms':28} {'shape':20} {'ours':>8} {'compiled':>8} {'liger':>8}   ours/compiled"]
    for row in rows:
        times = " ".join(f"{row[name]:8.3f}" if row[name] is not None else f"{'-':>8}" for name in ("ours", "compiled", "liger"))
        ratio = f"{row['ours'] / row['compiled']:.2f}" if row["compiled"] else "-"
        rate = f"{row['tb_per_s']:.2f} TB/s" if row["tb_per_s"] else f"{row['tflops']:.0f} TFLOP/s"
        lines.append(f"{row['op']:28} {row['shape']:20} {times}   {ratio:>5}   {rate}")
    return "\n".join(lines)


#: values that ``sweep`` tries, one setting at a time
CHOICES: dict[str, tuple[int, ...]] = {
    "elements": (128, 256, 512, 1024),
    "stages": (1, 2, 3, 4),
    "programs": (1, 2, 3, 4, 6, 8),
    "iterations": (1, 2, 4, 8, 16),
}
_SUMS = ("elements", "stages", "programs")
#: ``{case: {kernel: the settings that it has}}``
_SWEPT: dict[str, dict[str, tuple[str, ...]]] = {
    "rms_norm of sum": {"rms_norm": ("elements",), "rms_norm_backward": _SUMS},
    "modulated_norm": {"modulated_norm_backward": _SUMS},
    "modulated_norm of sum": {"modulated_norm": ("elements", "stages", "iterations"), "gated_modulated_norm_backward": _SUMS},
    "norm and rope": {"rope": ("elements",), "rope_backward": _SUMS},
    "gelu, tanh": {"gelu": ("elements",), "gelu_backward": _SUMS},
    "swiglu": {"swiglu": ("elements",), "swiglu_backward": ("elements",)},
}


def sweep() -> Iterator[str]:
    """A line per kernel, case and setting: the time of our version with other values of ``launch.TUNED``. It has the device to
    itself: between matrix products that draw all of the power, clocks are lower and other values may win (docs/benchmarks.md)."""
    for case in cases():
        for kernel, settings in _SWEPT.get(case.op, {}).items():
            before = launch.TUNED[kernel]
            for setting in settings:
                found = []
                for value in CHOICES[setting]:
                    launch.TUNED[kernel] = dataclasses.replace(before, **{setting: value})
                    found.append(f"{value}: {milliseconds(case, case.ours):.4f}")
                launch.TUNED[kernel] = before
                yield f"{kernel:29} {case.shape:20} {setting:10} (now {getattr(before, setting)})  {'  '.join(found)}"


#: batches of Qwen3-1.7B's matrices as Muon has them in work in one process
MUON_SHAPES = ((28, 2048, 2048), (56, 1024, 2048), (19, 6144, 2048), (14, 2048, 6144))


def muon_rows() -> Iterator[dict[str, Any]]:
    """A row per part of a Muon step: milliseconds, and TB/s or TFLOP/s. Products count whole, iterations what they compute."""
    from triton.testing import do_bench

    from l3m_like.kernels.muon import apply_pass, momentum_pass
    from l3m_like.kernels.newton_schulz import newton_schulz_flops, newton_schulz_scaled
    from l3m_like.kernels.scale import scaled
    from l3m_like.kernels.symmetric_matmul import symmetric_matmul

    def row(op: str, shape: Sequence[int], call: Callable[[], Any], *, moved: int = 0, flops: int = 0) -> dict[str, Any]:
        time = do_bench(call, return_mode="median")
        rates = {"tb_per_s": moved / time / 1e9 or None, "tflops": flops / time / 1e9 or None}
        return {"op": op, "shape": "x".join(map(str, shape)), "ours": time, **rates}

    for shape in MUON_SHAPES:
        count, rows, cols = shape
        size, short, long = count * rows * cols, min(rows, cols), max(rows, cols)
        good, one = torch.zeros((), device="cuda"), torch.ones((), device="cuda")
        grads = [torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        momentum = torch.zeros(shape, device="cuda")
        move = partial(
            momentum_pass, grads, momentum, mu=0.95, nesterov=True, dtype=torch.bfloat16, grad_scale=one, found_inf=good
        )
        yield row("momentum", shape, move, moved=12 * size)
        update, norm = move()
        yield row("scale", shape, partial(scaled, update, 1 / norm, torch.float16), moved=4 * size)
        weights, copies = [m.clone() for m in momentum], [torch.empty_like(g) for g in grads]
        del grads, momentum
        half = scaled(update, 1 / norm, torch.float16)
        put = partial(apply_pass, weights, half, rate=1e-3, decay=1e-3, found_inf=good, copies=copies)
        yield row("apply", shape, put, moved=12 * size)
        del weights, copies, put
        for method in ("symmetric", "gram"):
            flops = count * newton_schulz_flops(rows, cols, method=method)
            call = partial(newton_schulz_scaled, update, method=method, norm=norm)
            yield row(f"newton_schulz, {method}", shape, call, flops=flops)
        wide = half.mT if rows > cols else half
        yield row("X X^T, half", shape, partial(symmetric_matmul, wide, wide), flops=2 * count * short**2 * long)
        yield row("X X^T, bmm", shape, partial(torch.bmm, wide, wide.mT), flops=2 * count * short**2 * long)
        gram = symmetric_matmul(wide, wide)
        add = partial(symmetric_matmul, gram, gram, alpha=2.0, add=gram, beta=-4.0, diagonal=3.0)
        yield row("bA + cA A, half", gram.shape, add, flops=2 * count * short**3)
        whole = partial(torch.baddbmm, gram, gram, gram, alpha=2.0, beta=-4.0)
        yield row("bA + cA A, baddbmm", gram.shape, whole, flops=2 * count * short**3)
        apply = partial(torch.bmm, half, gram) if rows > cols else partial(torch.bmm, gram, half)
        yield row("Q X, bmm", shape, apply, flops=2 * count * short**2 * long)


def muon_line(row: dict[str, Any]) -> str:
    """A row of ``muon_rows`` as text."""
    rate = f"{row['tb_per_s']:.2f} TB/s" if row["tb_per_s"] else f"{row['tflops']:.0f} TFLOP/s"
    return f"{row['op']:24} {row['shape']:14} {row['ours']:8.3f} ms   {rate}"


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def _attempt(case: Case, make: Callable[[], Callable[..., Any]]) -> float | None:
    try:
        return milliseconds(case, make())
    except (ImportError, RuntimeError, TypeError, AttributeError, ValueError) as error:  # not there, no memory, other arguments
        print(f"{case.op}: left out: {str(error).splitlines()[0][:150]}", flush=True)
        return None


# ---- Liger ---------------------------------------------------------------------------------------------------------------


def _liger_rms_norm() -> Callable[..., Any]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)


def _liger_add_rms_norm() -> Callable[..., Any]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return lambda x, r, w: LigerFusedAddRMSNormFunction.apply(x, r, w, EPS, 0.0, "llama", False)


def _liger_norm_rope() -> Callable[..., Any]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction

    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor) -> Any:
        q = LigerRMSNormFunction.apply(q, q_weight, EPS, 0.0, "llama", False).transpose(1, 2)
        k = LigerRMSNormFunction.apply(k, k_weight, EPS, 0.0, "llama", False).transpose(1, 2)
        return LigerRopeFunction.apply(q, k, cos, sin)

    return call


def _liger_swiglu() -> Callable[..., Any]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply


def _liger_linear_cross_entropy() -> Callable[..., Any]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight, targets: liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum")
