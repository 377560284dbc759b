"""Documents in a pack never see each other: packed = unpacked, and isolation is bitwise."""

from __future__ import annotations

import pytest
import torch
from rule import check_gradients, check_values, gradients, perturb
from test_language_model import V, ours_of
from torch import Tensor

from l3m_like.core import MetaModel

LENGTHS = (5, 9, 1, 6)


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, V, (n,), generator=generator) for n in LENGTHS]


def row(docs: list[Tensor], length: int) -> dict[str, Tensor]:
    """The sequence form of documents in one row, padded to ``length``."""
    out = {
        "text_ids": torch.zeros(length, dtype=torch.int64),
        "text_targets": torch.full((length,), -100),
        "text_positions": torch.zeros(length, dtype=torch.int64),
        "text_document_ids": torch.full((length,), -1, dtype=torch.int32),
    }
    at = 0
    for number, ids in enumerate(docs):
        end = at + len(ids)
        out["text_ids"][at:end] = ids
        out["text_targets"][at : end - 1] = ids[1:]
        out["text_positions"][at:end] = torch.arange(len(ids))
        out["text_document_ids"][at:end] = number
        at = end
    return out


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    data = {key: torch.stack([r[key] for r in rows]) for key in rows[0]}
    ids = data["text_document_ids"].flatten()
    starts = torch.arange(len(ids)) % data["text_ids"].shape[1] == 0
    starts[1:] |= ids[1:] != ids[:-1]
    borders = torch.full((len(rows) * 8 + 1,), len(ids), dtype=torch.int32)
    borders[: int(starts.sum())] = starts.nonzero().flatten().int()
    return data | {"text_cu_seqlens": borders}


def run(model: MetaModel, data: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    data = model(data)
    loss = data["text_nll"].sum() / (data["text_targets"] != -100).sum()
    loss.backward()
    return loss.detach(), {name: g.clone() for name, g in gradients(model).items()}


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_packed_equals_unpacked(backend: str) -> None:
    model = ours_of("qwen3_tied", backend).double()
    perturb(model)
    docs = documents()
    packed = stack([row(docs[:3], 18), row(docs[3:], 18)])
    unpacked = stack([row([doc], 11) for doc in docs])
    loss, grads = run(model, packed)
    loss_apart, grads_apart = run(model, unpacked)
    check_values(loss, loss_apart)
    check_gradients(grads, grads_apart)
    alone = sum(run(model, stack([row([doc], len(doc))]))[0] * (len(doc) - 1) for doc in docs if len(doc) > 1)
    check_values(loss, alone / (sum(LENGTHS) - len(LENGTHS)))

    def without_documents() -> None:
        one_document = torch.where(packed["text_document_ids"] < 0, -1, 0)
        check_gradients(run(model, packed | {"text_document_ids": one_document})[1], grads_apart)

    with pytest.raises(AssertionError):
        without_documents()


def check_isolation(backend: str, kind: str, dtype: torch.dtype, device: str) -> None:
    """Changing documents 0 and 2 leaves outputs and input gradients of document 1 the same to the last bit."""
    model = ours_of("qwen3_tied", backend)
    model.trunk.mask = kind
    perturb(model)
    model.to(device, dtype)
    docs = documents()
    first = stack([row(docs[:3], 18)])
    changed = stack([row([(docs[0] + 7) % V, docs[1], (docs[2] + 50) % V], 18)])
    results = []
    for data in (first, changed):
        data = {key: value.to(device) for key, value in data.items()}
        tokens = (model.preprocessor.embed(data["text_ids"]) * 3).detach().requires_grad_()
        hidden = model.trunk.compute(tokens, data["text_positions"], data["text_document_ids"], data["text_cu_seqlens"])
        hidden.square().sum().backward()
        results.append((hidden.detach().cpu(), tokens.grad.cpu()))  # type: ignore[union-attr]
    inside = first["text_document_ids"] == 1
    for a, b in zip(*results, strict=True):
        assert torch.equal(a[inside], b[inside])
        assert not torch.equal(a[~inside], b[~inside])
        assert a.isfinite().all() and b.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["causal", "full"])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_isolation_is_bitwise(backend: str, kind: str, dtype: torch.dtype) -> None:
    check_isolation(backend, kind, dtype, "cpu")


def test_a_leak_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: all documents of a row are one."""
    from l3m_like.blocks.trunks.transformer import Transformer

    compute = Transformer.compute

    def leaking(self, tokens, positions=None, document_ids=None, cu_seqlens=None):  # type: ignore[no-untyped-def]
        return compute(self, tokens, positions)

    monkeypatch.setattr(Transformer, "compute", leaking)
    with pytest.raises(AssertionError):
        check_isolation("sdpa", "causal", torch.float64, "cpu")
