"""Backends of attention agree, in values and gradients; the choice of one is exact for the mask, or an error."""

from __future__ import annotations

import itertools
import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.kernels import attention as kernel
from l3m_like.kernels.attention import LoweredMask, attention, check_backend
from l3m_like.kernels.rope import joint_qk_norm_rope
from l3m_like.layers import Attention, AttentionMask, LayerMasks, choose_backend, lower
from l3m_like.layers.lora import LoRALinear

CPU = torch.device("cpu")
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, -1], [2, 2, 3, 3, 3, 3, 3]], dtype=torch.int32)
BORDERS = torch.tensor([0, 3, 6, 7, 9, 14, 14, 14], dtype=torch.int32)
STAGES = torch.tensor([[0, 0, 2, 2, 1, 1, 3], [0, 2, 2, 4, 1, 3, 3]])
MASKS = {
    "full": AttentionMask("full"),
    "causal": AttentionMask("causal"),
    "prefix": AttentionMask("prefix", prefix_lengths=torch.tensor([3, 5])),
    "window": AttentionMask("causal", window=3),
    "full window": AttentionMask("full", window=2),
    "documents": AttentionMask("causal", DOCUMENTS, cu_seqlens=BORDERS),
    "full documents": AttentionMask("full", DOCUMENTS, cu_seqlens=BORDERS),
    "windows in documents": AttentionMask("causal", DOCUMENTS, cu_seqlens=BORDERS, window=2),
    "prefix in documents": AttentionMask("prefix", DOCUMENTS, prefix_lengths=torch.tensor([5, 1])),
    "staged": AttentionMask("staged", stages=STAGES),
    "staged in documents": AttentionMask("staged", DOCUMENTS, stages=STAGES),
}


def inputs(kv_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (4, kv_heads, kv_heads)
    return [torch.randn(2, 7, h, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for h in heads]


def results(mask: AttentionMask, backend: str, qkv: list[Tensor]) -> list[Tensor]:
    """Output and gradients where somebody attends."""
    out = attention(*qkv, lower(mask, backend, 2, 7, 7, CPU))
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(out.dtype).view_as(out)
    if mask.document_ids is not None:
        live = (mask.document_ids >= 0)[..., None, None]
        weight, out = weight * live, out * live
    return [out, *(torch.autograd.grad((out * weight).sum(), qkv) if out.requires_grad else ())]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("kind", list(MASKS))
def test_equals_reference(kind: str, backend: str, kv_heads: int) -> None:
    qkv = inputs(kv_heads)
    if backend == "flex":  # its backward pass needs a GPU: tests/gpu/test_attention.py
        qkv = [x.detach() for x in qkv]
    for a, b in zip(results(MASKS[kind], backend, qkv), results(MASKS[kind], "reference", qkv), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in MASKS if "prefix" not in kind and "staged" not in kind])
def test_borders_and_window_as_flash_attention_takes_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a plain function with flash-attn's arguments, in its place."""

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal, window_size):  # type: ignore[no-untyped-def]
        left, right = window_size
        assert causal == (right == 0) and max_q == max_k == 7 and torch.equal(cu_q, cu_k)
        outs = []
        for start, stop in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
            assert 0 <= stop - start <= max_q
            place = torch.arange(stop - start)
            ahead = place[None, :] - place[:, None]
            allowed = ((ahead <= right) | (right < 0)) & ((-ahead <= left) | (left < 0))
            one = (x[None, start:stop] for x in (q, k, v))
            outs.append(attention(*one, LoweredMask("reference", allowed[None, None]))[0])
        return torch.cat(outs)

    def dense(q, k, v, causal):  # type: ignore[no-untyped-def]
        return attention(q, k, v, LoweredMask(causal=causal))

    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func, package.flash_attn_func = varlen, dense  # type: ignore[attr-defined]
    monkeypatch.setattr(kernel, "_FLASH_ATTN", ("flash_attn",))
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(kernel.importlib.util, "find_spec", lambda name: name == "flash_attn")
    kernel._flash_attn_package.cache_clear()
    qkv = inputs(2)
    for a, b in zip(results(MASKS[kind], "flash_attn", qkv), results(MASKS[kind], "reference", qkv), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    kernel._flash_attn_package.cache_clear()


def allowed_of(window: tuple[Any, Any], causal: bool, length: int, borders: Tensor | None) -> Tensor:
    """FlashAttention-4's arguments as a table of pairs of ``length`` places."""
    left, right = window
    place = torch.arange(length)
    ahead = place[None, :] - place[:, None]
    right = 0 if causal else right
    allowed = torch.ones(length, length, dtype=torch.bool)
    if right is not None:
        allowed &= ahead <= right
    if left is not None:
        allowed &= -ahead <= left
    if borders is not None:
        document = torch.bucketize(place, borders[1:].long(), right=True)
        allowed &= document[None, :] == document[:, None]
    return allowed


class FlashAttention4:
    """The two functions of flash-attn-4 that are called, in plain torch, with its argument names."""

    def _flash_attn_fwd(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, return_lse: bool, **limits: Any) -> Any:
        assert return_lse
        batched = [x.unsqueeze(0) if x.dim() == 3 else x for x in (q, k, v)]
        borders = limits.get("cu_seqlens_q")
        assert borders is None or (limits["max_seqlen_q"] == limits["max_seqlen_k"] == 7 and borders is limits["cu_seqlens_k"])
        window = limits["window_size_left"], limits["window_size_right"]
        allowed = allowed_of(window, causal, batched[0].shape[1], borders)
        out = attention(*batched, LoweredMask("reference", allowed[None, None]))
        return out.view(q.shape), q.sum(-1).mT.contiguous()  # in place of the logarithms: [B, H, S] or [H, B * S]

    def _flash_attn_bwd(  # type: ignore[no-untyped-def]
        self, q, k, v, out, grad, sums, *, causal: bool, deterministic: bool, **limits: Any
    ) -> tuple[Tensor, ...]:
        assert not deterministic and torch.equal(sums, q.sum(-1).mT)
        into = [limits.pop(name, None) for name in ("dq", "dk", "dv")]
        shapes = [x.shape for x in (q, k, v)]
        q, k, v, grad = (x.unsqueeze(0) if x.dim() == 3 else x for x in (q, k, v, grad))
        window = limits["window_size_left"], limits["window_size_right"]
        allowed = allowed_of(window, causal, q.shape[1], limits.get("cu_seqlens_q"))
        q, grad = (x.unflatten(2, (k.shape[2], -1)) for x in (q, grad))
        scale = q.shape[-1] ** -0.5
        scores = torch.einsum("bqhgk,bshk->bhgqs", q, k) * scale
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
        of_weights = torch.einsum("bqhgk,bshk->bhgqs", grad, v)
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * scale
        found = (
            torch.einsum("bhgqs,bshk->bqhgk", of_scores, k),
            torch.einsum("bhgqs,bqhgk->bshk", of_scores, q),
            torch.einsum("bhgqs,bqhgk->bshk", weights, grad),
        )
        grads = tuple(x.reshape(shape) for x, shape in zip(found, shapes, strict=True))
        return tuple(x if place is None else place.copy_(x) for x, place in zip(grads, into, strict=True))


@pytest.mark.parametrize("kind", [kind for kind in MASKS if "prefix" not in kind and "staged" not in kind])
def test_arguments_of_flash_attention_4(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel.flash_attn_4, "takes", lambda device: True)
    monkeypatch.setattr(kernel.flash_attn_4, "_package", FlashAttention4)
    qkv = inputs(2)
    for a, b in zip(results(MASKS[kind], "flash_attn", qkv), results(MASKS[kind], "reference", qkv), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.fixture
def heads_of_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The package is there, on a device with one multiprocessor: query heads of each call of its backward pass."""
    calls: list[int] = []

    class Counting(FlashAttention4):
        def _flash_attn_bwd(self, q: Tensor, *args: Any, **more: Any) -> tuple[Tensor, ...]:
            calls.append(q.shape[2])
            return super()._flash_attn_bwd(q, *args, **more)

    monkeypatch.setattr(kernel.flash_attn_4, "takes", lambda device: True)
    monkeypatch.setattr(kernel.flash_attn_4, "_package", Counting)
    monkeypatch.setattr(kernel.flash_attn_4, "multiprocessors", lambda device: 1)
    return calls


@pytest.mark.parametrize("heads", [4, 6])
def test_copies_of_keys(heads: int, heads_of_calls: list[int]) -> None:
    """A pass over one query head of every key head for each copy of the keys; the gradients are summed."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 7, heads + 4, 128, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 7, heads, 128, generator=generator).double()
    cos, sin = (torch.randn(1, 7, 128, generator=generator).double() for _ in range(2))

    def results_of(mask: LoweredMask) -> list[Tensor]:
        leaf = qkv.clone().requires_grad_()
        copies = kernel.key_copies(leaf, 2, mask)
        out = attention(*joint_qk_norm_rope(leaf, 2, cos, sin, None, None, 1e-6, copies=copies), mask)
        return [out.detach(), *torch.autograd.grad(out, leaf, weight)]

    found = results_of(LoweredMask("flash_attn", causal=True))
    for a, b in zip(found, results_of(LoweredMask(causal=True)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert heads_of_calls == ([2, 2] if heads == 4 else [6])  # alone where two share a key
    with torch.no_grad():
        assert kernel.key_copies(qkv, 2, LoweredMask("flash_attn", causal=True)) == 1


def attention_layer(**more: Any) -> Attention:
    torch.manual_seed(0)
    return Attention(64, num_heads=4, num_kv_heads=2, head_dim=128, **more).double()


@pytest.mark.parametrize("kind", ["plain", "gives its keys", "adapter", "frozen keys"])
def test_layers_that_copy_keys(kind: str, heads_of_calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain layer gives its attention copies, and one whose keys others take, or with an adapter, does not; gradients are
    those of SDPA."""
    monkeypatch.setattr("l3m_like.layers.linear._ROWS", 1)  # query, key and value are one product
    layer = attention_layer()
    if kind == "gives its keys":
        layer.gives_kv = True
    if kind == "adapter":
        layer.q_proj = LoRALinear(layer.q_proj, rank=2, alpha=2.0)
        for matrix in (layer.q_proj.lora_a, layer.q_proj.lora_b):
            torch.nn.init.normal_(matrix)
    if kind == "frozen keys":
        for part in (layer.k_proj, layer.v_proj):
            assert part is not None
            part.requires_grad_(False)
    x = torch.randn(4, 130, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def results_of(mask: LoweredMask) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        out: Any = layer(leaf, None, mask)
        if kind == "gives its keys":
            out, (k, v) = out
            assert k.shape == v.shape == (4, 130, 2, 128)
        loss = (out * torch.arange(out.numel()).view(out.shape).sin()).sum()
        return [out.detach(), *torch.autograd.grad(loss, [leaf, *(p for p in layer.parameters() if p.requires_grad)])]

    for a, b in zip(results_of(LoweredMask("flash_attn", causal=True)), results_of(LoweredMask(causal=True)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    assert heads_of_calls == ([2, 2] if layer.may_copy_keys else [4])
    assert layer.may_copy_keys == (kind in ("plain", "frozen keys"))


def test_a_package_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    kernel.flash_attn_4._package.cache_clear()
    with caplog.at_level(logging.WARNING, logger="l3m_like.kernels.flash_attn_4"):
        assert kernel.flash_attn_4._package() is None
    assert "flash-attn-4 is installed, but cannot be used: No module named 'flash_attn'" in caplog.text
    kernel.flash_attn_4._package.cache_clear()


@pytest.mark.parametrize("kind", [kind for kind in MASKS if kind != "full"])
def test_blocks_of_flex(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 2 places: no allowed pair lies in one that is left out, and all pairs of a whole one are allowed."""
    monkeypatch.setattr("l3m_like.layers.masks._BLOCK", 2)
    mask = MASKS[kind]
    blocks = lower(mask, "flex", 2, 7, 7, CPU).blocks
    dense = lower(mask, "reference", 2, 7, 7, CPU)
    allowed = dense.allowed[:, 0].expand(2, 7, 7).clone()
    if dense.live is not None:
        allowed &= dense.live[:, :, 0]
    padded = torch.nn.functional.pad(allowed, (0, 1, 0, 1)).unflatten(1, (4, 2)).unflatten(3, (4, 2))
    some, every = padded.any(4).any(2), padded.all(4).all(2)
    visited, whole = torch.zeros(2, 2, 4, 4, dtype=torch.bool)
    for b, q in itertools.product(range(2), range(4)):
        for seen, number, at in (
            (visited, blocks.kv_num_blocks, blocks.kv_indices),
            (whole, blocks.full_kv_num_blocks, blocks.full_kv_indices),
        ):
            seen[b, q, at[b, 0, q, : int(number[b, 0, q])].long()] = True
    assert not (visited & whole).any()
    assert torch.equal(whole, every) and not (some & ~visited & ~whole).any()
    if mask.document_ids is None and mask.kind in ("full", "causal"):
        assert torch.equal(visited | whole, some)  # and none is visited for nothing


def choice(mask: AttentionMask, dtype: torch.dtype = torch.bfloat16, asked: str = "auto", device: str = "cuda") -> str:
    return choose_backend(asked, mask, 7, 7, 128, dtype, torch.device(device))


def test_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l3m_like.layers.masks.cudnn_takes", lambda head_dim, device: head_dim <= 128)
    for name, mask in MASKS.items():
        assert choice(mask) == ("cudnn" if name in ("full", "causal") else "flex")
        assert choice(mask, torch.float32) == choice(mask, device="cpu") == "sdpa"
    assert choose_backend("auto", MASKS["causal"], 7, 7, 256, torch.float16, torch.device("cuda")) == "flash"
    cached = AttentionMask("causal", query_start=3)
    assert choose_backend("auto", cached, 4, 7, 64, torch.bfloat16, torch.device("cuda")) == "sdpa"
    torch.use_deterministic_algorithms(True)
    try:
        assert choice(MASKS["causal"]) == "flash"
    finally:
        torch.use_deterministic_algorithms(False)


def test_auto_takes_flash_attention_4_for_long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal, two query heads for a key head, rows enough for the device."""
    monkeypatch.setattr(kernel.flash_attn_4, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernel.flash_attn_4, "takes", lambda device: False)
    four = (4, 4096, 16, 8, 128, torch.device("cuda"))
    assert not kernel.flash_attn_4_wins(*four)
    monkeypatch.setattr(kernel.flash_attn_4, "takes", lambda device: True)
    assert kernel.flash_attn_4_wins(*four)
    # few rows, short ones, heads with keys of their own, four for a key, narrow ones
    others = ((2, 4096, 16, 8, 128), (8, 2048, 16, 8, 128), (4, 4096, 16, 16, 128), (4, 4096, 32, 8, 128), (4, 4096, 16, 8, 64))
    assert not any(kernel.flash_attn_4_wins(*other, torch.device("cuda")) for other in others)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert not kernel.flash_attn_4_wins(*four)

    monkeypatch.setattr("l3m_like.layers.masks.cudnn_takes", lambda head_dim, device: True)
    device = torch.device("cuda")
    found = {
        kind: choose_backend("auto", MASKS[kind], 4096, 4096, 128, torch.bfloat16, device, True, True)
        for kind in ("causal", "full", "documents")
    }
    assert found == {"causal": "flash_attn", "full": "cudnn", "documents": "flex"}


def test_auto_takes_it_for_layers_that_copy_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("l3m_like.layers.masks.flash_attn_4_wins", lambda *shape: asked.append(shape[:5]) is None)
    monkeypatch.setattr("l3m_like.layers.masks.choose_backend", lambda *args: "flash_attn" if args[-1] else "sdpa")
    tokens = torch.zeros(2, 7, 64)
    with_adapter, gives = attention_layer(), attention_layer()
    with_adapter.q_proj, gives.gives_kv = LoRALinear(with_adapter.q_proj, rank=2, alpha=2.0), True

    def backend_of(mixer: Attention) -> str:
        return LayerMasks(AttentionMask("causal"), 7, 7, tokens).of(SimpleNamespace(mixer=mixer)).backend

    assert backend_of(attention_layer()) == "flash_attn" and asked == [(2, 7, 4, 2, 128)]
    assert [backend_of(mixer) for mixer in (with_adapter, gives, attention_layer(interleaved=True))] == ["sdpa"] * 3
    with torch.no_grad():
        assert backend_of(attention_layer()) == "sdpa"
    assert len(asked) == 1


def test_what_ran_is_told() -> None:
    tokens, told = torch.zeros(2, 7, 4), {}
    layers = [SimpleNamespace(mixer=SimpleNamespace(backend="auto", window=window, head_dim=8)) for window in (None, 3)]
    masks = LayerMasks(MASKS["documents"], 7, 7, tokens, told)
    assert [masks.of(layer).backend for layer in layers] == ["sdpa", "sdpa"]
    assert told == {"causal, documents": "sdpa", "causal, documents, window 3": "sdpa"}


@pytest.mark.parametrize(
    ("asked", "mask", "problem"),
    [
        ("cudnn", "documents", "masks neither documents"),
        ("flash", "window", "masks neither documents, windows"),
        ("varlen", "prefix", "neither prefixes nor stages"),
        ("varlen", "staged in documents", "neither prefixes nor stages"),
        ("cudnn", "staged", "nor stages"),
        ("varlen", "prefix in documents", "by their borders"),
    ],
)
def test_a_mask_is_never_dropped(asked: str, mask: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        choice(MASKS[mask], asked=asked)


def test_names_and_devices() -> None:
    assert check_backend("auto") == "auto" and check_backend("reference") == "reference"
    with pytest.raises(UserError, match="Did you mean 'reference'"):
        check_backend("referense")
    with pytest.raises(UserError, match="not installed"):
        check_backend("flash_attn")
    with pytest.raises(UserError, match="fp16 and bf16 on CUDA, not torch.bfloat16 on cpu"):
        choice(MASKS["causal"], asked="cudnn", device="cpu")
    with pytest.raises(UserError, match="backward pass needs CUDA"):
        choice(MASKS["prefix"], asked="flex", device="cpu")
    with pytest.raises(UserError, match="key/value cache"):
        choose_backend("varlen", AttentionMask("causal", query_start=3), 4, 7, 64, torch.bfloat16, torch.device("cuda"))


def test_short_rows_are_chosen_where_they_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    from l3m_like.layers import masks

    monkeypatch.setattr(masks, "short_takes", lambda length, head_dim, grouped, device: not grouped)
    monkeypatch.setattr(masks, "cudnn_takes", lambda head_dim, device: True)

    def chosen(asked: str, kind: str, grouped: bool = False) -> str:
        return choose_backend(asked, AttentionMask(kind), 256, 256, 64, torch.bfloat16, torch.device("cuda"), grouped)

    assert [chosen(asked, "full") for asked in ("auto", "short")] == ["short", "short"]
    assert [chosen("auto", "causal"), chosen("auto", "full", grouped=True)] == ["cudnn", "cudnn"]
    for kind, grouped in (("causal", False), ("full", True)):
        with pytest.raises(UserError, match="attention backend short"):
            chosen("short", kind, grouped)
