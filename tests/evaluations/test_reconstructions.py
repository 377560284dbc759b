"""PSNR and SSIM against scikit-image, and the evaluation of reconstructions on one process and on two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from l3m_like.core import MetaModel, ReadWriteBlock
from l3m_like.core.errors import UserError
from l3m_like.distributed.mesh import build_mesh
from l3m_like.evaluations import Findings, Reconstruction
from l3m_like.evaluations.reconstruction import ssim
from l3m_like.losses.reconstruction import psnr
from tests.distributed.pool import run as on_ranks
from tests.evaluations.test_image_sets import Corners


@pytest.mark.parametrize("channels", [1, 3])
def test_by_scikit_image(channels) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, channels, 24, 31, generator=generator).cumsum(-1) * 8
    y = (x + 20 * torch.randn(x.shape, generator=generator)).round().clamp(0, 255)
    x = x.round().clamp(0, 255)
    for number, (one, other) in enumerate(zip(x.double().numpy(), y.double().numpy(), strict=True)):
        expected = peak_signal_noise_ratio(one, other, data_range=255)
        assert float(psnr(x.double() / 127.5 - 1, y.double() / 127.5 - 1)[number]) == pytest.approx(expected, rel=1e-12)
        settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
        expected = structural_similarity(one, other, channel_axis=0, **settings)
        assert float(ssim(x, y)[number]) == pytest.approx(expected, rel=1e-10)
    assert torch.allclose(ssim(x, x), torch.ones(2, dtype=torch.float64)) and (psnr(x / 255, x / 255) == 120).all()
    with pytest.raises(UserError, match="11x11"):
        ssim(x[..., :10], y[..., :10])


class Darker(ReadWriteBlock):
    """image -> image, made darker by a parameter."""

    outputs = ("reconstruction",)

    def __init__(self, **ports: Any) -> None:
        super().__init__(**ports)
        self.factor = torch.nn.Parameter(torch.tensor(0.9))

    def compute(self, image: Tensor) -> Tensor:
        return image * self.factor - 0.05


def quality_on(axes: dict[str, int], batch: int) -> dict[str, float]:
    from l3m_like.config import RunConfig
    from tests.generate.tiny import CONFIGS

    data = RunConfig.from_file(CONFIGS / "sit.yaml").instantiate("evals.heldout.data")
    model = MetaModel(trunk=Darker(), stream="image")
    quality = Reconstruction(data, batch=batch, samples=23, shown=5, columns=3, extractor=Corners())
    found, again = (quality.evaluate(model, mesh=build_mesh(axes), step=0, seed=0, folder=CONFIGS) for _ in range(2))
    assert again.values == found.values  # with the images' features of before
    assert found.notes == {"images": "23", "extractor": "corners"}
    assert tuple(found.images["grid"].shape[:2]) == (4 * 30 - 2, 3 * 30 - 2)
    return dict(found.values)


def test_same_on_every_mesh() -> None:
    expected = quality_on({}, 7)
    assert set(expected) == {"psnr", "ssim", "l1", "rfid"} and 20 < expected["psnr"] < 40 and 0.8 < expected["ssim"] < 1
    for found in (quality_on({}, 3), *on_ranks(2, quality_on, {"dp_replicate": 2, "dp_shard": 1}, 7)):
        assert found == pytest.approx(expected, rel=1e-6)


def test_a_note_does_not_take_the_place_of_a_value() -> None:
    with pytest.raises(UserError, match="'lpips' is a value and a note"):
        Findings({"lpips": 0.1}, notes={"lpips": "of a network with random weights"})
