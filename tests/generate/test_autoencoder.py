"""Latents of an autoencoder: their statistics, and generated ones as images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from l3m_like import load
from l3m_like.core.errors import UserError
from l3m_like.data.loader import EvalLoader
from l3m_like.generate import FlowODE, decode_latents, latent_statistics
from l3m_like.generate.flow import Images
from tests.generate.tiny import CONFIGS

ENCODER = "encoder_arguments={img_size: 28, patch_size: 7, embed_dim: 16, depth: 1, num_heads: 2}"
SMALL = [ENCODER, "latent_channels=16", "dim=16", "layers=1", "heads=2"]


@pytest.fixture(scope="module")
def autoencoder():
    return load(CONFIGS / "rae.yaml", overrides=[*SMALL, "mlp_dim=32", "patch=7", "latent_size=4"])


def test_statistics_are_those_of_the_latents(autoencoder) -> None:
    data = autoencoder.config.instantiate("data.train")
    found = latent_statistics(autoencoder.model, data, samples=50, batch=20)
    batch, _ = next(iter(EvalLoader(data, batch=50)))
    with torch.no_grad():
        latent = autoencoder.model["encoder"](batch)["image_latent"].double()
    torch.testing.assert_close(found["mean"], latent.mean(0).float())
    torch.testing.assert_close(found["variance"], latent.var(0, unbiased=False).float())
    with pytest.raises(UserError, match="no part writes 'image_latnt'"):
        latent_statistics(autoencoder.model, data, samples=1, batch=1, key="image_latnt")


def test_generated_latents_become_images(autoencoder, tmp_path: Path) -> None:
    """Those of a model that makes normalised latents are what they were first."""
    path = tmp_path / "latents.safetensors"
    save_file({"mean": torch.full((16, 4, 4), 2.0), "variance": torch.full((16, 4, 4), 9.0 - 1e-5)}, path)
    normalize = f"{{_target_: l3m_like.blocks.NormalizeLatent, path: '{path}', shape: [16, 4, 4], training_only: true}}"
    head = ["head_dim=16", "head_heads=2", "head_layers=1", "head_mlp_dim=24", "mlp_dim=24"]
    latent = ["latent_size=4", "latent_elements=256", "latent=image_normalized", f"model.generator.noise.normalize={normalize}"]
    generator = load(CONFIGS / "dit_dh.yaml", overrides=[*SMALL, *head, *latent])
    samples = generator.generate(num_samples=3, steps=2)
    assert isinstance(samples, Images) and samples.images.shape == (3, 16, 4, 4)
    decoded = decode_latents(samples, autoencoder.model, generator=generator.model)
    with torch.no_grad():
        part = autoencoder.model["decoder"]
        expected = part({"image_latent": samples.images * 3 + 2}, part.inference())["image_reconstruction"]
    assert decoded.images.shape == (3, 1, 28, 28)
    torch.testing.assert_close(decoded.images, expected)
    with pytest.raises(UserError, match="it is no autoencoder"):
        decode_latents(samples, generator.model)
    with pytest.raises(UserError, match="--decode RUN"):
        samples.grid()
    assert FlowODE(shape=(1, 2, 2), classes=1, last=0.5, steps=2).times(0.0, 1.0, 2) == [0.0, 0.25, 0.5]
