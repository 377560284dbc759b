"""Our RAE decoder against diffusers' ``AutoencoderRAE``: image and all gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers import AutoencoderRAE
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from rule import check_gradients, check_values, gradients, perturb
from torch import Tensor

from l3m_like.blocks import LatentEmbed, PatchPixels, Transformer
from l3m_like.core import MetaModel
from l3m_like.layers import MLP, Attention, TransformerLayer
from l3m_like.pretrained import NameMap, export_state, import_state
from l3m_like.pretrained.rae import diffusers_names

LATENT, DIM, LAYERS, HEADS, MLP_DIM, PATCH, SIDE = 64, 48, 2, 4, 96, 4, 5
VANISHING = {"k_proj.bias": "softmax ignores what all keys have in common"}


def ours_of(dtype: torch.dtype) -> MetaModel:
    layer = partial(
        TransformerLayer, norm="layer", norm_eps=1e-12, mixer=partial(Attention, num_heads=HEADS, bias=True),
        mlp=partial(MLP, hidden_dim=MLP_DIM, activation="gelu"),
    )  # fmt: skip
    model = MetaModel(
        preprocessor=LatentEmbed(LATENT, DIM),
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


def compare(dtype: torch.dtype, ours: MetaModel) -> None:
    names = NameMap.of(diffusers_names(ours), ours)
    reference = reference_of(dtype)
    missing, unexpected = reference.load_state_dict(export_state(names, dict(ours.named_parameters())), strict=False)
    assert not unexpected and not [name for name in missing if name.startswith("decoder.decoder_")]
    code = torch.randn(2, LATENT, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    weight = torch.linspace(-1, 1, 2 * 3 * (SIDE * PATCH) ** 2, dtype=dtype).view(2, 3, SIDE * PATCH, -1)
    theirs: Tensor = (
        2 * reference._denormalize_image(reference.decoder.unpatchify(reference.decoder(code.flatten(2).mT).logits)) - 1
    )
    (theirs * weight).square().sum().backward()
    out = ours({"image_code": code})["image_reconstruction"]
    (out * weight).square().sum().backward()
    check_values(out.detach(), theirs.detach())
    check_gradients(gradients(ours), import_state(names, gradients(reference)), vanishing=VANISHING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_equals_diffusers(dtype: torch.dtype) -> None:
    compare(dtype, ours_of(dtype))


def _tanh_gelu(model: MetaModel) -> None:
    model.trunk.layers[0].mlp.activation = partial(torch.nn.functional.gelu, approximate="tanh")


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
