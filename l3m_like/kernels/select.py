"""Which version of each operation a run uses: the `kernels` section of its config.

Layers ask ``selected(op)`` when they are built and keep the answer; ``RunConfig.instantiate`` builds them within
``selecting(...)``. Imports no torch, since the config imports it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from l3m_like.core.errors import UserError, did_you_mean

#: versions of the operations that have a Triton kernel
BACKENDS = ("auto", "torch", "triton")

#: ``{op: whether "auto" takes Triton on an NVIDIA GPU}``: forward and backward together, measured on an H200 (2026-11-22) against
#: the compiled reference; where the two are even, ours also serves units that are not compiled
AUTO = {
    "rms_norm": True,  # 0.91 to 0.96 of its time (1.1 for rows of 1024)
    "modulated_norm": True,  # 0.41 to 0.65
    "rope": True,  # 0.76, with QK-norm
    "gelu": True,  # 0.83 to 0.90
    "swiglu": True,  # 1.00
    "embedding": True,  # of the gradient: one pass after sorting, where torch makes three; not timed alone
    "random": True,  # one kernel of 150, which are not compiled; float64 as well
}

NO_TRITON = "kernels.{} = triton: it needs an NVIDIA GPU, Triton and no float64. Write auto or torch."

_choices: ContextVar[Mapping[str, str]] = ContextVar("kernels")


@contextmanager
def selecting(choices: Mapping[str, str]) -> Iterator[None]:
    """Layers that are built within it use ``choices``, ``{op: name of a version}``."""
    token = _choices.set(choices)
    try:
        yield
    finally:
        _choices.reset(token)


def selected(op: str) -> str:
    """The version of ``op`` that a layer built now uses: "auto" outside of ``selecting``."""
    return _choices.get({}).get(op, "auto")


def resolve(op: str, backend: str, *, able: bool) -> bool:
    """Whether ``backend`` ("auto", "torch" or "triton") of ``op`` is the Triton kernel, where that can run or cannot.

    Raises:
        UserError: no such backend; "triton" where it cannot run.
    """
    if backend == "auto":
        return able and AUTO[op]
    if backend not in BACKENDS:
        raise UserError(f"no backend '{backend}' of {op}. {did_you_mean(backend, BACKENDS)}")
    if backend == "triton" and not able:
        raise UserError(NO_TRITON.format(op))
    return backend == "triton"


def in_use(choices: Mapping[str, str], device: str, precision: str) -> str:
    """One line: what every operation of ``choices`` is on ``device`` ("cuda") in ``precision`` (of `parallel`).

    Raises:
        UserError: an explicit choice that cannot run there.
    """
    there = device == "cuda" and _has_triton()
    able = there and precision != "fp64"
    names = dict(choices)
    for op in (op for op in AUTO if op in names):
        names[op] = "triton" if resolve(op, names[op], able=there if op == "random" else able) else "torch"
    if names.get("linear_cross_entropy") == "triton" and not able:
        raise UserError(NO_TRITON.format("linear_cross_entropy"))
    if names.get("linear_cross_entropy") == "auto":
        names["linear_cross_entropy"] = "triton" if able else "torch"
    if names.get("attention") == "auto":
        del names["attention"]  # it depends on the mask, and is told once it has run
    return "kernels: " + " ".join(f"{op}={name}" for op, name in names.items())


def _has_triton() -> bool:
    from l3m_like.kernels.launch import HAS_TRITON

    return HAS_TRITON
