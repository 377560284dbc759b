"""Whole-batch terms with accumulation: cached features give the gradient of one batch, and dropout is drawn twice alike."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3m_like.core import MetaModel, ReadWriteBlock
from l3m_like.core.errors import UserError
from l3m_like.core.meta_model import Frozen
from l3m_like.distributed.mesh import build_mesh
from l3m_like.losses import Contrastive, Loss
from l3m_like.training.control import micro_batch
from l3m_like.training.updates import Update
from tests.parity.rule import check_gradients, gradients


class Embed(ReadWriteBlock):
    """Both embeddings, behind a dropout."""

    outputs = ("image_embedding", "text_embedding", "logit_scale", "size")

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.scale = nn.Linear(6, 4), nn.Linear(5, 4), nn.Parameter(torch.tensor([1.0]))

    def compute(self, picture: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        image = self.image(F.dropout(picture, 0.5, self.training))
        return F.normalize(image, dim=-1), F.normalize(self.text(words), dim=-1), self.scale.squeeze(0).exp(), image


class Size(Loss):
    """A sum over elements, beside the other term."""

    def compute(self, size: Tensor) -> Tensor:
        return size.square().sum()

    def count(self, row: Tensor) -> Tensor:
        return torch.tensor(len(row))


def update_of(model: MetaModel, **losses: Loss) -> Update:
    update = Update("main", {"": model}, losses, ["*"], None)
    update.graphs = {"": model.graph}
    return update


def setting(rows: int = 12, micro: int = 3) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    model = MetaModel(Embed()).double()
    generator = torch.Generator().manual_seed(1)
    data = {
        "picture": torch.randn(rows, 6, generator=generator, dtype=torch.float64),
        "words": torch.randn(rows, 5, generator=generator, dtype=torch.float64),
        "row": torch.arange(rows),
    }
    parts = [{key: value[at : at + micro] for key, value in data.items()} for at in range(0, rows, micro)]
    mesh = build_mesh({})
    return model, functools.partial(micro_batch, SimpleNamespace(micro=parts), [{}] * len(parts), 7, 0, mesh), mesh


TOTALS = {"contrast": 12.0, "size": 12.0}


def accumulated(model: MetaModel, micro: Any, mesh: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    update = update_of(model, contrast=Contrastive(), size=Size(0.1))
    sums: dict[str, Tensor] = {}
    for number, share in enumerate(update.whole_batch(4, micro, TOTALS, mesh)):
        terms, _ = update.forward_backward(micro(number), TOTALS, mesh, share=share)
        sums = {name: terms[name][0] + sums.get(name, 0) if name in terms else sums[name] for name in {**terms, **sums}}
    return sums, gradients(model)


def by_hand(model: MetaModel, micro: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All micro-batches forward, the graph of each kept, and one loss."""
    made = [model(micro(number)) for number in range(4)]
    image, text, size = (torch.cat([out[key] for out in made]) for key in ("image_embedding", "text_embedding", "size"))
    logits = made[0]["logit_scale"] * image @ text.T
    own = torch.arange(12)
    sums = {
        "contrast": (F.cross_entropy(logits, own, reduction="sum") + F.cross_entropy(logits.T, own, reduction="sum")) / 2,
        "size": size.square().sum(),
    }
    ((sums["contrast"] + 0.1 * sums["size"]) / 12).backward()
    return sums, gradients(model)


def test_accumulation_is_one_batch() -> None:
    model, micro, mesh = setting()
    sums, ours = accumulated(model, micro, mesh)
    again, _, _ = setting()
    expected, theirs = by_hand(again, micro)
    check_gradients(ours, theirs)
    for name, value in expected.items():
        assert float(sums[name]) == pytest.approx(float(value.detach()), rel=1e-12)


@pytest.mark.parametrize("fault", ["other dropout", "scale counted in every micro-batch"])
def test_a_planted_fault_is_found(fault: str) -> None:
    model, micro, mesh = setting()
    calls: list[int] = []

    def drawn_anew(number: int) -> Any:
        calls.append(number)
        data = micro(number)
        torch.manual_seed(len(calls))
        return data

    split = Update.whole_batch

    def shared(self: Any, *args: Any) -> Any:
        shares = split(self, *args)
        for share in shares[1:]:
            share.gradients["logit_scale"] = shares[0].gradients["logit_scale"]
        return shares

    other = fault == "other dropout"
    with nullcontext() if other else mock.patch.object(Update, "whole_batch", shared):
        _, ours = accumulated(model, drawn_anew if other else micro, mesh)
    again, _, _ = setting()
    with pytest.raises(AssertionError, match="against"):
        check_gradients(ours, by_hand(again, micro)[1])


def test_a_frozen_model_is_no_loss() -> None:
    _, micro, mesh = setting()
    frozen = MetaModel(Frozen(MetaModel(Embed()).double(), random_weights=True))
    update = update_of(frozen, contrast=Contrastive())
    shares = update.whole_batch(4, micro, TOTALS, mesh)
    with pytest.raises(UserError, match="no gradient reaches"):
        update.forward_backward(micro(0), TOTALS, mesh, share=shares[0])
