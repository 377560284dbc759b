"""The quintic Newton-Schulz iteration, which moves every singular value of a matrix towards 1.

``X <- aX + bAX + cA^2 X`` with ``A = X X^T`` and (a, b, c) = (3.4445, -4.7750, 2.0315), after X was divided by its Frobenius norm
(Keller Jordan, https://kellerjordan.github.io/posts/muon/). Five steps bring singular values from 0.01 .. 1 to about 0.3 .. 1.2.

Half-precision matrices are computed in float16 with float32 sums, which is as fast as bfloat16 and rounds 8 times as finely.
Measured on a CPU, matrices of 256 x 256, 512 and 768 (a Gaussian; a power law with condition 1e4; rank 16 and rank 1 plus noise;
one row 1000 times as large), as the deviation from float64 in the Frobenius norm, and the largest and smallest singular value:

    bfloat16, as published        0.6 % .. 68 %     off by up to 0.008, 0.019
    bfloat16, sums in float32     0.4 % .. 43 %     off by up to 0.004, 0.014
    "symmetric", float16          0.05 % .. 5.4 %   off by up to 0.0003, 0.0021
    "gram", float16               0.1 % .. 5.4 %    off by up to 0.0012, 0.0007
"""

from __future__ import annotations

import torch
from torch import Tensor

from l3m_like.kernels.scale import scaled, scaled_reference

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7
#: float16 has 6e-8 as its smallest number: matrices are kept 32 times as large, their squares 1024 times
_SIZE = 32.0
#: steps on a Gram matrix before it is formed anew from X
_SPAN = 3


def newton_schulz_reference(x: Tensor, *, steps: int = 5) -> Tensor:
    """The definition, in the dtype of ``x``. Arguments and result as ``newton_schulz``."""
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def newton_schulz(x: Tensor, *, steps: int = 5, method: str | None = None) -> Tensor:
    """Orthogonalise every matrix of ``x``.

    Args:
        x: [N, rows, cols]; float64 and float32 are computed as such, bfloat16 and float16 in float16 with float32 sums.
        steps: of the iteration.
        method: "plain", "symmetric" or "gram" (see ``method_for``). None: the one for this shape and dtype.

    Returns:
        Tensor like ``x``; zeros stay zeros.
    """
    out, size = newton_schulz_scaled(x, steps=steps, method=method)
    return out if size == 1.0 else _scaled(out, torch.full((), 1 / size, dtype=_wide(x), device=x.device), x.dtype)


def newton_schulz_scaled(
    x: Tensor, *, steps: int = 5, method: str | None = None, norm: Tensor | None = None
) -> tuple[Tensor, float]:
    """The result of ``newton_schulz`` as it is computed: how many times too large, and not in the dtype of ``x``.

    ``norm`` [N, 1, 1]: of the matrices, where it is known.
    """
    method = method_for(x.shape[-2], x.shape[-1], x.dtype) if method is None else method
    if method == "plain":
        return newton_schulz_reference(x, steps=steps), 1.0
    norm = torch.linalg.matrix_norm(x, keepdim=True, dtype=_wide(x)) if norm is None else norm
    x = _scaled(x, _SIZE / (norm + EPS), torch.float16 if x.dtype.itemsize == 2 else x.dtype)
    return (_gram(x, steps) if method == "gram" else _symmetric(x, steps)), _SIZE


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` [N, rows, cols] times ``factor``, in ``dtype``: one pass where both are half precision on an NVIDIA GPU."""
    fast = x.is_cuda and x.dtype.itemsize == 2 and x.is_contiguous()
    return (scaled if fast else scaled_reference)(x, factor, dtype)


def method_for(rows: int, cols: int, dtype: torch.dtype) -> str:
    """How a matrix is iterated.

    "plain" is the definition, for float32 and float64. "symmetric" computes half of each symmetric product. "gram" iterates on
    ``X X^T`` alone and multiplies X at the end of every three steps, which is less from a ratio of two on.
    """
    if dtype.itemsize > 2:
        return "plain"
    return "gram" if max(rows, cols) >= 2 * min(rows, cols) else "symmetric"


def newton_schulz_flops(rows: int, cols: int, *, steps: int = 5, method: str) -> int:
    """FLOPs of one matrix; a symmetric product counts half."""
    n, m = min(rows, cols), max(rows, cols)
    if method == "plain":
        return steps * (4 * n * n * m + 2 * n**3)
    if method == "symmetric":
        return steps * (3 * n * n * m + n**3)
    total = 0
    for span in _spans(steps):
        total += 3 * n * n * m  # the Gram matrix, and Q X
        total += (span + (span - 1) + 2 * (span - 1)) * n**3  # P, Q, and A for the next step
    return total


def _symmetric(x: Tensor, steps: int) -> Tensor:
    """x [N, rows, cols], ``_SIZE`` times as large as in the definition; so is the result.

    A tall matrix is not transposed: its Gram matrix is that of the columns, and the polynomial multiplies from the right.
    """
    tall = x.shape[1] > x.shape[2]
    a, b, c = COEFFICIENTS
    square = _SIZE**2
    for _ in range(steps):
        gram = _gram_matrix(x)
        polynomial = _product(gram, gram, alpha=c / square**2, add=gram, beta=b / square)
        x = torch.baddbmm(x, x, polynomial, beta=a) if tall else torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _gram(x: Tensor, steps: int) -> Tensor:
    """As ``_symmetric``, by ``A <- P A P`` and ``Q <- P Q`` with ``P = aI + bA + cA^2``: all of these commute and are symmetric.

    Rounding leaves A with small negative eigenvalues, which grow by a^2 = 11.9 per step where X itself would keep them positive:
    without a new start the fifth step gives singular values of thousands in bfloat16 and of 2 in float16. So A is formed anew
    after three steps, in float16: the deviations are then those of ``_symmetric`` (see above). In bfloat16 they would be at most
    1.6 times those of its bfloat16 form, in the spectral norm.
    """
    a, b, c = COEFFICIENTS
    square = _SIZE**2
    tall = x.shape[1] > x.shape[2]
    for span in _spans(steps):
        gram = _gram_matrix(x)
        q: Tensor | None = None
        for step in range(span):
            p = _product(gram, gram, alpha=c / square**2, add=gram, beta=b / square, diagonal=a)
            q = p if q is None else _product(p, q)
            if step < span - 1:
                gram = _product(_product(p, gram), p)
        assert q is not None
        x = torch.bmm(x, q) if tall else torch.bmm(q, x)
    return x


def _gram_matrix(x: Tensor) -> Tensor:
    """``x`` times its transpose, of the shorter side."""
    short = x.mT if x.shape[1] > x.shape[2] else x
    return _product(short, short)


def _spans(steps: int) -> list[int]:
    return [min(_SPAN, steps - done) for done in range(0, steps, _SPAN)]


def _product(
    a: Tensor, b: Tensor, *, alpha: float = 1.0, add: Tensor | None = None, beta: float = 0.0, diagonal: float = 0.0
) -> Tensor:
    """``symmetric_matmul`` where it is fast: in half precision on an NVIDIA GPU; elsewhere the whole product."""
    if a.is_cuda and a.dtype.itemsize == 2:
        from l3m_like.kernels.symmetric_matmul import symmetric_matmul  # imports Triton, which a CPU need not have

        return symmetric_matmul(a, b, alpha=alpha, add=add, beta=beta, diagonal=diagonal)
    out = torch.bmm(a, b.mT) * alpha if add is None else torch.baddbmm(add, a, b.mT, beta=beta, alpha=alpha)
    if diagonal:
        out.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return out
