"""Sampling from models: guidance, batches, pictures, errors. What the methods converge to is in test_flow_orders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from l3m_like.core import MetaModel, ReadWriteBlock, UserError
from l3m_like.core.random import normal
from l3m_like.generate import FlowODE, FlowSDE, grid
from tests.generate.flow_orders import Gaussian
from tests.generate.tiny import tiny

SHAPE = (1, 2, 2)


class GaussianVelocity(ReadWriteBlock):
    """The exact velocity on the linear path for data ~ N(mean + shift * class, covariance), flattened to 4 numbers."""

    outputs = ("prediction",)

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.field = Gaussian("linear", "velocity")
        self.dtype_of_the_model = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.shift = shift

    def compute(self, noised: Tensor, time: Tensor, class_id: Tensor) -> Tensor:
        return self.field(noised, time, self.shift * class_id.double())


def test_guidance_is_its_formula() -> None:
    """On a velocity that is affine in the class, w steps from null (3) to class c give the mean of class 3 + w (c - 3)."""
    label = 1
    sampler = {"steps": 8, "labels": [label], "num_samples": 5}
    model = MetaModel(head=GaussianVelocity(shift=0.7), stream="image")
    plain = FlowODE(SHAPE, 3, **sampler).run(model).images
    for w in (0.0, 0.5, 2.0):
        guided = FlowODE(SHAPE, 3, guidance=w, **sampler).run(model).images
        shifted = MetaModel(head=GaussianVelocity(shift=0.7 * (3 + w * (label - 3)) / label), stream="image")
        assert torch.allclose(guided, FlowODE(SHAPE, 3, **sampler).run(shifted).images, rtol=1e-12, atol=1e-12)
        assert float((guided - plain).abs().max()) > 0.1


@pytest.mark.parametrize("settings", [{}, {"method": "dopri5"}, {"sde": True}], ids=str)
def test_guidance_by_a_weaker_model(settings: dict[str, Any]) -> None:
    """Velocities that are affine in the class: w steps from the guide to the model are a model between (or beyond) them."""
    sampler = FlowSDE if settings.pop("sde", False) else FlowODE
    settings = {"steps": 8, "labels": [1, 2], "num_samples": 5, **settings}
    model, guide = (MetaModel(head=GaussianVelocity(shift=shift), stream="image") for shift in (0.7, 0.3))
    plain = sampler(SHAPE, 3, **settings).run(model).images
    for w in (0.0, 0.5, 2.0):
        own = sampler(SHAPE, 3, guidance=w, **settings).run(model, guide=model).images
        assert torch.equal(own, plain)  # a model guides itself nowhere
        guided = sampler(SHAPE, 3, guidance=w, **settings).run(model, guide=guide).images
        between = MetaModel(head=GaussianVelocity(shift=0.3 + w * 0.4), stream="image")
        torch.testing.assert_close(guided, sampler(SHAPE, 3, **settings).run(between).images, rtol=1e-12, atol=1e-12)
        assert float((guided - plain).abs().max()) > 0.1
    with pytest.raises(UserError, match="guidance is 1, which ignores it"):
        sampler(SHAPE, 3, **settings).run(model, guide=guide)
    with pytest.raises(UserError, match="video_"):
        sampler(SHAPE, 3, guidance=2.0, **settings).run(model, guide=MetaModel(head=GaussianVelocity(), stream="video"))


def test_a_guide_is_called_whatever_the_times() -> None:
    """It may be sharded: with times of its own for each row, a rank that left it out would leave the others waiting."""
    calls = {"model": 0, "guide": 0}
    parts = []
    for name in calls:
        head = GaussianVelocity(shift=0.7)
        head.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
        parts.append(MetaModel(head=head, stream="image"))
    sampler = FlowODE(SHAPE, 3, labels=[1], num_samples=2, method="dopri5", guidance=2.0, guidance_interval=[0.3, 0.31])
    sampler.run(parts[0], guide=parts[1])
    assert calls["model"] == calls["guide"] > 6


def test_guidance_one_is_the_conditional_model() -> None:
    loaded = tiny("sit")
    labels = torch.tensor([3, 7])
    x = normal(torch.arange(2), (1, 8, 8), seed=0, purpose="x", dtype=torch.float64)
    data = {"image_noised": x, "image_time": torch.full((2,), 0.3, dtype=torch.float64)}
    conditional = loaded({**data, "image_class_id": labels})["image_prediction"]
    null = loaded({**data, "image_class_id": torch.tensor([10, 10])})["image_prediction"]
    at = torch.full((2,), 0.3, dtype=torch.float64)
    with torch.no_grad():
        # 1 + 2^-40 takes the doubled path, 1 the short one
        for w in (1.0, 1 + 2.0**-40):
            found = FlowODE((1, 8, 8), 10, guidance=w).predict(loaded, labels)(x, at)
            assert float((found - conditional).abs().max()) < 1e-10
        found = FlowODE((1, 8, 8), 10, guidance=4.0).predict(loaded, labels)(x, at)
    assert torch.allclose(found, null + 4 * (conditional - null), atol=1e-12)
    assert float((conditional - null).abs().max()) > 1e-3


def test_samples_do_not_depend_on_the_batch() -> None:
    model = tiny("sit").model
    settings = {"steps": 3, "guidance": 2.0, "num_samples": 7, "method": "heun"}
    whole = FlowODE((1, 8, 8), 10, **settings).run(model)
    parts = FlowODE((1, 8, 8), 10, batch=2, **settings).run(model)
    assert torch.allclose(whole.images, parts.images, rtol=0, atol=1e-12)
    assert whole.labels.tolist() == parts.labels.tolist() == [0, 1, 2, 3, 4, 5, 6]
    other = FlowODE((1, 8, 8), 10, seed=1, **settings).run(model)
    assert float((whole.images - other.images).abs().max()) > 0.1


def test_grid_and_png(tmp_path) -> None:
    from PIL import Image

    images = torch.stack([torch.full((3, 4, 5), value) for value in (-1.0, 0.0, 1.0, -9.0, 9.0)])
    picture = grid(images, columns=3, gap=1)
    assert picture.shape == (4 + 1 + 4, 3 * 5 + 2, 3) and picture.dtype == np.uint8
    assert [int(picture[r, c, 0]) for r, c in ((0, 0), (0, 6), (0, 12), (5, 0), (5, 6))] == [0, 128, 255, 0, 255]
    assert (picture[4] == 255).all() and (picture[5:, 12:] == 255).all()  # the gap, and the empty place
    samples = FlowODE((1, 8, 8), 10, steps=1, num_samples=20).run(tiny("sit").model)
    path = samples.save(tmp_path / "new" / "out.png")
    assert np.array_equal(np.asarray(Image.open(path)), samples.grid()[..., 0]) and samples.grid().shape == (18, 98, 1)
    with pytest.raises(UserError, match="4 channels"):
        grid(torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shape": [28, 28]}, "channels, height, width"),
        ({"method": "huen"}, "Did you mean 'heun'"),
        ({"steps": 0}, "steps is 0"),
        ({"method": "dopri5", "shift": 3.0}, "shift is 3.0, but dopri5"),
        ({"atol": 1e-3}, "atol given, but the method 'euler'"),
        ({"guidance": -1.0}, "guidance is -1"),
        ({"labels": [10]}, "label 10"),
        ({"labels": []}, "labels is empty"),
        ({"stream": "video"}, "reads 'image_noised'.*Did you mean 'video_noised'"),
        ({"shape": [1, 4, 4]}, "PatchEmbed got images"),
    ],
)
def test_bad_settings(settings, words) -> None:
    with pytest.raises(UserError, match=words):
        FlowODE(**({"shape": [1, 8, 8], "classes": 10, "steps": 1} | settings)).run(tiny("sit").model)
