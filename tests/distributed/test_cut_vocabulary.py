"""Vocabulary matrices that are cut over ranks equal whole ones, in the linear cross-entropy and in a model."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.distributed import pool
from tests.distributed.recorder import whole
from tests.parity.rule import check_gradients, check_values, perturb


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 12, (2, 9), generator=generator)
    targets[0, :4] = -100
    hidden, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 9, 5), (12, 5)))
    return hidden, weight, targets


def losses(hidden: Tensor, weight: Tensor, targets: Tensor, uniform: bool, **cut: Any) -> list[Tensor]:
    from l3m_like.kernels.linear_cross_entropy import linear_cross_entropy

    hidden.requires_grad_()
    weight.requires_grad_()
    nll, norm = linear_cross_entropy(hidden, weight, targets, normalizer=True, softcap=3.0, chunk_tokens=7, **cut)
    scale = torch.linspace(-1, 2, 18, dtype=torch.float64).view(2, 9)
    total = nll.sum() if uniform else (nll * scale).sum() + norm.square().sum()
    return [x.detach() for x in (nll, norm, *torch.autograd.grad(total, (hidden, weight)))]


def on_a_rank(uniform: bool) -> list[Tensor]:
    import torch.distributed as dist

    from l3m_like.distributed.mesh import build_mesh

    group = build_mesh({"tp": 2})["tp"].get_group()
    hidden, weight, targets = inputs()
    return losses(hidden, weight.chunk(2)[dist.get_rank()].clone(), targets, uniform, group=group)


@pytest.mark.parametrize("uniform", [True, False])
def test_equals_the_whole_vocabulary(uniform: bool) -> None:
    ranks = pool.run(2, on_a_rank, uniform)
    whole = losses(*inputs(), uniform)
    for nll, norm, grad_hidden, _ in ranks:
        for ours, theirs in zip((nll, norm, grad_hidden), whole, strict=False):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.cat([rank[3] for rank in ranks]), whole[3], rtol=1e-12, atol=1e-13)
    with pytest.raises(AssertionError):  # a rank's own part of the gradient is not the whole
        torch.testing.assert_close(torch.cat([ranks[0][3], ranks[0][3]]), whole[3], rtol=1e-12, atol=1e-13)


# ---- a model ---------------------------------------------------------------------------------------------------------------


def model_of(words: int, tied: bool) -> Any:
    from l3m_like.blocks import LanguageModelHead, TokenEmbed
    from l3m_like.core import MetaModel

    head = LanguageModelHead(words, 8, reads={"hidden": "text_tokens"}, writes=["nll", "weighted_nll", "logits"])
    tie = {"head.proj.weight": "preprocessor.embed.weight"} if tied else None
    model = MetaModel(preprocessor=TokenEmbed(words, 8), head=head, stream="text", tie=tie).double()
    perturb(model)
    return model


def outputs(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All that the head writes, and the gradients of a function of all of it."""
    generator = torch.Generator().manual_seed(0)
    ids, targets = (torch.randint(0, 12, (2, 9), generator=generator) for _ in range(2))
    targets[0, :4] = -100
    weights = torch.rand(2, 9, generator=generator)
    out = model({"text_ids": ids, "text_targets": targets, "text_weights": weights})
    found = {name: out[f"text_{name}"] for name in ("nll", "weighted_nll", "logits")}
    scale = torch.linspace(-1, 2, found["logits"].numel(), dtype=torch.float64).view(found["logits"].shape)
    (found["nll"].sum() + found["weighted_nll"].square().sum() + (found["logits"] * scale).sum()).backward()
    return {name: value.detach() for name, value in found.items()}, {name: whole(p.grad) for name, p in model.named_parameters()}


def on_tp(
    words: int, tied: bool, fault: bool, backend: str = "auto"
) -> tuple[dict[str, list[int]], dict[str, Tensor], dict[str, Tensor]]:
    """(rows of every matrix on this rank, outputs, gradients)."""
    from l3m_like.distributed.gradients import local
    from l3m_like.distributed.mesh import build_mesh
    from l3m_like.distributed.parallelize import parallelize
    from l3m_like.layers import vocabulary

    model = parallelize(model_of(words, tied), build_mesh({"tp": 2}), precision="fp64")
    model.head.backend = backend
    rows = {name: list(local(p).shape) for name, p in model.named_parameters() if p.dim() == 2}
    kernel = vocabulary.linear_cross_entropy

    def alone(*args: Any, **kwargs: Any) -> Any:
        return kernel(*args, **kwargs | {"group": None})

    with mock.patch.object(vocabulary, "linear_cross_entropy", alone if fault else kernel):
        return rows, *outputs(model)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_model_equals_the_whole_one(tied: bool) -> None:
    expected, gradients = outputs(model_of(14, tied))
    for rows, found, ours in pool.run(2, on_tp, 14, tied, False):
        assert rows == dict.fromkeys(rows, [7, 8]) and len(rows) == (1 if tied else 2)
        for name, value in expected.items():
            check_values(found[name], value)
        check_gradients(ours, gradients)
    for _, found, ours in pool.run(2, on_tp, 14, tied, True):  # each rank as if its rows were all there is
        with pytest.raises(AssertionError):
            check_values(found["nll"], expected["nll"])
        with pytest.raises(AssertionError, match="against"):
            check_gradients(ours, gradients)


def test_the_reference_of_the_loss_sees_the_whole_matrix() -> None:
    expected, gradients = outputs(model_of(14, True))
    for _, found, ours in pool.run(2, on_tp, 14, True, False, "reference"):
        check_values(found["weighted_nll"], expected["weighted_nll"])
        check_gradients(ours, gradients)


def test_a_vocabulary_that_tp_does_not_divide_stays_whole() -> None:
    expected, gradients = outputs(model_of(13, True))
    for rows, found, ours in pool.run(2, on_tp, 13, True, False):
        assert rows == {"preprocessor.embed.weight": [13, 8]}
        check_values(found["nll"], expected["nll"])
        check_gradients(ours, gradients)
