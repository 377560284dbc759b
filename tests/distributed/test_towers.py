"""A two-stream model on ranks of which some have no image: no hang, and the gradients of one process on the whole batch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.tensor import DTensor

from l3m_like.core import MetaModel, Tower, UserError
from l3m_like.data import Loader
from l3m_like.data.packing import Piece
from tests.distributed import pool
from tests.distributed.recorder import Record, recorded, toy, world_size
from tests.parity.rule import check_gradients

TOYS = "tests.distributed.toys."
DIM = 8
STEPS = 20


def layer(mlp: int = 16) -> dict[str, Any]:
    return {
        "_target_": "l3m_like.layers.TransformerLayer",
        "_partial_": True,
        "mixer": {"_target_": "l3m_like.layers.Attention", "_partial_": True, "num_heads": 2, "qk_norm": True},
        "mlp": {"_target_": "l3m_like.layers.SwiGLU", "_partial_": True, "hidden_dim": mlp},
    }


def trunk(**more: Any) -> dict[str, Any]:
    return {"_target_": "l3m_like.blocks.Transformer", "dim": DIM, "num_layers": 1, "layer": layer()} | more


TOWER: dict[str, Any] = {
    "_target_": "l3m_like.core.Tower",
    "dummy": {"image": [3, 4, 4]},
    "model": {
        "_target_": "l3m_like.core.MetaModel",
        "stream": "image",
        "preprocessor": {"_target_": "l3m_like.blocks.PatchEmbed", "image_size": 4, "patch": 2, "channels": 3, "dim": DIM},
        "trunk": trunk(mask="full"),
    },
}
TWO_STREAMS: dict[str, Any] = {
    "steps": STEPS,
    "batch": {"global": 4},
    "data": {
        "train": {
            "_target_": "l3m_like.data.Dataset",
            "source": {"_target_": TOYS + "Captions"},
            "process": {"_target_": TOYS + "AsCaption"},
            "pack": {"_target_": TOYS + "CaptionPack"},
        }
    },
    "model": {
        "_target_": "l3m_like.core.MetaModel",
        "preprocessor": {
            "text": {"_target_": "l3m_like.blocks.TokenEmbed", "vocab_size": 11, "dim": DIM, "stream": "text"},
            "tower": TOWER,
            "join": {
                "_target_": TOYS + "Join",
                "stream": "fused",
                "reads": {"text": "text_tokens", "image": "image_hidden"},
            },
        },
        "trunk": trunk(stream="fused"),
        "head": {
            "_target_": "l3m_like.blocks.LanguageModelHead",
            "vocab_size": 11,
            "dim": DIM,
            "writes": ["nll"],
            "stream": "fused",
        },
    },
    "loss": {"next_token": {"_target_": "l3m_like.losses.TokenNLL", "stream": "fused"}},
}


def frozen(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the tower inside a frozen part."""
    tree = copy.deepcopy(dict(tree))
    tree["model"]["preprocessor"]["tower"] = {"_target_": "l3m_like.core.Frozen", "model": TOWER, "random_weights": True}
    return tree


def run(tree: Mapping[str, Any], fault: Any = None, **settings: Any) -> list[Record]:
    return recorded(toy(tree, **settings), world_size(settings), fault=fault)


@functools.cache
def plain(is_frozen: bool = False) -> Record:
    return run(frozen(TWO_STREAMS) if is_frozen else TWO_STREAMS)[0]


def compare(found: list[Record], reference: Record) -> None:
    for record in found:
        assert len(record.gradients) == len(reference.gradients) == STEPS
        for ours, theirs in zip(record.gradients, reference.gradients, strict=True):
            present = {name: value for name, value in theirs.items() if value.any()}  # a step without any image
            assert set(ours) == set(theirs)
            assert all(not ours[name].any() for name in theirs if name not in present), "a gradient against none"
            check_gradients({name: ours[name] for name in present}, present)


@functools.cache
def dataset() -> Any:
    return toy(TWO_STREAMS).instantiate("data.train")


def images(dp_size: int) -> list[list[int]]:
    """How many images each rank has, step by step."""
    counts = []
    for rank in range(dp_size):
        loader = Loader(
            dataset(),
            seed=0, global_batch=4, micro_batch=4 // dp_size, dp_rank=rank, dp_size=dp_size, prefetch=0,
        )
        counts.append([len(loader.next_step().micro[0].get("image", ())) for _ in range(STEPS)])
    return [list(step) for step in zip(*counts, strict=True)]


def test_the_data_meets_every_case() -> None:
    for dp_size in (2, 4):
        steps = images(dp_size)
        assert sum(0 in step and any(step) for step in steps) >= 5  # some ranks have none
        assert any(all(step) for step in steps) or dp_size == 4
    assert any(not any(step) for step in images(4))  # nobody has one
    keys = [{"image" in dataset().collate([[Piece(dataset().item(i), 0, 1)]], 0) for i in range(40)}]
    assert keys == [{True, False}]  # "no image" is sometimes no key


@pytest.mark.parametrize(
    "settings",
    [
        {"dp_shard": 2},
        {"dp_replicate": 2, "dp_shard": 2},
        {"dp_shard": 2, "micro": 1, "checkpoint": "full"},
        {"micro": 1},
        pytest.param({"dp_shard": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ranks_without_an_image(settings: dict[str, Any]) -> None:
    compare(run(TWO_STREAMS, **settings), plain())
    assert any(name.startswith("preprocessor.tower.model.trunk") for name in plain().gradients[0])


@pytest.mark.parametrize(
    "settings", [{"dp_shard": 2}, pytest.param({"dp_replicate": 2, "dp_shard": 2}, marks=pytest.mark.slow)], ids=str
)
def test_a_tower_inside_a_frozen_part(settings: dict[str, Any]) -> None:
    compare(run(frozen(TWO_STREAMS), **settings), plain(True))
    assert not any("tower" in name for name in plain(True).gradients[0])


@contextmanager
def dummy_counts() -> Iterator[None]:
    """The dummy's output is not cut to length zero, and something sees it."""
    from tests.distributed.toys import Join

    forward, join = Tower.forward, Join.compute

    def uncut(self: Any, data: Any, inference: bool = False) -> Any:
        if "image" in data and len(data["image"]):
            return forward(self, data, inference)
        return data | self._run(self.dummy(torch.device("cpu")), inference)

    def seen(self: Any, text: torch.Tensor, image: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        unused = not place.is_meta and int(place.max()) < text.shape[0] * text.shape[1]
        return join(self, text, image, place) + (image.mean() if unused and len(image) else 0)

    with mock.patch.object(Tower, "forward", uncut), mock.patch.object(Join, "compute", seen):
        yield


def test_a_dummy_that_counts_is_found() -> None:
    with pytest.raises(AssertionError, match="against"):
        compare(run(TWO_STREAMS, dummy_counts, dp_shard=2), plain())


def test_a_tower_names_its_inputs() -> None:
    from l3m_like.blocks import PatchEmbed

    block = PatchEmbed(image_size=4, patch=2, channels=3, dim=DIM, stream="image")
    with pytest.raises(UserError, match="Tower.dummy names 'imag', which its model does not read. Did you mean 'image'"):
        Tower(block, dummy={"imag": [3, 4, 4]})
    tower = Tower(block, dummy={"image": [3, 4, 4]})
    assert tower.required == set() and tower.reads == {"image": "image"}
    for data in ({}, {"image": torch.zeros(0, 3, 4, 4)}):
        out = tower(data)["image_tokens"]
        assert out.shape == (0, 4, DIM) and out.requires_grad
        out.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in tower.parameters())


def sharded_tower() -> tuple[bool, bool]:
    """With an image tower of its own FSDP group."""
    from hydra.utils import instantiate
    from torch.distributed.fsdp import FSDPModule

    from l3m_like.distributed.mesh import build_mesh
    from l3m_like.distributed.parallelize import parallelize

    with torch.device("meta"):
        model: MetaModel = instantiate(TWO_STREAMS["model"], _convert_="all")
    tower = model.preprocessor["tower"]
    parallelize(model, build_mesh({"dp_shard": 2}))
    return isinstance(tower.model, FSDPModule), all(isinstance(p, DTensor) for p in model.parameters())


def test_a_tower_is_a_group_of_its_own() -> None:
    assert pool.run(2, sharded_tower) == [(True, True)] * 2
