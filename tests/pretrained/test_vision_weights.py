"""Published vision models, read by `init.from`, compute what their classes compute; written again, their classes read them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from l3m_like import load
from l3m_like.core.random import uniform
from l3m_like.pretrained.vit import sinusoids
from l3m_like.training.export import export, import_folder
from tests.parity.rule import check_values, perturb

CONFIGS = Path(__file__).parents[2] / "configs" / "experiment"
SIZE = ["image_size=28", "patch=14", "channels=3", "dim=32", "layers=2", "heads=4"]
TOWER = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = TOWER | {"image_size": 28, "patch_size": 14}
END = 256
TEXT = TOWER | {"vocab_size": 257, "max_position_embeddings": 8, "eos_token_id": END, "bos_token_id": 0}
CAPTIONS = ["text_dim=32", "text_layers=2", "text_heads=4", "max_tokens=8"]


@dataclass(frozen=True)
class Kind:
    """A published class, the experiment that it fits, and its overrides."""

    experiment: str
    overrides: list[str]
    make: Any


def made_mae() -> nn.Module:
    sizes = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    return transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(**VISION, **sizes, decoder_intermediate_size=64, norm_pix_loss=True, mask_ratio=0.5)
    )


def made_clip() -> nn.Module:
    text, vision = ({**part, "projection_dim": 24} for part in (TEXT, VISION))
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))


KINDS = {
    "clip": Kind("clip", [*SIZE, *CAPTIONS, "embed_dim=24", "activation=quick_gelu"], made_clip),
    "siglip": Kind(
        "siglip",
        [*SIZE, *CAPTIONS, "mlp_dim=128"],
        lambda: transformers.SiglipModel(
            transformers.SiglipConfig(text_config=TEXT | {"projection_size": 32, "pad_token_id": 0}, vision_config=VISION)
        ),
    ),
    "vit_mae": Kind(
        "mae", [*SIZE, "ratio=0.5", "decoder_dim=16", "decoder_layers=1", "decoder_heads=2", "norm_eps=1e-12"], made_mae
    ),
    "aimv2_vision_model": Kind(
        "aimv2",
        [*SIZE, "mlp_dim=48", "+init.random=[preprocessor.text,postprocessor.join,postprocessor.decoder,head]"],
        lambda: transformers.Aimv2VisionModel(
            transformers.Aimv2VisionConfig(**VISION | {"intermediate_size": 48}, use_head=False, is_native=False)
        ),
    ),
    "timm": Kind(
        "vit",
        [*SIZE, "classes=5", "drop_path=0"],
        lambda: timm.create_model(
            "vit_base_patch16_224", img_size=28, patch_size=14, embed_dim=32, depth=2, num_heads=4, num_classes=5
        ),
    ),
}


def exact(model: nn.Module) -> nn.Module:
    """In float64 all through."""
    model = model.double().eval()
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Aimv2RMSNorm":
            model.set_submodule(name, ExactNorm(module))
    for name, parameter in model.named_parameters():
        if name.endswith(("position_embeddings", "decoder_pos_embed")):
            parameter.data = sinusoids(2, parameter.shape[-1], class_token=True)
    return model


class ExactNorm(nn.Module):
    """RMSNorm without the reference's cast to float32."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, nn.Module]]:
    """``{kind: (folder, the class with its weights)}``, none of them zero."""
    root, found = tmp_path_factory.mktemp("published"), {}
    for kind, which in KINDS.items():
        model = which.make()
        perturb(model)
        exact(model)  # with the published positions
        if kind == "timm":
            timm.models.save_for_hf(model.float(), root / kind, safe_serialization=True)
        else:
            model.float().save_pretrained(root / kind)
        found[kind] = root / kind, exact(model)
    return found


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths, place = torch.tensor([3, 8, 5]), torch.arange(8)
    ids = torch.randint(1, END, (3, 8), generator=generator)
    ids = torch.where(place == lengths[:, None] - 1, END, torch.where(place < lengths[:, None], ids, 0))
    image = torch.randn(3, 3, 28, 28, generator=generator, dtype=torch.float64)
    return {
        "image": image,
        "image_label": torch.arange(3),
        "text_ids": ids,
        "text_mask": place < lengths[:, None],
        "row": torch.arange(3),
    }


def theirs_of(kind: str, model: nn.Module, data: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        if kind in ("clip", "siglip"):
            out = model(input_ids=data["text_ids"], pixel_values=data["image"])
            return [out.image_embeds, out.text_embeds, out.logits_per_image]
        if kind == "vit_mae":
            noise = uniform(data["row"], (4,), seed=0, purpose="mask_patches/image", dtype=torch.float64)
            return [model(data["image"], noise=noise).logits]
        out = model(data["image"])
        return [out if kind == "timm" else out.last_hidden_state]


def ours_of(kind: str, model: Any, data: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        if kind in ("clip", "siglip"):
            for part in model.values():
                data = part(data)
            cosines = data["image_embedding"] @ data["text_embedding"].mT
            return [data["image_embedding"], data["text_embedding"], cosines * data["logit_scale"] + data.get("logit_bias", 0)]
        if kind == "vit_mae":
            return [model(data)["image_patches"]]
        return [model(data, model.inference())["image_logits" if kind == "timm" else "image_features"]]


def same(kind: str, model: Any, theirs: nn.Module) -> None:
    data = batch()
    for found, right in zip(ours_of(kind, model, data), theirs_of(kind, theirs, data), strict=True):
        check_values(found, right)


def start(kind: str, where: Path, *overrides: str) -> Any:
    which = KINDS[kind]
    return load(
        CONFIGS / f"{which.experiment}.yaml", dtype="float64", overrides=[*which.overrides, f"+init.from={where}", *overrides]
    ).model


def reload(kind: str, folder: Path) -> nn.Module:
    """As the class reads its own folders; nothing is missing, and nothing too much."""
    if kind == "timm":
        return exact(timm.create_model(f"local-dir:{folder}", pretrained=True))
    made = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, info = made.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return exact(model)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str, published, tmp_path) -> None:
    """With the folder that the run began from, and when it is gone: then config.json says what follows from the model."""
    which, theirs = KINDS[kind], published[kind][1]
    source = shutil.copytree(published[kind][0], tmp_path / "source")
    same(kind, start(kind, source), theirs)
    import_folder(str(source), CONFIGS / f"{which.experiment}.yaml", tmp_path / "run", which.overrides)
    for out in ("with", "without"):
        said = export(tmp_path / "run", tmp_path / out)
        again = reload(kind, tmp_path / out)
        for (name, found), (_, right) in zip(again.state_dict().items(), theirs.state_dict().items(), strict=True):
            assert torch.equal(found, right), name
        for found, right in zip(theirs_of(kind, again, batch()), theirs_of(kind, theirs, batch()), strict=True):
            assert torch.equal(found, right)
        left = [line for line in said if "training alone is left out" in line]
        assert bool(left) == (kind == "aimv2_vision_model")
        if source.exists():
            mine, there = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / out, source))
            assert {name for name in there if mine.get(name) != there[name]} <= {"pretrained_cfg"}
            shutil.rmtree(source)


# ---- parts of published models, other layouts ------------------------------------------------------------------------------

VIT = [*SIZE, "classes=7", "drop_path=0"]
#: what begins with a published encoder: (kind, family, overrides of vit.yaml)
ENCODERS = {
    "clip": (
        "clip_vision_model",
        ["+model.preprocessor.bias=false", "+model.preprocessor.final_norm=layer", "model.preprocessor.positions=learned"]
        + ["+model.preprocessor.norm_eps=1e-5", "+model.trunk.layer.norm_eps=1e-5", "+model.postprocessor.norm_eps=1e-5"]
        + ["model.trunk.layer.mlp.activation=quick_gelu"],
    ),
    "vit_mae": (
        "vit_mae_encoder",
        ["positions=sincos", "+model.trunk.layer.norm_eps=1e-12", "+model.postprocessor.norm_eps=1e-12"],
    ),
    "timm": (None, []),
}


def features_of(kind: str, theirs: Any, image: Tensor) -> Tensor:
    with torch.no_grad():
        if kind == "timm":
            return theirs.forward_features(image)
        if kind == "clip":
            return theirs.vision_model.post_layernorm(theirs.vision_model(image).last_hidden_state)
        theirs.config.mask_ratio, kept = 0.0, theirs.config.mask_ratio
        out = theirs.vit(image, noise=torch.arange(4.0).expand(3, 4)).last_hidden_state
        theirs.config.mask_ratio = kept
        return out


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_with_a_new_head(kind: str, published, tmp_path) -> None:
    """Fine-tuning: the features are the published model's; the head, for other classes, is drawn as without `init`."""
    where, theirs = published[kind]
    family, overrides = ENCODERS[kind]
    begin = [f"+init.from={where}", *([] if family is None else [f"+init.family={family}"])]
    with pytest.raises(UserError, match="head.proj.weight|num_classes is 5 there and 7 here"):
        load(CONFIGS / "vit.yaml", overrides=[*VIT, *overrides, *begin])
    model = load(CONFIGS / "vit.yaml", dtype="float64", overrides=[*VIT, *overrides, *begin, "+init.random=[head]"]).model
    image = batch()["image"]
    with torch.no_grad():
        data = model({"image": image, "image_mixed": image, "row": torch.arange(3)}, model.inference())
    check_values(data["image_features"], features_of(kind, theirs, image))
    fresh = load(CONFIGS / "vit.yaml", dtype="float64", overrides=[*VIT, *overrides]).model
    assert torch.equal(model.head.proj.weight, fresh.head.proj.weight)
