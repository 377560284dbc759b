"""Weights of frozen networks from folders: timm's vision transformers and LPIPS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from l3m_like.blocks import ImageEncoder, PerceptualDistance
from l3m_like.config.schema import Init
from l3m_like.core import Frozen, MetaModel
from l3m_like.core.errors import UserError
from l3m_like.layers import LPIPS, TimmViT
from l3m_like.pretrained import NameMap, export_state
from l3m_like.pretrained.lpips import lpips_names
from l3m_like.training.start_from import load_weights
from tests.parity.rule import perturb

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
#: (name, arguments): class token; registers and layer scale; attention pooling
ENCODERS = [
    ("vit_base_patch16_224", SMALL),
    ("vit_base_patch14_reg4_dinov2", SMALL),
    ("vit_base_patch16_siglip_256", SMALL),
]


def folder(path: Path, config: dict[str, Any], state: dict[str, torch.Tensor]) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in state.items()}, path / "model.safetensors")
    return str(path)


@pytest.mark.parametrize(("name", "arguments"), ENCODERS)
def test_timm_encoders(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    """As timm computes them, without the weights of the last norm; on a larger image, with resampled positions."""
    import timm

    theirs = timm.create_model(name, num_classes=0, dynamic_img_size=True, **arguments).eval()
    perturb(theirs)
    where = folder(tmp_path / "timm", {"architecture": name, "num_classes": 0}, theirs.state_dict())
    model = MetaModel(Frozen(ImageEncoder(TimmViT(name, arguments=arguments, image_size=40)), random_weights=False), stream="image")
    load_weights(model, Init(parts={"preprocessor": where}))
    frozen = model.preprocessor
    assert isinstance(frozen, Frozen) and frozen.loaded_from == where
    image = torch.rand(2, 1, 24, 24) * 2 - 1
    latent = model({"image": image})["image_latent"]
    assert latent.shape == (2, 16, 5, 5)
    with torch.no_grad():
        theirs.norm.weight.fill_(1), theirs.norm.bias.fill_(0)
        prepared = F.interpolate(image.expand(-1, 3, -1, -1), size=(40, 40), mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(n).view(3, 1, 1) for n in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        expected = theirs.forward_features(((prepared + 1) / 2 - mean) / std)[:, theirs.num_prefix_tokens :]
    torch.testing.assert_close(latent, expected.mT.unflatten(-1, (5, 5)), atol=1e-5, rtol=1e-5)


def test_another_encoder_is_refused(tmp_path: Path) -> None:
    import timm

    theirs = timm.create_model("vit_base_patch16_224", num_classes=0, **SMALL)
    where = folder(tmp_path / "timm", {"architecture": "vit_base_patch16_224"}, theirs.state_dict())
    model = MetaModel(Frozen(ImageEncoder(TimmViT("vit_tiny_patch16_224", arguments=SMALL))))
    with pytest.raises(UserError, match="architecture is vit_base_patch16_224 there and vit_tiny_patch16_224 here"):
        load_weights(model, Init(parts={"preprocessor": where}))
    with pytest.raises(UserError, match="timm cannot make 'resnet18'"):
        TimmViT("resnet18")


def test_lpips_folder(tmp_path: Path) -> None:
    theirs = LPIPS("alex")
    perturb(theirs)
    state = export_state(NameMap.of(lpips_names("alex"), theirs), dict(theirs.named_parameters()))
    state = {name: value.clone() for name, value in state.items()} | {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    where = folder(tmp_path / "lpips", {"model_type": "lpips_alex"}, state)
    model = MetaModel(Frozen(PerceptualDistance("alex"), passes_gradients=True), stream="image")
    load_weights(model, Init(parts={"preprocessor": where}))
    x, y = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    assert torch.equal(model({"image": x, "image_reconstruction": y})["image_lpips"], theirs(y, x))
    with pytest.raises(UserError, match="LPIPS networks are"):
        load_weights(MetaModel(Frozen(PerceptualDistance("vgg"))), Init(parts={"preprocessor": where}))
