"""What the Triton kernels share: Triton itself or its absence, whether a call can use it, and the sizes of tiles."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.compiler.config as compiler_config
from torch import Tensor

from l3m_like.kernels.select import resolve

#: kernels run in Python, on tensors of the CPU: the tests without a GPU
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

#: torch comes without it on macOS and Windows; the references remain
HAS_TRITON = importlib.util.find_spec("triton") is not None

#: kernels can run in this process; elsewhere Triton is not imported, which takes seconds
_RUNS = HAS_TRITON and (torch.cuda.is_available() or INTERPRETED)

if _RUNS:
    import triton
    import triton.language as tl

    jit = triton.jit
else:
    triton = tl = None  # type: ignore[assignment]

    def jit(function: Any) -> Any:
        return function


# torch.compile's cache on disk knows the source of an operation's forward kernel, but neither that of its backward nor how they
# are launched: without this it would go on with kernels that have changed
compiler_config.cache_key_tag += hashlib.sha1(
    b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.[pc][yu]")))
).hexdigest()


def triton_op(name: str, *, mutates_args: tuple[str, ...]) -> Callable[[Callable[..., Any]], Any]:
    """``torch.library.triton_op`` where kernels run. To define one imports torch's compiler, which takes seconds; elsewhere only
    shapes are wanted, and the operation is a plain function of autograd."""
    if INTERPRETED:
        return functools.partial(_interpreted_op, name, mutates_args)
    return torch.library.triton_op(name, mutates_args=mutates_args) if _RUNS else _ShapesOnly


def _interpreted_op(name: str, mutates_args: tuple[str, ...], run: Callable[..., Any]) -> Any:
    """To torch.compile, which cannot look into a kernel that runs in Python, it is one operation."""
    op = torch.library.custom_op(name, run, mutates_args=mutates_args)
    op.register_fake(run)
    return op


def wrap_triton(kernel: Any) -> Any:
    """``torch.library.wrap_triton`` where kernels run, else a launch that does nothing; so it is without data to run on."""
    if INTERPRETED and torch._guards.detect_fake_mode() is None:
        return kernel
    return torch.library.wrap_triton(kernel) if _RUNS and not INTERPRETED else defaultdict(lambda: lambda *args, **kwargs: None)


class _ShapesOnly:
    def __init__(self, forward: Callable[..., Any]) -> None:
        self._run = forward

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        parts = {"forward": self._run, "setup_context": setup_context, "backward": backward}
        made: Any = type("ShapesOnly", (torch.autograd.Function,), {name: staticmethod(part) for name, part in parts.items()})
        self._run = made.apply

    def __call__(self, *args: Any) -> Any:
        return self._run(*args)


#: a norm holds whole rows in registers; wider ones are left to torch
WIDEST = 16384

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def use_triton(op: str, backend: str, x: Tensor, *others: Tensor | None, width: int = 1) -> bool:
    """Whether a call of ``op`` on ``x`` and ``others`` is its Triton kernel (a constant under torch.compile).

    float64 has the reference under every name. Tensors without data have the kernel in half precision alone, which is what an
    accelerator computes in, so that the memory that it needs is followed; ``width``: of the rows that must fit in registers.

    Raises:
        UserError: ``backend`` is "triton" and it cannot run, or is no backend.
    """
    if (x.is_meta and x.dtype.itemsize > 2) or any(t is not None and t.dtype == torch.float64 for t in (x, *others)):
        return False
    there = x.is_meta or (HAS_TRITON and (x.is_cuda or (INTERPRETED and backend == "triton")))
    return resolve(op, backend, able=there and x.dtype in _DTYPES and width <= WIDEST)


def power_of_2(size: int) -> int:
    """The smallest one that is at least ``size``."""
    return 1 << (size - 1).bit_length()


@jit
def load_row(ptr, start, inside, D: tl.constexpr, HEAD: tl.constexpr, REST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of D columns that begin at the elements ``start`` [ROWS, 1], as float32: [ROWS, HEAD] and [ROWS, REST] (see ``tile``);
    0 where ``inside`` [ROWS, 1] is false."""
    head, rest = tl.arange(0, HEAD)[None, :], HEAD + tl.arange(0, REST)[None, :]
    first = tl.load(ptr + start + head, mask=inside, other=0.0)
    second = tl.load(ptr + start + rest, mask=inside & (rest < D), other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@jit
def store_row(ptr, start, inside, first, second, D: tl.constexpr, HEAD: tl.constexpr, REST: tl.constexpr):  # type: ignore[no-untyped-def]
    """The counterpart of ``load_row``, in the dtype of ``ptr``."""
    head, rest = tl.arange(0, HEAD)[None, :], HEAD + tl.arange(0, REST)[None, :]
    tl.store(ptr + start + head, first.to(ptr.dtype.element_ty), mask=inside)
    tl.store(ptr + start + rest, second.to(ptr.dtype.element_ty), mask=inside & (rest < D))


if INTERPRETED or torch.version.hip is not None:  # which know no such machine code

    @jit
    def logistic(x):  # type: ignore[no-untyped-def]
        return 1.0 / (1.0 + tl.exp2(-x))

else:

    @jit
    def logistic(x):  # type: ignore[no-untyped-def]
        """``1 / (1 + 2^-x)`` in float32, to three units in the last place: three instructions, where exp and a division take 20,
        which show where the clock is low."""
        return tl.inline_asm_elementwise(
            "{.reg .f32 e; neg.f32 e, $1; ex2.approx.ftz.f32 e, e; add.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e;}",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@jit
def _add(a, b, c, d):  # type: ignore[no-untyped-def]
    return a + c, b + d


@jit
def sum_row(a, b):  # type: ignore[no-untyped-def]
    """Two sums over the columns at once, so that the warps wait for each other once: [ROWS, 1] each."""
    sum_a, sum_b = tl.reduce((a, b), 1, _add)
    return sum_a[:, None], sum_b[:, None]


@dataclass(frozen=True)
class Tuning:
    """How a kernel is cut up. ``elements``: of a tile per warp. ``programs``: per multiprocessor, of a kernel whose programs keep
    partial sums: no more than run at a time, so that all end together. ``iterations``: of a program's loop in a kernel that keeps
    none. ``stages``: loads of so many iterations are under way, if they fit."""

    elements: int = 512
    programs: int = 4
    iterations: int = 1
    stages: int = 1


#: ``{kernel: Tuning}``; ``python run/bench_kernels.py --sweep`` compares others
TUNED = {
    "rms_norm": Tuning(),
    "rms_norm_backward": Tuning(stages=3),
    "modulated_norm": Tuning(elements=1024, iterations=4, stages=3),
    "modulated_norm_backward": Tuning(stages=3, programs=6),
    "gated_modulated_norm_backward": Tuning(stages=3, programs=4),
    "rope": Tuning(elements=1024),
    "rope_backward": Tuning(programs=3, stages=3),
    "gelu": Tuning(elements=1024),
    "gelu_backward": Tuning(elements=256, programs=8, stages=4),
    "swiglu": Tuning(elements=256),
    "swiglu_backward": Tuning(elements=256),
}


def tile(dim: int, kernel: str) -> dict[str, int]:
    """Launch arguments of a kernel whose tiles are ROWS whole rows of ``dim``, each in two parts, as sizes of tensors are powers
    of two: HEAD columns, the largest one below ``dim``, and REST, the smallest that holds the others. (1152 columns are
    1024 + 128, where one tensor would have 2048.)"""
    head = max(1, power_of_2(dim) // 2)
    rest = power_of_2(max(1, dim - head))
    rows = max(1, 1024 // head)
    return {"HEAD": head, "REST": rest, "ROWS": rows, "num_warps": warps((head + rest) * rows, kernel)}


def warps(elements: int, kernel: str) -> int:
    """Warps for a tile of ``elements``."""
    wanted = max(1, elements // TUNED[kernel].elements)
    return min(16, 1 << (wanted.bit_length() - 1))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of ``device``; 1 where it is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def stages_that_fit(kernel: str, moved: int, device: torch.device) -> int:
    """``stages`` of ``kernel``, or fewer: what all of them but one load, ``moved`` bytes each, lies in shared memory."""
    wanted = TUNED[kernel].stages
    if device.type != "cuda":
        return wanted
    room = _shared_memory(device) - 8192  # which sums between warps take
    return max(1, min(wanted, 1 + room // max(1, moved)))


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program can have; torch does not know them of AMD's devices."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 65536)


def resident_programs(device: torch.device, kernel: str) -> int:
    """Programs of ``kernel`` on ``device``: the same number in every call, so that sums have one order."""
    return TUNED[kernel].programs * multiprocessors(device)


def rows_of(x: Tensor) -> Tensor:
    """``x`` [..., D] as [N, D] with neighbouring columns adjacent in memory; a view where that is possible."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()
