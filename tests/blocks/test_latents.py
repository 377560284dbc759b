"""Latents: noise that depends on the row alone, statistics there and back; losses of an autoencoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from l3m_like.blocks import LatentNoise, NormalizeLatent
from l3m_like.core import MetaModel
from l3m_like.core.errors import UserError
from l3m_like.losses import PSNR, FoolDiscriminator, MeanLPIPS, PixelL1, TellApart
from l3m_like.training.init import initialize

LATENT = torch.randn(4000, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def test_noise_has_the_published_strength() -> None:
    """A deviation drawn per row, uniform in [0, strength]: its mean square is strength^2 / 3."""
    block, row = LatentNoise(seed=1, strength=0.8, stream="image"), torch.arange(4000)
    code = block({"image_latent": LATENT, "row": row})["image_code"]
    noise = code - LATENT
    assert float(noise.square().mean()) == pytest.approx(0.8**2 / 3, rel=0.05)
    deviations = noise.flatten(1).square().mean(1).sqrt()
    assert float(deviations.quantile(0.1)) < 0.15 and float(deviations.quantile(0.9)) > 0.6
    part = block({"image_latent": LATENT[7:9], "row": row[7:9]})["image_code"]
    assert torch.equal(part, code[7:9])
    assert torch.equal(block({"image_latent": LATENT, "row": row}, True)["image_code"], LATENT)  # at inference as it is


def test_statistics_there_and_back(tmp_path: Path) -> None:
    path = str(tmp_path / "latents.safetensors")
    latent = LATENT * torch.linspace(0.5, 2, 12).view(3, 2, 2) + 3
    save_file({"mean": latent.mean(0), "variance": latent.var(0, unbiased=False)}, path)
    model = MetaModel(
        NormalizeLatent(path, [3, 2, 2]),
        NormalizeLatent(path, [3, 2, 2], inverse=True, reads={"latent": "image_normalized"}, writes={"normalized": "image_back"}),
        stream="image",
    )
    initialize(model, seed=0)
    assert not any(p.requires_grad for p in model.parameters())
    out = model({"image_latent": latent})
    normal = out["image_normalized"]
    torch.testing.assert_close(normal.mean(0), torch.zeros(3, 2, 2), atol=1e-4, rtol=0)
    torch.testing.assert_close(normal.std(0), torch.ones(3, 2, 2), atol=1e-3, rtol=0)
    torch.testing.assert_close(out["image_back"], latent, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="its statistics"):
        model({"image_latent": latent[:, :, :1]})
    with pytest.raises(UserError, match=r"cannot be read"):
        initialize(MetaModel(NormalizeLatent(path + "x", [3, 2, 2])), seed=0)
    with pytest.raises(UserError, match=r"has the shape \[3, 2, 2\]"):
        initialize(MetaModel(NormalizeLatent(path, [3, 2, 1])), seed=0)


def mean_of(loss, data: dict[str, torch.Tensor]) -> float:
    value, count = loss.term(data, float(loss.count_of(data)))
    return float(value) / float(count)


def test_losses_are_what_they_say() -> None:
    generator = torch.Generator().manual_seed(2)
    image, other = (torch.rand(3, 1, 4, 4, generator=generator) * 2 - 1 for _ in range(2))
    fake, real = (torch.randn(3, 7, generator=generator) * 2 for _ in range(2))
    data = {"image": image, "image_reconstruction": other, "image_fake_logits": fake, "image_real_logits": real}
    data["image_lpips"] = torch.tensor([0.1, 0.2, 0.6])
    assert mean_of(PixelL1(stream="image"), data) == pytest.approx(float((image - other).abs().mean()), rel=1e-6)
    assert mean_of(MeanLPIPS(stream="image"), data) == pytest.approx(0.3)
    squares = ((image - other) / 2).square().flatten(1).mean(1)
    assert mean_of(PSNR(stream="image"), data) == pytest.approx(float(-10 * squares.log10().mean()), rel=1e-5)
    hinge = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
    assert mean_of(TellApart(stream="image"), data) == pytest.approx(float(hinge), rel=1e-6)
    assert mean_of(FoolDiscriminator(stream="image"), data) == pytest.approx(-float(fake.mean()), rel=1e-6)
    plain = -(real.sigmoid().log().mean() + (-fake).sigmoid().log().mean()) / 2
    assert mean_of(TellApart("non_saturating", stream="image"), data) == pytest.approx(float(plain), rel=1e-5)
    fooled = -fake.sigmoid().log().mean()
    assert mean_of(FoolDiscriminator("non_saturating", stream="image"), data) == pytest.approx(float(fooled), rel=1e-5)
    with pytest.raises(UserError, match="Did you mean 'hinge'"):
        TellApart("hing")
