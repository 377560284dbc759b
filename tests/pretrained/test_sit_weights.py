"""Published SiT files and diffusers' folders: read, compared with the class of diffusers, written."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from torch import Tensor

from l3m_like import load
from l3m_like.core.errors import UserError
from l3m_like.core.torchvision_ops import allow_torchvision
from l3m_like.pretrained import NameMap, export_state
from l3m_like.pretrained.sit import SIZES, sit_names
from l3m_like.training.export import export, import_folder
from tests.generate.tiny import CONFIGS, save_run, tiny
from tests.parity.rule import check_values

TINY = ["dim=48", "layers=2", "heads=4", "image_size=8", "patch=2", "classes=10"]
LATENTS = [*TINY, "channels=4", "out_channels=8"]


def reference(width: int, heads: int, layers: int, patch: int = 2, classes: int = 10) -> torch.nn.Module:
    """diffusers' class with weights that are nowhere zero."""
    allow_torchvision()
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=4, out_channels=8, num_layers=layers,
        sample_size=8, patch_size=patch, num_embeds_ada_norm=classes, norm_type="ada_norm_zero",
        norm_elementwise_affine=False, norm_eps=1e-6, activation_fn="gelu-approximate", attention_bias=True,
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks:  # the published model has one time and label embedding
            block.norm1.emb.load_state_dict(first)
    return model


class Sinusoid(torch.nn.Module):
    """As SiT has it (diffusers divides by half - 1), in float64."""

    def forward(self, time: Tensor) -> Tensor:
        angle = time.double()[:, None] * 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
        return torch.cat((angle.cos(), angle.sin()), dim=-1)


def positions(side: int, width: int) -> Tensor:
    """The published sincos grid in float64: column first, then row, [sin | cos] each."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    places = [(x * omega, y * omega) for y in range(side) for x in range(side)]
    return torch.stack([torch.cat((x.sin(), x.cos(), y.sin(), y.cos())) for x, y in places])


def outputs(model: torch.nn.Module, theirs: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Both in float64, on the same input."""
    theirs = theirs.double()
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj = Sinusoid()
    side, width = 8 // theirs.config.patch_size, theirs.inner_dim
    theirs.pos_embed.pos_embed = positions(side, width).unsqueeze(0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 8, 8, generator=generator, dtype=torch.float64)
    time, label = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([3, 10, 0])
    with torch.no_grad():
        expected = theirs(x, timestep=time, class_labels=label).sample[:, :4]
        data = {"image_noised": x, "image_time": time, "image_class_id": label}
        return model(data, model.inference())["image_prediction"], expected


@pytest.mark.parametrize("size", [pytest.param(name, marks=() if name == "S" else pytest.mark.slow) for name in SIZES])
def test_folder_of_diffusers(size, tmp_path) -> None:
    """The published widths, one layer deep."""
    _, width, heads = SIZES[size]
    theirs = reference(width, heads, 1)
    theirs.save_pretrained(tmp_path)
    shape = [
        f"dim={width}",
        f"heads={heads}",
        "layers=1",
        "image_size=8",
        "patch=2",
        "classes=10",
        "channels=4",
        "out_channels=8",
    ]
    loaded = load(CONFIGS / "sit.yaml", dtype="float64", overrides=[*shape, f"+init.from={tmp_path}"])
    found, expected = outputs(loaded.model, theirs)
    check_values(found, expected)
    with pytest.raises(UserError, match=r"num_attention_heads is \d+ there and 2 here; set heads"):
        load(CONFIGS / "sit.yaml", overrides=[*shape, "heads=2", f"+init.from={tmp_path}"])


def test_there_and_back(tmp_path) -> None:
    """A run's averaged weights as a folder of diffusers, which its class loads and computes with; and into a run again."""
    allow_torchvision()
    from diffusers import DiTTransformer2DModel

    run = save_run(tmp_path / "run", "sit", *LATENTS, "sample=null", "evals=null")
    said = export(run, tmp_path / "out", ema=True)
    assert "DiTTransformer2DModel" in said[-1] and (tmp_path / "out" / "diffusion_pytorch_model.safetensors").is_file()
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "out", torch_dtype=torch.float64)
    saved = load(run, ema=True).model
    found, expected = outputs(saved, theirs)
    check_values(found, expected)
    again = load(CONFIGS / "sit.yaml", dtype="float64", overrides=[*LATENTS, f"+init.from={tmp_path / 'out'}"]).model
    for name, parameter in saved.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], parameter), name


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """A file as SiT's training writes it."""
    model = tiny("sit", *LATENTS).model.float()
    state = dict(model.named_parameters())
    theirs = {k: v.detach().clone() for k, v in export_state(NameMap(sit_names(channels=4, patch=2), state), state).items()}
    theirs["pos_embed"] = positions(4, 48).float().unsqueeze(0)
    trained = {name: value + 1 for name, value in theirs.items()}
    args = argparse.Namespace(model="SiT-XL/2", image_size=256, num_classes=1000)
    path = tmp_path_factory.mktemp("published") / "0400000.pt"
    torch.save({"model": trained, "ema": theirs, "opt": {"state": {}, "param_groups": []}, "args": args}, path)
    return path, {name: p.detach() for name, p in model.named_parameters()}


def test_file_of_sit(published, tmp_path) -> None:
    path, expected = published
    content = torch.load(path, weights_only=False)
    torch.save(content["ema"], tmp_path / "ema.pt")  # without arguments
    torch.save({"model": content["ema"]}, tmp_path / "model.pt")
    for name in ("ema.pt", "model.pt"):
        found = load(CONFIGS / "sit.yaml", overrides=[*LATENTS, f"+init.from={tmp_path / name}"]).model
        assert all(torch.equal(p, expected[name]) for name, p in found.named_parameters())
    found = load(CONFIGS / "sit.yaml", overrides=[*LATENTS, f"+init={{from: {path}, strict: false}}"]).model
    assert all(torch.equal(p, expected[name]) for name, p in found.named_parameters()), "the averaged weights"


def test_file_there_and_back(published, tmp_path) -> None:
    """Read, written and read: the same bytes, of positions too; and a run's trained and averaged states, each by its name."""
    source = torch.load(published[0], weights_only=False)["ema"]
    torch.save(source, tmp_path / "source.pt")
    import_folder(str(tmp_path / "source.pt"), CONFIGS / "sit.yaml", tmp_path / "start", [*LATENTS, "ema=null"])
    said = export(tmp_path / "start", tmp_path / "back.pt")
    state = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    assert "SiT" in said[-1] and state.keys() == source.keys()
    assert all(state[name].dtype == value.dtype and torch.equal(state[name], value) for name, value in source.items())
    run = save_run(tmp_path / "run", "sit", *LATENTS, "sample=null", "evals=null")
    export(run, tmp_path / "both.pt")
    export(run, tmp_path / "averaged.pt", ema=True)
    both, averaged = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("both", "averaged"))
    assert set(both) == {"model", "ema"} and all(torch.equal(both["ema"][name], averaged[name]) for name in source)
    found = load(CONFIGS / "sit.yaml", dtype="float64", overrides=[*LATENTS, f"+init.from={tmp_path / 'both.pt'}"]).model
    right = load(run, ema=True).model.get_parameter("head.proj.weight")
    assert torch.equal(found.get_parameter("head.proj.weight"), right)
    with pytest.raises(UserError, match=r"SiT is published as a file of torch.save: give --out a name that ends in .pt"):
        export(run, tmp_path / "folder", family_name="sit")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("published", "num_layers is 28 there and 2 here; set layers: 28"),
        ({"epoch": 3}, "holds no state dict"),
        ({"weight": torch.zeros(2)}, "Name it: init.family"),
        (Path("code"), "cannot be read"),
        (None, "no such file"),
    ],
    ids=["another size", "no state", "another model", "code", "nothing"],
)
def test_files_that_do_not_fit(published, content, words, tmp_path) -> None:
    path = published[0] if content == "published" else tmp_path / "file.pt"
    if content is not None and content != "published":
        torch.save(content, path)
    with pytest.raises(UserError, match="init.from|file.pt") as raised:
        load(CONFIGS / "sit.yaml", overrides=[*LATENTS, f"+init.from={path}"])
    assert words in str(raised.value)
