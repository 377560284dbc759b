"""An autoencoder and its discriminator: one process = every mesh, a resumed run = an uninterrupted one, and it reconstructs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from l3m_like.config import RunConfig
from tests.distributed.recorder import Record, experiment, recorded, run_twice, world_size
from tests.parity.rule import TOLERANCE, check_gradients

#: heads on the layers of a frozen ViT, the second of two layers twice, as published
FEATURES = {
    "model.critic.head.features": {
        "_target_": "l3m_like.core.Frozen",
        "passes_gradients": True,
        "random_weights": True,
        "model": {
            "_target_": "l3m_like.blocks.ImageFeatures",
            "layers": [0, 1],
            "encoder": {
                "_target_": "l3m_like.layers.TimmViT",
                "name": "vit_tiny_patch16_224",
                "resize": "bilinear",
                "image_size": 16,
                "arguments": {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2},
            },
        },
    },
    "model.critic.head.pixels": None,
    "model.critic.head.tokens": {"_target_": "l3m_like.layers.TokenDiscriminator", "dim": 8, "layers": [1, 0, 1]},
}
#: AlexNet at 64 pixels is most of the work; the first stages of VGG16 see 16
SMALL = {"model.decoder.head.perceptual.model.net": "alex", "model.decoder.head.perceptual.model.smallest": 63}
MESHES: dict[str, dict[str, Any]] = {
    "one process": {},
    "dp_shard 2": {"dp_shard": 2},
    "dp_replicate 2": {"dp_replicate": 2, "dp_shard": 1},
    "hsdp 2x2": {"dp_replicate": 2, "dp_shard": 2},
}
VANISHING = {
    "k_proj.bias": "the softmax does not see a constant in the scores",
    "enter.bias": "a mean over tokens is subtracted",
    "mix.bias": "a mean over tokens is subtracted",
}


#: of the hinge, fake and real logits between -1 and 1 have slopes that cancel
FORM = {"loss.fool.form": "non_saturating", "loss.tell.form": "non_saturating"}

#: a schedule that does not depend on where a run ends
CONSTANT = {"schedule.name": "constant", "schedule.floor": 0.0}


def settings(mesh: str) -> dict[str, Any]:
    return FEATURES | SMALL | FORM | CONSTANT | MESHES[mesh]


@functools.cache
def trained(mesh: str = "one process") -> list[Record]:
    return recorded(experiment("rae", **settings(mesh)), world_size(MESHES[mesh]))


def compare(found: list[Record], reference: Record) -> None:
    assert len(reference.gradients) == 5  # the decoder's three, the discriminator's two
    for record in found:
        for ours, theirs in zip(record.gradients, reference.gradients, strict=True):
            check_gradients(ours, theirs, vanishing=VANISHING)
    for column in ("loss", "loss/fool", "loss/tell", "loss/lpips", "grad_norm/decoder", "grad_norm/critic"):
        pairs = list(zip(found[0].column(column), reference.column(column), strict=True))
        assert len(pairs) == (3 if column in ("loss", "loss/lpips", "grad_norm/decoder") else 2)
        assert all(abs(a - b) <= TOLERANCE[torch.float64][0] * abs(b) for a, b in pairs), column


SLOW = [pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("dp_replicate 2", "hsdp 2x2")]


@pytest.mark.parametrize("mesh", ["dp_shard 2", *SLOW])
def test_equals_one_process(mesh: str) -> None:
    """Gradients of both updates, the adaptive weight (the sum over ranks) in them, noise, augmentation and spectral norms."""
    compare(trained(mesh), trained()[0])


def test_the_reference_has_what_it_should() -> None:
    decoder, critic = trained()[0].gradients[1], trained()[0].gradients[2]
    assert "decoder.head.pixels.proj.weight" in decoder and all(name.startswith("decoder.") for name in decoder)
    assert "critic.head.network.heads.2.mix.weight" in critic and all(name.startswith("critic.") for name in critic)
    assert not any("features" in name or "perceptual" in name or name.startswith("encoder.") for name in trained()[0].weights)


@contextmanager
def weight_of_one_rank() -> Iterator[None]:
    from l3m_like.training.updates import AdaptiveWeight

    weight = AdaptiveWeight.weight

    class Alone:
        def sum(self, value: Tensor) -> Tensor:
            return value

    with mock.patch.object(AdaptiveWeight, "weight", lambda self, terms, mesh: weight(self, terms, Alone())):
        yield


@contextmanager
def augmented_by_place() -> Iterator[None]:
    """Draws by the place in the rank's batch instead of the row's number."""
    from l3m_like.layers.diff_augment import DiffAugment

    call = DiffAugment.__call__
    with mock.patch.object(DiffAugment, "__call__", lambda self, x, row, purpose: call(self, x, row - row[0], purpose)):
        yield


@contextmanager
def norm_of_a_shard() -> Iterator[None]:
    """The spectral vectors follow only the first half of their matrix, as if it were this rank's."""
    from l3m_like.layers import SpectralConv

    def half(self: Any, weight: Tensor, skipped: Tensor | None = None) -> None:
        self.u[: len(self.u) // 2].mul_(1.1)

    with mock.patch.object(SpectralConv, "follow", half):
        yield


@pytest.mark.parametrize(
    "fault",
    [
        weight_of_one_rank,
        pytest.param(augmented_by_place, marks=pytest.mark.slow),
        pytest.param(norm_of_a_shard, marks=pytest.mark.slow),
    ],
)
def test_a_planted_fault_is_found(fault: Any) -> None:
    cfg = experiment("rae", **settings("dp_shard 2"))
    with pytest.raises(AssertionError, match="against"):
        compare(recorded(cfg, 2, fault=fault), trained()[0])


@pytest.mark.parametrize("mesh", ["one process", pytest.param("dp_shard 2", marks=pytest.mark.slow)])
def test_resumes_exactly(mesh: str) -> None:
    """Stopped after two of three steps: both updates, both optimizers, the averages and the spectral vectors go on bit by bit."""
    # every default written out: a run that goes on compares its config with the saved one
    cfg = RunConfig.from_dict(experiment("rae", **settings(mesh)).to_dict())
    again = recorded(cfg, world_size(MESHES[mesh]), task=run_twice)
    for record, reference in zip(again, trained(mesh), strict=True):
        assert len(record.gradients) == 2  # one step, two updates
        for ours, theirs in zip(record.gradients, reference.gradients[-2:], strict=True):
            assert all(torch.equal(ours[name], value) for name, value in theirs.items())
        assert all(torch.equal(record.final[name], value) for name, value in reference.final.items())
        assert all(torch.equal(record.average[name], value) for name, value in reference.average.items()) and record.average
        for update, state in reference.state.items():
            assert all(torch.equal(record.state[update][name], value) for name, value in state.items())
        assert record.column("loss") == reference.column("loss")
