"""Latents of a frozen autoencoder: computed while training, or cached; drawn anew by row; decoded for pictures."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import l3m_like
from l3m_like import load
from l3m_like.blocks import AutoencoderKLEncoder, SampleLatent
from l3m_like.config import RunConfig
from l3m_like.core.errors import UserError
from l3m_like.core.torchvision_ops import allow_torchvision
from l3m_like.generate import LatentDecoder

ROOT = Path(__file__).parents[2]
VAE: dict[str, Any] = {
    "in_channels": 1, "out_channels": 1, "latent_channels": 4, "block_out_channels": [4, 8], "layers_per_block": 1,
    "norm_num_groups": 2, "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip
TINY = ["dim=16", "layers=1", "heads=2", "image_size=14", "patch=2", "channels=4", "out_channels=4", "classes=10"]
TINY += ["flip=false", "latent_elements=784"]
FLAT = ["schedule.name=constant", "schedule.warmup=0", "parallel.precision=fp32", "parallel.compile=false"]
SHORT = ["steps=3", "batch={global: 4, micro: null}", "log={console: false, every: 1}", "checkpoint.every=null", *FLAT]
EVALS = ["evals.heldout.samples=8", "evals.heldout.every=null"]
CONFIG = f"""
defaults: [sit, preset/latents, preset/online_latents, _self_]
picture_size: 28
latent_scale: 0.5
data: {{train: {{source: {{_target_: l3m_like.data.WebDataset}}, process: {{channels: 1}}}}}}
evals: {{heldout: {{data: {{source: {{_target_: l3m_like.data.WebDataset}}, process: {{channels: 1}}}}}}}}
model: {{noise: {{encode: {{model: {{config: {json.dumps(VAE)}}}}}}}}}
"""


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    """A folder of diffusers, with weights that are nowhere zero."""
    allow_torchvision()
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(**VAE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def online(vae, tmp_path_factory) -> tuple[Path, list[str]]:
    """The experiment that encodes while it trains, and its overrides."""
    folder = tmp_path_factory.mktemp("config")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 28, 28), dtype=np.uint8)
    for name, chosen in (("train", pixels[:24]), ("heldout", pixels[24:])):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for number, picture in enumerate(chosen):
                png = io.BytesIO()
                Image.fromarray(picture).save(png, format="PNG")
                for extension, content in (("png", png.getvalue()), ("cls", str(number % 10).encode())):
                    member = tarfile.TarInfo(f"{number:03d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    (folder / "online.yaml").write_text(CONFIG)
    data = [f"images={folder}/train.tar", f"heldout_images={folder}/heldout.tar"]
    return folder / "online.yaml", [*TINY, *SHORT, *EVALS, *data, f"vae={vae}"]


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_encoder_is_that_of_diffusers(vae) -> None:
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(vae).double()
    block = AutoencoderKLEncoder(VAE, stream="image").double()
    block.load_state_dict({k: v for k, v in theirs.state_dict().items() if k.startswith(("encoder", "quant_conv"))})
    image = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        expected = theirs.encode(image).latent_dist
        moments = block({"image": image})["image_moments"]
    assert torch.allclose(moments, torch.cat((expected.mean, expected.std), 1), rtol=1e-12)
    with pytest.raises(UserError, match="Did you mean 'latent_channels'"):
        AutoencoderKLEncoder({"latent_channel": 4})


def test_a_latent_is_a_function_of_its_row() -> None:
    block = SampleLatent(seed=0, scale=0.5, shift=0.25, stream="image")
    mean, std = torch.full((400, 2, 3, 3), 1.25), torch.full((400, 2, 3, 3), 3.0)
    row = torch.arange(400)
    drawn = block({"image_moments": torch.cat((mean, std), 1), "row": row})["image_latent"]
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.05) and float(drawn.std()) == pytest.approx(1.5, abs=0.05)
    again = block({"image_moments": torch.cat((mean, std), 1)[7:8], "row": row[7:8]})["image_latent"]
    assert torch.equal(again[0], drawn[7]) and not torch.equal(drawn[7], drawn[8])


def script() -> Any:
    spec = importlib.util.spec_from_file_location("encode_script", ROOT / "run" / "encode_latents.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cached_latents_train_like_those_that_are_computed(online, tmp_path, capsys) -> None:
    """Same losses, from shards that the tool has written; and a run goes on from its checkpoint as if nothing had been."""
    path, settings = online
    computed = l3m_like.train(RunConfig.from_file(path, [*settings, f"run.dir={tmp_path}", "run.name=online"]))
    frozen = load(tmp_path / "online").model.get_submodule("noise.encode")
    assert isinstance(frozen, torch.nn.Module) and not any(p.requires_grad for p in frozen.parameters())

    arguments = ["--config", str(path), "--samples-per-shard", "10", "--batch", "5"]
    for name in ("train", "heldout"):
        assert script().main([*arguments, "--data", name, "--out", str(tmp_path / name), *settings]) == 0
    assert "24 pictures" in capsys.readouterr().out
    shards = sorted((tmp_path / "train").glob("*.tar"))
    assert [shard.name for shard in shards] == [f"part-000-{number:06d}.tar" for number in range(3)]
    shards[1].unlink()
    assert script().main([*arguments, "--out", str(tmp_path / "train"), *settings]) == 0
    assert "10 pictures" in capsys.readouterr().out and shards[1].is_file()
    assert script().main([*arguments, "--flip", "--out", str(tmp_path / "train"), *settings]) == 1
    assert "other work: flip False" in capsys.readouterr().err

    folders = [f"images={tmp_path}/train/*.tar", f"heldout_images={tmp_path}/heldout/*.tar", "latent_scale=0.5"]
    cached = [*TINY, *SHORT, *EVALS, *folders, f"run.dir={tmp_path}"]
    latents = tmp_path / "latents.yaml"
    latents.write_text("defaults: [sit, preset/latents, _self_]\n")
    found = l3m_like.train(RunConfig.from_file(latents, [*cached, "run.name=cached"]))
    assert np.allclose(losses(tmp_path / "cached"), losses(tmp_path / "online"), rtol=1e-5)
    assert found["heldout/loss"] == pytest.approx(computed["heldout/loss"], rel=1e-5)

    for steps in (2, 3):
        l3m_like.train(RunConfig.from_file(latents, [*cached, "run.name=interrupted", f"steps={steps}"]))
    assert losses(tmp_path / "interrupted") == losses(tmp_path / "cached")


def test_weights_of_old_files_and_none(online, vae, tmp_path) -> None:
    """Names of before 2023 are known; and without weights nothing runs, unless that is said."""
    from l3m_like.pretrained.autoencoder_kl import FAMILY

    state = load_file(vae / "diffusion_pytorch_model.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in state.items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        renamed[name] = value
    assert set(renamed) != set(state) and FAMILY.spellings
    (tmp_path / "config.json").write_text((vae / "config.json").read_text())
    save_file(renamed, tmp_path / "diffusion_pytorch_model.safetensors")
    path, settings = online
    models = [load(path, overrides=[*settings, f"vae={folder}"]).model for folder in (vae, tmp_path)]
    for (name, one), (_, other) in zip(*(model.noise.named_parameters() for model in models), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(UserError, match="random_weights: true"):
        l3m_like.train(RunConfig.from_file(path, [*settings[:-1], "init=null", f"run.dir={tmp_path}"]))


def test_samples_are_decoded(vae, tmp_path) -> None:
    from diffusers import AutoencoderKL

    latents = torch.randn(3, 4, 14, 14, generator=torch.Generator().manual_seed(0))
    decoded = LatentDecoder(str(vae), scale=0.5)(latents)
    with torch.no_grad():
        assert torch.allclose(decoded, AutoencoderKL.from_pretrained(vae).decode(latents / 0.5).sample, atol=1e-6)
    path = tmp_path / "latents.yaml"
    path.write_text("defaults: [sit, preset/latents, _self_]\n")
    loaded = load(path, overrides=TINY)
    decoder = {"_target_": "l3m_like.generate.LatentDecoder", "folder": str(vae)}
    images = loaded.generate(num_samples=3, steps=2, decoder=decoder)
    assert images.images.shape == (3, 1, 28, 28) and images.grid().shape[2] == 1
    with pytest.raises(UserError, match="no autoencoder in"):
        LatentDecoder(str(tmp_path))(latents)
