"""Texts as conditions: from data to training, with drops, and in samples with guidance."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import l3m_like
from l3m_like import load
from l3m_like.blocks import DropText, TimeTextEmbed
from l3m_like.config import RunConfig
from l3m_like.core.errors import UserError
from tests.parity.rule import perturb

TINY = ["dim=16", "layers=1", "heads=2", "image_size=8", "patch=2", "text_dim=6", "classes=3", "sample.steps=2"]
SHORT = ["steps=3", "batch={global: 4}", "log={console: false, every: 1}", "checkpoint.every=null", "label_dropout=0.5"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("texts")
    draws = np.random.default_rng(0)
    with tarfile.open(folder / "images.tar", "w") as tar:
        for number in range(12):
            png, npy = io.BytesIO(), io.BytesIO()
            Image.fromarray(draws.integers(0, 256, (8, 8), dtype=np.uint8)).save(png, format="PNG")
            np.save(npy, draws.standard_normal(6))
            for extension, content in (("png", png.getvalue()), ("npy", npy.getvalue())):
                member = tarfile.TarInfo(f"{number:03d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    np.save(folder / "prompts.npy", draws.standard_normal((3, 6)))
    (folder / "text.yaml").write_text("defaults: [sit, preset/text_embeddings, _self_]\n")
    return folder / "text.yaml", [*TINY, *SHORT, f"images={folder}/images.tar", f"prompts={folder}/prompts.npy"]


def test_trains_and_samples(experiment, tmp_path) -> None:
    path, settings = experiment
    metrics = l3m_like.train(RunConfig.from_file(path, [*settings, f"run.dir={tmp_path}", "run.name=text"]))
    assert metrics["step"] == 3 and np.isfinite(metrics["loss"])
    assert len(list((tmp_path / "text" / "images").glob("*.png"))) == 1
    loaded = load(tmp_path / "text")
    perturb(loaded.model)
    plain, guided = (loaded.generate(num_samples=4, guidance=guidance).images for guidance in (1.0, 3.0))
    assert not torch.equal(plain, guided), "the rows without text are those of another condition"
    np.save(tmp_path / "other.npy", np.random.default_rng(1).standard_normal((3, 6)))
    other = loaded.generate(num_samples=4, guidance=1.0, embeddings=str(tmp_path / "other.npy")).images
    assert not torch.equal(plain, other)
    with pytest.raises(UserError, match=r"\[classes, E\] with 3"):
        np.save(tmp_path / "two.npy", np.zeros((2, 6)))
        loaded.generate(embeddings=str(tmp_path / "two.npy"))


def test_a_dropped_text_does_not_matter() -> None:
    block = TimeTextEmbed(6, 16, stream="image").double()
    perturb(block)
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    time, kept = torch.tensor([0.5] * 4), torch.tensor([True, False, True, False])
    one, other = (block({"image_time": time, "image_text": t, "image_text_kept": kept})["image_condition"] for t in texts)
    assert torch.equal(one[~kept], other[~kept]) and torch.equal(one[1], one[3])
    assert not torch.isclose(one[kept], other[kept]).any()
    every = block({"image_time": time, "image_text": texts[0]})["image_condition"]
    assert torch.equal(every[kept], one[kept])
    row = torch.arange(4000)
    dropped = ~DropText(0, 0.25, stream="image")({"row": row})["image_text_kept"]
    assert float(dropped.double().mean()) == pytest.approx(0.25, abs=0.02)
    assert torch.equal(dropped[7:9], ~DropText(0, 0.25, stream="image")({"row": row[7:9]})["image_text_kept"])
