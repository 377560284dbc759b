"""On an NVIDIA GPU: every backend of attention against float64, and documents of a row that never see each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from l3m_like.kernels import flash_attn_4
from l3m_like.kernels.attention import attention, key_copies, short_takes
from l3m_like.kernels.rope import joint_qk_norm_rope
from l3m_like.kernels.short_attention import joint_short_attention
from l3m_like.layers import AttentionMask, choose_backend, lower

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
    pytest.mark.timeout(300),
]
ROWS, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 512, 4, 2, 64
PLAIN = ("full", "causal")
PACKED = ("documents", "full documents", "window", "windows in documents")
OTHER = ("prefix", "staged in documents")
#: backend: the masks it is exact for
EXACT = {"flash": PLAIN, "cudnn": PLAIN, "varlen": PLAIN + PACKED, "flex": PLAIN + PACKED + OTHER}
if flash_attn_4.is_installed():
    EXACT["flash_attn"] = PLAIN + PACKED


def documents() -> tuple[Tensor, Tensor]:
    """Document of every place [ROWS, LENGTH], -1 at the end of the first row; and all borders."""
    lengths = [[100, 1, 37, 300], [250, 262]]
    ids = torch.full((ROWS, LENGTH), -1, dtype=torch.int32)
    borders, number = [0], 0
    for row, some in enumerate(lengths):
        start = 0
        for length in some:
            ids[row, start : start + length] = number
            start, number = start + length, number + 1
            borders.append(row * LENGTH + start)
        if start < LENGTH:
            borders.append((row + 1) * LENGTH)
    return ids, torch.tensor(borders, dtype=torch.int32)


def mask_of(name: str) -> AttentionMask:
    ids, borders = (x.cuda() for x in documents())
    stages = (torch.arange(LENGTH) // 16).expand(ROWS, LENGTH).contiguous().cuda()
    return {
        "full": AttentionMask("full"),
        "causal": AttentionMask("causal"),
        "window": AttentionMask("causal", window=50),
        "documents": AttentionMask("causal", ids, cu_seqlens=borders),
        "full documents": AttentionMask("full", ids, cu_seqlens=borders),
        "windows in documents": AttentionMask("causal", ids, cu_seqlens=borders, window=20),
        "prefix": AttentionMask("prefix", prefix_lengths=torch.tensor([77, 300]).cuda()),
        "staged in documents": AttentionMask("staged", ids, stages=stages),
    }[name]


def inputs(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [torch.randn(ROWS, LENGTH, h, WIDTH, generator=generator, dtype=torch.float64).cuda().to(dtype) for h in heads]


def results(mask: AttentionMask, backend: str, qkv: Sequence[Tensor]) -> list[Tensor]:
    """Output and gradients, where somebody attends."""
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    lowered = lower(mask, backend, ROWS, LENGTH, LENGTH, leaves[0].device)
    call = torch.compile(attention, dynamic=False) if backend == "flex" else attention  # as in a compiled layer
    out = call(*leaves, lowered)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    if mask.document_ids is not None:
        live = (mask.document_ids >= 0)[..., None, None]
        weight, out = weight * live, torch.where(live, out, 0)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("backend", "kind"), [(backend, kind) for backend, kinds in EXACT.items() for kind in kinds])
def test_error_in_bf16(backend: str, kind: str) -> None:
    """Output and gradients: at most twice the error of scaled_dot_product_attention with a table of pairs."""
    torch.compiler.reset()
    qkv, mask = inputs(), mask_of(kind)
    exact = results(mask, "reference", [x.double() for x in qkv])
    theirs, ours = results(mask, "sdpa", qkv), results(mask, backend, qkv)
    for number, (a, b, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert a.isfinite().all() and error(a, e) <= 2 * error(b, e), number


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("length", "width"), [(256, 72), (256, 64), (197, 64), (65, 72)])
def test_short_rows(length: int, width: int, dtype: torch.dtype) -> None:
    """Of separate tensors and of one, in five heads for a block: errors at most twice SDPA's, the same bits every time."""
    generator = torch.Generator("cuda").manual_seed(0)
    joint = torch.randn(90, length, 3, 8, width, generator=generator, device="cuda").to(dtype)
    weight = torch.randn(90, length, 8, width, generator=generator, device="cuda").to(dtype)

    def found(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).clone().requires_grad_() for x in joint.unbind(2)]
        out = attention(*leaves, lower(AttentionMask("full"), backend, 90, length, length, joint.device))
        return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(dtype))]

    chosen = choose_backend("auto", AttentionMask("full"), length, length, width, dtype, joint.device)
    assert chosen == ("short" if short_takes(length, width, False, joint.device) else "cudnn")
    exact, theirs, ours = found("reference", torch.float64), found("sdpa", dtype), found("short", dtype)
    for number, (a, b, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert a.isfinite().all() and error(a, e) <= 2 * error(b, e), number
    assert all(torch.equal(a, b) for a, b in zip(ours, found("short", dtype), strict=True))
    # of one tensor; the gradient of what was added to it in all places is the sum of its gradient (of the keys: 0)
    leaf, bias = joint.detach().clone().requires_grad_(), torch.zeros(3 * 8 * width, device="cuda", requires_grad=True)
    out = torch.compile(joint_short_attention, fullgraph=True)(leaf, bias)
    gradient, of_bias = torch.autograd.grad(out, (leaf, bias), weight)
    assert torch.equal(out, ours[0]) and all(torch.equal(a, b) for a, b in zip(gradient.unbind(2), ours[1:], strict=True))
    (alone,) = torch.autograd.grad(joint_short_attention(leaf), leaf, weight)
    assert torch.equal(alone, gradient)
    of_q, of_k, of_v = of_bias.view(3, 8, width)
    for mine, a, e in ((of_q, theirs[1], exact[1]), (of_v, theirs[3], exact[3])):
        assert error(mine, e.sum((0, 1))) <= 2 * error(a.double().sum((0, 1)), e.sum((0, 1)))
    assert not of_k.any() and exact[2].sum((0, 1)).norm() <= 1e-9 * exact[2].norm()


@pytest.mark.skipif(not flash_attn_4.is_installed(), reason="flash-attn-4 is not installed")
def test_copies_of_keys() -> None:
    """Keys that two query heads share, given as two copies, compiled: errors at most twice SDPA's."""
    torch.compiler.reset()
    generator = torch.Generator("cuda").manual_seed(0)
    qkv, weight = (torch.randn(8, 2048, heads, 128, generator=generator, device="cuda") for heads in (16 + 8 + 8, 16))
    angle = torch.rand(1, 2048, 128, generator=generator, device="cuda") * 6
    norms = [torch.rand(128, generator=generator, device="cuda") + 0.5 for _ in range(2)]

    def found(backend: str, dtype: torch.dtype) -> list[Tensor]:
        mask = lower(AttentionMask("causal"), backend, 8, 2048, 2048, qkv.device)
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in (qkv, *norms)]
        cos, sin = (x.to(torch.promote_types(dtype, torch.float32)) for x in (angle.cos(), angle.sin()))
        copies = key_copies(leaves[0], 8, mask)
        assert copies == (2 if backend == "flash_attn" else 1)

        def call(joint: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
            return attention(*joint_qk_norm_rope(joint, 8, cos, sin, q_weight, k_weight, 1e-6, copies=copies), mask)

        call = torch.compile(call, fullgraph=True) if backend == "flash_attn" else call
        out = call(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, weight.bfloat16().to(dtype))]

    exact, theirs, ours = found("sdpa", torch.float64), found("sdpa", torch.bfloat16), found("flash_attn", torch.bfloat16)
    for number, (a, b, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert a.isfinite().all() and error(a, e) <= 2 * error(b, e), number


@pytest.fixture
def in_one_order() -> Iterator[None]:
    """The backwards of varlen and of masked SDPA otherwise sum by atomic additions, in the order of arrival."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["documents", "full documents"])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *((backend, dtype) for backend in ("reference", "sdpa") for dtype in (torch.float64, torch.float32, torch.bfloat16)),
        ("varlen", torch.bfloat16),
        ("flex", torch.float32),
        ("flex", torch.bfloat16),
    ],
    ids=str,
)
def test_documents_are_isolated_bitwise(backend: str, dtype: torch.dtype, kind: str, in_one_order: None) -> None:
    """Other tokens, and other gradients, in all documents but one change no bit of that one's output and gradients."""
    torch.compiler.reset()
    mask = mask_of(kind)
    inside = mask.document_ids == 3
    qkv = inputs(dtype)
    changed = [torch.where(inside[..., None, None], x, 3 - x) for x in qkv]
    for a, b in zip(results(mask, backend, qkv), results(mask, backend, changed), strict=True):
        assert torch.equal(a[inside], b[inside]) and not torch.equal(a[~inside], b[~inside])
        assert a.isfinite().all() and b.isfinite().all()
