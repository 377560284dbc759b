"""Supervised finetuning: exactly what the assistant says is trained on, and packing changes nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from torch import Tensor

from l3m_like.config import RunConfig
from l3m_like.data import OnePerRow
from l3m_like.data.packing import Piece
from l3m_like.data.paths import SHIPPED
from l3m_like.training.build import build_model
from tests.distributed.recorder import ROOT
from tests.parity.rule import check_gradients, check_values, gradients, perturb

CHATS = [json.loads(line) for line in (SHIPPED / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()]
TRAIN = [chat["messages"] for chat in CHATS if chat["split"] == "train"]


@pytest.fixture(scope="module")
def cfg() -> RunConfig:
    tiny = ["dim=16", "heads=4", "kv_heads=2", "head_dim=8", "mlp_dim=24", "sequence=800"]
    return RunConfig.from_file(ROOT / "configs" / "experiment" / "sft.yaml", tiny)


def batches(cfg: RunConfig, count: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The first ``count`` conversations: packed two by two, and one in each row."""
    dataset = cfg.instantiate("data.train")
    pieces = [Piece(item, 0, item.size) for item in map(dataset.item, range(count))]
    short = OnePerRow(max(piece.stop for piece in pieces))
    packed = dataset.pack.collate([pieces[at : at + 2] for at in range(0, count, 2)])
    return packed, short.collate([[piece] for piece in pieces])


def test_shipped_conversations() -> None:
    for chat in CHATS:
        roles = [message["role"] for message in chat["messages"]]
        assert roles in (["system", *["user", "assistant"] * 1], ["system", *["user", "assistant"] * 2])
        assert all(0 < len(message["content"].encode()) <= 110 for message in chat["messages"])
    assert len(CHATS) > 1000 and 0.05 < 1 - len(TRAIN) / len(CHATS) < 0.12


def test_only_what_the_assistant_says_is_trained_on(cfg: RunConfig) -> None:
    """Of packed rows: the trained targets, decoded, are the assistant's turns and their ends; the last one ends the document."""
    packed, _ = batches(cfg, 8)
    said = []
    for row, documents in zip(packed["text_targets"], packed["text_document_ids"], strict=True):
        for number in range(2):
            ids = row[(documents == number) & (row != -100)].tolist()
            assert ids[-1] == 256 and 256 not in ids[:-1]
            said.append(bytes(ids[:-1]).decode())
    expected = [[m["content"] for m in messages if m["role"] == "assistant"] for messages in TRAIN[:8]]
    assert said == ["".join(f"{content}<|im_end|>" for content in turns) + "\n" for turns in expected]
    assert (packed["text_targets"][packed["text_document_ids"] < 0] == -100).all()


def run(model: Any, data: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(data)
    loss = out["text_nll"].sum() / (data["text_targets"] != -100).sum()
    loss.backward()
    return loss.detach(), {name: grad.clone() for name, grad in gradients(model).items()}


def test_packed_is_unpacked(cfg: RunConfig) -> None:
    model = build_model(cfg).to_empty(device="cpu").double()
    model.retie()
    perturb(model)
    packed, apart = batches(cfg, 4)
    assert packed["text_ids"].shape[0] == 2 and apart["text_ids"].shape[0] == 4
    loss, grads = run(model, packed)
    loss_apart, grads_apart = run(model, apart)
    check_values(loss, loss_apart)
    check_gradients(grads, grads_apart)
    leaking = packed | {"text_document_ids": packed["text_document_ids"].clamp(max=0)}
    leaking.pop("text_cu_seqlens")
    with pytest.raises(AssertionError, match="against"):
        check_gradients(run(model, leaking)[1], grads_apart)
