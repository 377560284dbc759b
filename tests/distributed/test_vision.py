"""Image models: one process = every mesh = accumulation = checkpointing, with all that they draw."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from tests.distributed.recorder import experiment, recorded, trained, world_size
from tests.distributed.test_parity import compare, settings

#: the softmax does not see a constant in the scores
VANISHING = {"k_proj.bias": "the softmax does not see a constant in the scores"}
DRAWN = {
    "vit": ("image_mixed", "image_partner_weight"),
    "mae": ("image_masked", "image_restore"),
    "aimv1": ("image_prefix_lengths",),
    "aimv2": ("image_prefix_lengths",),
}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "mesh", "split"),
    [
        ("vit", "dp_shard 2", ""),
        pytest.param("vit", "tp 2", "", marks=slow),
        pytest.param("vit", "", "accumulation 4", marks=slow),
        ("mae", "hsdp 2x2", ""),
        pytest.param("mae", "tp 2", "accumulation 4", marks=slow),
        pytest.param("aimv1", "dp_shard 2 x tp 2", "", marks=slow),
        pytest.param("aimv1", "", "accumulation 4", marks=slow),
        ("aimv2", "dp_shard 2 x tp 2", ""),
        ("aimv2", "", "accumulation 4"),
        pytest.param("aimv2", "dp_shard 2", "accumulation 2, full checkpointing", marks=slow),
    ],
)
def test_equals_one_process(name: str, mesh: str, split: str) -> None:
    axes = settings(mesh, split)
    found, one = trained(name, DRAWN[name], **axes), trained(name, DRAWN[name])[0]
    compare(found, one, VANISHING)
    for key, value in one.draws.items():
        held = [record.draws[key] for record in found if key in record.draws]
        assert held and all(torch.equal(other, value) for other in held), key


@contextmanager
def drawn_by_place() -> Iterator[None]:
    """Rows draw by their place in the micro-batch, as a generator of torch would have it."""
    from l3m_like.blocks.preprocessors import mask_patches

    uniform = mask_patches.uniform

    def broken(row: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return uniform(torch.arange(len(row), device=row.device), *args, **kwargs)

    with mock.patch.object(mask_patches, "uniform", broken):
        yield


@contextmanager
def mean_of_patches_of_all_rows() -> Iterator[None]:
    """The rows' means are weighed by how many patches they have in this micro-batch."""
    from l3m_like.losses import PatchRegression

    compute = PatchRegression.compute

    def broken(self: Any, patches: torch.Tensor, image: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        return compute(self, patches, image, masked) * masked.sum() / masked.numel()

    with mock.patch.object(PatchRegression, "compute", broken):
        yield


@pytest.mark.parametrize("fault", [drawn_by_place, mean_of_patches_of_all_rows])
def test_a_planted_fault_is_found(fault: Any) -> None:
    axes = settings("", "accumulation 4")
    found = recorded(experiment("aimv2", **axes), world_size(axes), fault=fault)
    with pytest.raises(AssertionError, match="against"):
        compare(found, trained("aimv2", DRAWN["aimv2"])[0], VANISHING)
