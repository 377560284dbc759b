"""Probes, neighbours and zero-shot classification: what they find, and that processes and batches do not matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from l3m_like.core import MetaModel
from l3m_like.core.errors import UserError
from l3m_like.core.keys import KeySpec
from l3m_like.core.meta_model import Series
from l3m_like.data import CaptionedImage, Dataset, Stack
from l3m_like.distributed.mesh import build_mesh
from l3m_like.evaluations import AttentiveProbe, LinearProbe, NearestNeighbours, ZeroShot
from l3m_like.evaluations.features import LabelledSet
from tests.distributed import pool

CLASSES = 4


class Squares:
    """2 x 2 pixel images: class c is bright in pixel c, with noise that hides it a little."""

    path = "squares"

    def __init__(self, samples: int, seed: int = 0) -> None:
        self.samples, self.seed = samples, seed

    def __len__(self) -> int:
        return self.samples

    def reference(self, index: int) -> str:
        return f"squares#{index}"

    def read(self, index: int) -> dict[str, Any]:
        generator = np.random.Generator(np.random.Philox(key=index + 1000 * self.seed))
        image = generator.normal(size=4).astype(np.float32) * 0.6
        label = int(generator.integers(CLASSES))
        image[label] += 2
        return {"image": image.reshape(1, 2, 2), "image_label": np.array(label)}


class AsSquare(CaptionedImage):
    """The processor of ``Squares``; captions are there for zero-shot classification alone."""

    def __init__(self) -> None:
        super().__init__(2, vocab_size=257, max_tokens=4, channels=1, names=list("abcd"))

    def keys(self) -> dict[str, KeySpec]:
        return {"image": KeySpec(torch.float32, (1, 2, 2)), "image_label": KeySpec(torch.int64, ())}

    def __call__(self, sample: Any, visit: Any) -> dict[str, np.ndarray]:
        return dict(sample)


def dataset(samples: int, seed: int) -> Dataset:
    return Dataset(Squares(samples, seed), AsSquare(), Stack())


def model_of(*, class_token: bool = False) -> Any:
    """Each pixel a token; random weights."""
    from l3m_like.blocks import EmbeddingHead, Features, PatchEmbed, TokenEmbed

    torch.manual_seed(0)
    image = MetaModel(
        PatchEmbed(2, 1, 1, 16), postprocessor=Features(16), head=EmbeddingHead(16, 8, pool="mean"), stream="image"
    )  # fmt: skip
    text = MetaModel(
        TokenEmbed(257, 16), postprocessor=Features(16, reads={"hidden": "text_tokens"}), head=EmbeddingHead(16, 8, pool="first"),
        stream="text",
    )  # fmt: skip
    next(block for path, block in image.blocks() if path == "postprocessor")._reads["hidden"] = "image_tokens"
    model = Series({"image": image, "text": text})
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model.eval()


def probes(batch: int = 64) -> dict[str, Any]:
    data, train = dataset(61, 1), dataset(160, 2)
    settings: dict[str, Any] = {"data": data, "train": train, "batch": batch}
    return {
        "neighbours": NearestNeighbours(**settings, neighbours=5),
        "linear": LinearProbe(**settings),
        "attentive": AttentiveProbe(num_heads=2, epochs=15, rows=32, lr=1e-2, **settings),
        "zero_shot": ZeroShot(data, list("abcd"), ["{}", "a {}"], batch=batch),
    }


def found(batch: int = 64) -> dict[str, dict[str, float]]:
    mesh, model = build_mesh({}), model_of()
    with torch.no_grad():
        run = {name: probe.evaluate(model, mesh=mesh, step=0, seed=0, folder=Path()) for name, probe in probes(batch).items()}
    return {name: dict(findings.values) for name, findings in run.items()}


def test_they_find_what_is_there_on_any_number_of_processes() -> None:
    one = found()
    assert one["linear"]["top1"] > 0.8 and one["attentive"]["top1"] > 0.8 and one["neighbours"]["top1"] > 0.5
    assert 0 <= one["zero_shot"]["top1"] < 0.6  # nobody has told the two towers of one another
    assert "top5" not in one["linear"]  # of four classes
    for rank in pool.run(2, found):
        assert rank == one


def test_batches_do_not_matter() -> None:
    one, other = found(), found(batch=7)
    for name, values in one.items():
        assert abs(values["top1"] - other[name]["top1"]) <= 1 / 61  # a tie may fall the other way


def test_neighbours_vote_by_their_weights() -> None:
    known = LabelledSet(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]]), torch.tensor([0, 1, 1, 2]))
    probe = NearestNeighbours(neighbours=3, temperature=0.5, data=None, train=None)
    (scores,) = probe.scores(known, torch.tensor([[2.0, 0.0]]), 3, 0)
    expected = torch.tensor([np.exp(1 / 0.5), np.exp(0.8 / 0.5) + np.exp(0.0), 0.0])
    assert torch.allclose(scores.double(), expected)


def test_linear_probe_is_the_optimum() -> None:
    """The gradient of its objective is zero there: no step would better it."""
    generator = torch.Generator().manual_seed(0)
    known = LabelledSet(torch.randn(50, 3, generator=generator).double(), torch.randint(0, 3, (50,), generator=generator))
    probe = LinearProbe(decay=0.1, data=None, train=None)
    deviation, mean = torch.std_mean(known.features, dim=0)
    basis = mean + torch.cat((torch.zeros(1, 3), torch.eye(3))) * (deviation + 1e-6)
    scores = probe.scores(known, torch.cat((known.features, basis)), 3, 0)
    error = (scores[:50].softmax(1) - torch.eye(3)[known.labels]) / 50
    weight = scores[51:] - scores[50]  # [3 features, 3 classes]
    gradient = ((known.features - mean) / (deviation + 1e-6)).T @ error + 0.1 * weight
    assert float(gradient.abs().max()) < 1e-6 and float(error.sum(0).abs().max()) < 1e-6


def test_what_does_not_fit_is_said_before_training() -> None:
    model = model_of()
    data = dataset(4, 0)
    with pytest.raises(UserError, match="image_embeding"):
        LinearProbe(data=data, train=data, key="image_embeding").check(model)
    with pytest.raises(UserError, match="text_ids"):
        LinearProbe(data=data, train=data, key="text_embedding").check(model)
    with pytest.raises(UserError, match="pools by attention"):
        AttentiveProbe(1, data=data, train=data, pool="mean")
    with pytest.raises(UserError, match="place"):
        ZeroShot(data, ["a"], ["no place"])
