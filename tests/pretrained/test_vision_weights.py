"""Published vision models, read by `init.from`, compute what their classes compute; written again, their classes read them."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from l3m_like import load
from l3m_like.config import RunConfig
from l3m_like.config.schema import Init
from l3m_like.core.errors import UserError
from l3m_like.core.random import uniform
from l3m_like.core.torchvision_ops import allow_torchvision
from l3m_like.distributed.mesh import build_mesh
from l3m_like.layers import sincos_positions
from l3m_like.pretrained.vit import sinusoids
from l3m_like.training.checkpoint import Checkpointer
from l3m_like.training.export import export
from tests.distributed.pool import run as on_ranks
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
    #: what is not published
    random: list[str] = field(default_factory=list)


def timm() -> Any:
    """Not imported above: other processes import this module."""
    return importlib.import_module("timm")


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
        [*SIZE, "mlp_dim=48"],
        lambda: transformers.Aimv2VisionModel(
            transformers.Aimv2VisionConfig(**VISION | {"intermediate_size": 48}, use_head=False, is_native=False)
        ),
        ["preprocessor.text", "postprocessor.join", "postprocessor.decoder", "head"],
    ),
    "timm": Kind(
        "vit",
        [*SIZE, "classes=5", "drop_path=0"],
        lambda: timm().create_model(
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
            timm().models.save_for_hf(model.float(), root / kind, safe_serialization=True)
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


#: composing a config takes longer than all else here, so that is done once
composed = cache(RunConfig.from_file)


@pytest.fixture(autouse=True)
def runs_are_composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunConfig, "from_file", lambda path: copy.deepcopy(composed(path)))


def config(experiment: str, where: Path | None, *overrides: str, **init: Any) -> RunConfig:
    cfg = copy.deepcopy(composed(CONFIGS / f"{experiment}.yaml", overrides))
    cfg.init = None if where is None else Init(from_=str(where), **init)
    return cfg


def start(kind: str, where: Path, *overrides: str, **init: Any) -> Any:
    which = KINDS[kind]
    init.setdefault("random", which.random)
    return load(config(which.experiment, where, *which.overrides, *overrides, **init), dtype="float64").model


def saved(cfg: RunConfig, model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A run's directory with such weights."""
    folder.mkdir()
    cfg.save(folder)
    checkpointer = Checkpointer(folder / "checkpoints", asynchronous=False)
    checkpointer.save(1, {f"model/{name}": p.detach().to(dtype) for name, p in model.named_parameters()}, {"step": 1})
    checkpointer.close()
    return folder


def reload(kind: str, folder: Path) -> nn.Module:
    """As the class reads its own folders; nothing is missing, and nothing too much."""
    if kind == "timm":
        return exact(timm().create_model(f"local-dir:{folder}", pretrained=True))
    made = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, info = made.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return exact(model)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str, published, tmp_path) -> None:
    """With the folder that the run began from, and when it is gone: then config.json says what follows from the model."""
    which, theirs = KINDS[kind], published[kind][1]
    source = shutil.copytree(published[kind][0], tmp_path / "source")
    model = start(kind, source)
    same(kind, model, theirs)
    saved(config(which.experiment, source, *which.overrides), model, tmp_path / "run")
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
    if kind != "timm":  # whose config.json has them
        allow_torchvision()
        seen = transformers.AutoImageProcessor.from_pretrained(tmp_path / "without", backend="pil")
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8))
        pixels = torch.tensor(np.asarray(seen(picture)["pixel_values"][0]))
        torch.testing.assert_close(pixels, torch.tensor(np.asarray(picture)).movedim(-1, 0) / 127.5 - 1, rtol=0, atol=1e-5)


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
    overrides = [*VIT, *overrides]
    with pytest.raises(UserError, match=r"head.proj.weight|num_classes is 5 there and 7 here"):
        load(config("vit", where, *overrides, family=family))
    model = load(config("vit", where, *overrides, family=family, random=["head"]), dtype="float64").model
    data = batch()
    with torch.no_grad():
        features = model(data, model.inference())["image_features"]
    check_values(features, features_of(kind, theirs, data["image"]))
    fresh = load(config("vit", None, *overrides), dtype="float64").model
    assert torch.equal(model.head.proj.weight, fresh.head.proj.weight)


COLOURS = "colours={{_target_: l3m_like.layers.Colours, mean: {0}, std: {1}}}"
CLIPS = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def write(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields))


def test_a_tuned_head_is_read_by_timm(published, tmp_path) -> None:
    """Where the source's arguments name its number of classes, which timm takes before all else."""
    source = shutil.copytree(published["timm"][0], tmp_path / "source")
    there = json.loads((source / "config.json").read_text())
    there["model_args"] = {**there.get("model_args", {}), "num_classes": 5, "global_pool": "token"}
    there["pretrained_cfg"] |= {"crop_pct": 0.8, "interpolation": "bilinear", "mean": CLIPS[0], "std": CLIPS[1]}
    write(source / "config.json", there)
    with pytest.raises(UserError, match=r"images have the mean \[0.48.* there, .*set colours: {_target_: .*, mean: \[0.48"):
        load(config("vit", source, *VIT, random=["head"]))
    cfg = config("vit", source, *VIT, COLOURS.format(*CLIPS), random=["head"])
    model = load(cfg, dtype="float64").model
    saved(cfg, model, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    mine = json.loads((tmp_path / "out" / "config.json").read_text())
    assert mine["num_classes"] == mine["model_args"]["num_classes"] == mine["pretrained_cfg"]["num_classes"] == 7
    assert {name: mine["pretrained_cfg"][name] for name in ("crop_pct", "interpolation")} == {
        "crop_pct": 0.8, "interpolation": "bilinear"
    }  # fmt: skip
    assert (mine["pretrained_cfg"]["mean"], mine["pretrained_cfg"]["std"]) == CLIPS
    again, data = reload("timm", tmp_path / "out"), batch()
    with torch.no_grad():
        mean, std = (torch.tensor(numbers, dtype=torch.float64).view(3, 1, 1) for numbers in CLIPS)
        right = again(((data["image"] + 1) / 2 - mean) / std)
        found = model(data, model.inference())["image_logits"]
    assert right.shape == (3, 7) and torch.allclose(found, right, atol=1e-5)


def test_colours_of_a_folder(published, tmp_path) -> None:
    """They are compared with the model's, and an export writes the model's."""
    source = shutil.copytree(published["clip"][0], tmp_path / "source")
    preprocessor = {"crop_size": 28, "image_mean": CLIPS[0], "image_std": CLIPS[1]}
    write(source / "preprocessor_config.json", preprocessor)
    with pytest.raises(UserError, match=r"images have the mean \[0.48.* there, \[0.5, 0.5, 0.5\] and .* here; set colours: "):
        start("clip", source)
    preset = composed(CONFIGS / "clip_b16.yaml", ("+preset=clip_colours",)).to_dict()["model"]["image"]["preprocessor"]["colours"]
    assert (preset["mean"], preset["std"]) == CLIPS
    start("clip", source, COLOURS.format(*CLIPS))
    write(source / "preprocessor_config.json", preprocessor | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    with pytest.raises(UserError, match="here; set colours: null"):
        start("clip", source, COLOURS.format(*CLIPS))
    which = KINDS["clip"]
    model = load(config("clip", None, *which.overrides)).model
    saved(config("clip", source, *which.overrides, COLOURS.format(*CLIPS)), model, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == preprocessor
    export(tmp_path / "run", tmp_path / "half", dtype=torch.bfloat16)
    wide = [n for n, value in load_file(tmp_path / "half" / "model.safetensors").items() if value.dtype != torch.bfloat16]
    assert wide == ["logit_scale"]  # which is read as it is stored


def own_state(theirs: nn.Module) -> dict[str, Tensor]:
    """An ``Aimv2VisionModel`` under the names of AIMv2's own files."""
    there = theirs.state_dict()
    state = {
        "preprocessor.patchifier.proj.weight": there["embeddings.patch_embed.weight"],
        "preprocessor.patchifier.proj.bias": there["embeddings.patch_embed.bias"],
        "preprocessor.patchifier.norm.weight": there["embeddings.rms_norm.weight"],
        "preprocessor.pos_embed": there["embeddings.position_embedding.weight"][None],
        "trunk.post_trunk_norm.weight": there["rms_norm.weight"],
    }
    for i in range(2):
        layer, own = f"encoder.layers.{i}", f"trunk.blocks.{i}"
        state[f"{own}.attn.qkv.weight"] = torch.cat([there[f"{layer}.attention.{x}_proj.weight"] for x in "qkv"])
        state[f"{own}.attn.proj.weight"] = there[f"{layer}.attention.out_proj.weight"]
        for name, left in (("norm_1", "rms_norm1"), ("norm_2", "rms_norm2"), ("mlp.fc1", "ffn.gate_proj")):
            state[f"{own}.{name}.weight"] = there[f"{layer}.{left}.weight"]
        for name, left in (("mlp.fc3", "ffn.up_proj"), ("mlp.fc2", "ffn.down_proj")):
            state[f"{own}.{name}.weight"] = there[f"{layer}.{left}.weight"]
    return {name: value.float().clone() for name, value in state.items()}


def test_own_folders_of_aimv2(published, tmp_path) -> None:
    """Read as safetensors and as an old folder has them; written with the same tensors."""
    kind = "aimv2_vision_model"
    theirs, folder, old = published[kind][1], tmp_path / "own", tmp_path / "old"
    fields = {**VISION, "intermediate_size": 48, "num_channels": 3, "rms_norm_eps": 1e-5, "qkv_bias": False, "use_bias": False}
    state = own_state(theirs)
    for where in (folder, old):
        where.mkdir()
        (where / "config.json").write_text(json.dumps({"model_type": "aimv2", "architectures": ["AIMv2Model"], **fields}))
    save_file(state, folder / "model.safetensors")
    torch.save(state, old / "pytorch_model.bin")
    same(kind, start(kind, folder), theirs)
    model = start(kind, old)
    same(kind, model, theirs)
    saved(config("aimv2", folder, *KINDS[kind].overrides), model, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == state.keys() and all(torch.equal(written[name], value) for name, value in state.items())


class FirstAIM(nn.Module):
    """The image tower of AIM, with the names of its files."""

    def __init__(self) -> None:
        super().__init__()
        norm = lambda: nn.LayerNorm(32, eps=1e-6)  # noqa: E731
        self.preprocessor, self.trunk = nn.Module(), nn.Module()
        self.preprocessor.patchifier = nn.ModuleDict({"proj": nn.Conv2d(3, 32, 14, 14), "norm": norm()})
        self.trunk.blocks = nn.ModuleList()
        for _ in range(2):
            block = nn.ModuleDict({"norm_1": norm(), "norm_2": norm(), "attn": nn.Module(), "mlp": nn.Module()})
            for part, maps in (("attn", {"qkv": (32, 96), "proj": (32, 32)}), ("mlp", {"fc1": (32, 128), "fc2": (128, 32)})):
                for name, sizes in maps.items():
                    block[part].add_module(name, nn.Linear(*sizes, bias=False))
            self.trunk.blocks.append(block)
        self.trunk.post_trunk_norm = norm()

    def forward(self, image: Tensor) -> Tensor:
        patches: Any = self.preprocessor.patchifier
        x = patches["norm"](patches["proj"](image).flatten(2).mT)
        x = x + sincos_positions(2, 2, 32, x.dtype, x.device)
        for block in self.trunk.blocks:
            q, k, v = block["attn"].qkv(block["norm_1"](x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            mixed = (q @ k.mT / 8**0.5).softmax(-1) @ v
            x = x + block["attn"].proj(mixed.transpose(1, 2).flatten(2))
            x = x + block["mlp"].fc2(nn.functional.gelu(block["mlp"].fc1(block["norm_2"](x))))
        return self.trunk.post_trunk_norm(x)


def test_files_of_aim(tmp_path) -> None:
    theirs = FirstAIM().double()
    perturb(theirs)
    torch.save({**theirs.state_dict(), "head.cls_token": torch.zeros(1, 1, 32)}, tmp_path / "aim.pth")
    cfg = config("aimv1", tmp_path / "aim.pth", *SIZE, random=["head"])
    model = load(cfg, dtype="float64").model
    image = batch()["image"]
    with torch.no_grad():
        found = model({"image": image, "row": torch.arange(3)}, model.inference())["image_features"]
        check_values(found, theirs(image))
    saved(cfg, model, tmp_path / "run", torch.float64)
    said = export(tmp_path / "run", tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert any("training alone is left out: head" in line for line in said)
    assert all(torch.equal(written[name], value) for name, value in theirs.state_dict().items())
    assert written.keys() == theirs.state_dict().keys()


# ---- meshes, and what does not fit ---------------------------------------------------------------------------------------------


def on_a_mesh(folder: Path) -> bool:
    """On a rank: every parameter is that of one process."""
    cfg = config("siglip", folder, *KINDS["siglip"].overrides)
    whole = dict(load(cfg).model.named_parameters())
    cut = dict(load(cfg, mesh=build_mesh({"dp_shard": 2})).model.named_parameters())
    shards = [p for p in cut.values() if p.to_local().numel() < p.numel()]
    return len(shards) > 30 and cut.keys() == whole.keys() and all(torch.equal(p.full_tensor(), whole[n]) for n, p in cut.items())


def test_two_ranks_read_the_same(published) -> None:
    assert on_ranks(2, on_a_mesh, published["siglip"][0]) == [True, True]


def changed(kind: str, where: Path, folder: Path, **tensors: Tensor | None) -> Path:
    shutil.copytree(where, folder)
    state = load_file(folder / "model.safetensors") | tensors
    save_file({name: value for name, value in state.items() if value is not None}, folder / "model.safetensors")
    return folder


def test_what_does_not_fit_is_named(published, tmp_path) -> None:
    def refused(words: str, kind: str, where: Path, *overrides: str, **init: Any) -> None:
        with pytest.raises(UserError, match=words):
            start(kind, where, *overrides, **init)

    clip, mae = published["clip"][0], published["vit_mae"][0]
    refused("text_config.num_hidden_layers is 2 there and 3 here; set text_layers: 2", "clip", clip, "text_layers=3")
    refused(
        "model_type is siglip there, but the model is another: its mask is causal, where full", "clip", published["siglip"][0]
    )
    refused("layer_norm_eps is 1e-12 there and 1e-06 here; set norm_eps", "vit_mae", mae, "norm_eps=1e-6")
    refused("model_args.num_heads is 4 there and 8 here; set heads: 4", "timm", published["timm"][0], "heads=8")
    refused(
        "init.random: 'heads' is nothing in the model that has weights. Did you mean 'head'",
        "timm",
        published["timm"][0],
        random=["heads"],
    )
    lacking = changed("clip", clip, tmp_path / "lacking", **{"visual_projection.weight": None})
    refused("it holds no 'visual_projection.weight', needed for 'image.head.proj.weight'", "clip", lacking)
    extra = changed("clip", clip, tmp_path / "extra", **{"visual_projection.bias": torch.zeros(24)})
    refused("it holds 'visual_projection.bias', for which the model has no place", "clip", extra)
    places = load_file(mae / "model.safetensors")["decoder.decoder_pos_embed"]
    other = changed("vit_mae", mae, tmp_path / "other", **{"decoder.decoder_pos_embed": places.roll(8, dims=-1).contiguous()})
    refused("'decoder.decoder_pos_embed', which is computed here, is another there: numbers differ by up to", "vit_mae", other)
