"""Our RAE decoder against diffusers' ``AutoencoderRAE``: image and all gradients."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderRAE
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from rule import check_gradients, check_values, gradients, perturb
from torch import Tensor

from l3m_like import load
from l3m_like.blocks import PatchEmbed, PatchPixels, Transformer
from l3m_like.core import MetaModel
from l3m_like.core.errors import UserError
from l3m_like.layers import MLP, Attention, TransformerLayer
from l3m_like.pretrained import NameMap, export_state, family, import_state
from l3m_like.training.export import export
from tests.generate.tiny import CONFIGS, save_run

LATENT, DIM, LAYERS, HEADS, MLP_DIM, PATCH, SIDE = 64, 48, 2, 4, 96, 4, 5
#: names in diffusers, and in the published files
NAMES = {
    "attention.to_q": "attention.attention.query",
    "attention.to_k": "attention.attention.key",
    "attention.to_v": "attention.attention.value",
    "attention.to_out.0": "attention.output.dense",
}
VANISHING = {"k_proj.bias": "softmax ignores what all keys have in common"}


def ours_of(dtype: torch.dtype) -> MetaModel:
    layer = partial(
        TransformerLayer, norm="layer", norm_eps=1e-12, mixer=partial(Attention, num_heads=HEADS, bias=True),
        mlp=partial(MLP, hidden_dim=MLP_DIM, activation="gelu"),
    )  # fmt: skip
    model = MetaModel(
        preprocessor=PatchEmbed(SIDE, 1, LATENT, DIM, class_token=True, reads={"image": "image_code"}),
        trunk=Transformer(DIM, LAYERS, layer, mask="full"),
        head=PatchPixels(DIM, SIDE * PATCH, PATCH),
        stream="image",
    ).to(dtype)
    perturb(model)
    return model


def reference_of(dtype: torch.dtype) -> AutoencoderRAE:
    model = AutoencoderRAE(
        encoder_type="dinov2", encoder_hidden_size=LATENT, encoder_patch_size=14, encoder_num_hidden_layers=1,
        decoder_hidden_size=DIM, decoder_num_hidden_layers=LAYERS, decoder_num_attention_heads=HEADS,
        decoder_intermediate_size=MLP_DIM, patch_size=PATCH, encoder_input_size=14 * SIDE, image_size=SIDE * PATCH,
    ).eval()  # fmt: skip
    # theirs are scaled to a grid of 16, and rounded; the published decoders have whole numbers for every grid
    places = get_2d_sincos_pos_embed(DIM, SIDE, cls_token=True, extra_tokens=1, base_size=SIDE, output_type="pt")
    model.to(dtype)
    model.decoder.decoder_pos_embed = places.to(dtype).unsqueeze(0)
    for name, numbers in (("encoder_mean", (0.485, 0.456, 0.406)), ("encoder_std", (0.229, 0.224, 0.225))):
        setattr(model, name, torch.tensor(numbers, dtype=dtype).view(1, 3, 1, 1))
    return model


def image_of(reference: AutoencoderRAE, code: Tensor) -> Tensor:
    return 2 * reference._denormalize_image(reference.decoder.unpatchify(reference.decoder(code.flatten(2).mT).logits)) - 1


def published(name: str) -> str:
    for diffusers, file in NAMES.items():
        name = name.replace(diffusers, file)
    return name.removeprefix("decoder.")


def in_diffusers(name: str) -> str:
    for diffusers, file in NAMES.items():
        name = name.replace(file, diffusers)
    return f"decoder.{name}"


def compare(dtype: torch.dtype, ours: MetaModel) -> None:
    names = NameMap.of(family("rae_decoder").templates(ours), ours)
    reference = reference_of(dtype)
    exported = {in_diffusers(name): value for name, value in export_state(names, dict(ours.named_parameters())).items()}
    missing, unexpected = reference.load_state_dict(exported, strict=False)
    assert not unexpected and not [name for name in missing if name.startswith("decoder.decoder_")]
    code = torch.randn(2, LATENT, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    weight = torch.linspace(-1, 1, 2 * 3 * (SIDE * PATCH) ** 2, dtype=dtype).view(2, 3, SIDE * PATCH, -1)
    theirs = image_of(reference, code)
    (theirs * weight).square().sum().backward()
    out = ours({"image_code": code})["image_reconstruction"]
    (out * weight).square().sum().backward()
    check_values(out.detach(), theirs.detach())
    theirs_of_ours = import_state(names, {published(name): gradient for name, gradient in gradients(reference).items()})
    check_gradients(gradients(ours), theirs_of_ours, vanishing=VANISHING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_equals_diffusers(dtype: torch.dtype) -> None:
    compare(dtype, ours_of(dtype))


def _tanh_gelu(model: MetaModel) -> None:
    model.trunk.layers[0].mlp.activation = "gelu_tanh"


def _other_eps(model: MetaModel) -> None:
    model.head.norm.eps = 1e-5


def _transposed_patches(model: MetaModel) -> None:
    forward = model.head.forward
    model.head.forward = lambda *args: (out := forward(*args)) | {"image_reconstruction": out["image_reconstruction"].mT}


@pytest.mark.parametrize("fault", [_tanh_gelu, _other_eps, _transposed_patches])
def test_planted_fault_is_found(fault) -> None:
    model = ours_of(torch.float64)
    fault(model)
    with pytest.raises(AssertionError):
        compare(torch.float64, model)


SIZES = [
    *(f"latent_channels={LATENT}", f"latent_size={SIDE}", f"dim={DIM}", f"layers={LAYERS}", f"heads={HEADS}"),
    *(f"mlp_dim={MLP_DIM}", f"patch={PATCH}", f"image_size={SIDE * PATCH}", "channels=3"),
]
NO_LOSSES = ["~updates", "~loss.lpips", "~loss.fool", "~loss.tell"]


def test_file_there_and_back(tmp_path: Path) -> None:
    """A published decoder, alone or in a whole autoencoder, is the part `decoder` of an experiment; a run's is written so too."""
    reference = reference_of(torch.float64)
    perturb(reference.decoder)
    state = {published(name): value for name, value in reference.decoder.state_dict().items()}
    state |= {"decoder_pos_embed": reference.decoder.decoder_pos_embed}
    torch.save(state, tmp_path / "alone.pt")
    whole = {f"decoder.{name}": value for name, value in state.items()} | {"encoder.model.weight": torch.zeros(2)}
    torch.save({"model": whole}, tmp_path / "whole.pt")
    code = torch.randn(2, LATENT, SIDE, SIDE, dtype=torch.float64)
    for name in ("alone", "whole"):
        begin = f"+init={{parts: {{decoder: {tmp_path / name}.pt}}, random: [decoder.head.perceptual]}}"
        decoder = load(CONFIGS / "rae.yaml", dtype="float64", overrides=[*SIZES, begin]).model["decoder"]
        found = decoder({"image_latent": code, "row": torch.arange(2)}, decoder.inference())["image_reconstruction"]
        check_values(found.detach(), image_of(reference, code).detach())
    with pytest.raises(UserError, match="if head.perceptual has weights of its own, name them in init.parts"):
        load(CONFIGS / "rae.yaml", overrides=[*SIZES, f"+init.parts.decoder={tmp_path / 'alone.pt'}"])
    run = save_run(tmp_path / "run", "rae", *SIZES, "evals=null", "~model.decoder.head.perceptual", "~model.critic", *NO_LOSSES)
    export(run, tmp_path / "decoder.pt", part="decoder", ema=True)
    written = torch.load(tmp_path / "decoder.pt", weights_only=True)
    assert {name: value.shape for name, value in written.items()} == {name: value.shape for name, value in state.items()}
    check_values(written["decoder_pos_embed"], state["decoder_pos_embed"])
    right = load(run, ema=True).model["decoder"].trunk.layers[1].mixer.k_proj.weight
    assert torch.equal(written["decoder_layers.1.attention.attention.key.weight"], right)
