"""Our SiT against diffusers' DiT: output and all gradients."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from rule import check_gradients, check_values, gradients, perturb
from torch import Tensor, nn

from l3m_like.blocks import DiT, PatchDecode, PatchEmbed, TimeLabelEmbed
from l3m_like.core import MetaModel
from l3m_like.layers import MLP, Attention, DiTLayer
from l3m_like.pretrained import NameMap, export_state, import_state
from l3m_like.pretrained.dit import diffusers_names
from l3m_like.pretrained.sit import sit_names

CLASSES, DIM, LAYERS, HEADS, SIZE, PATCH, CHANNELS = 10, 48, 2, 4, 8, 2, 4
MAP = {"channels": CHANNELS, "patch": PATCH}


def ours_of(dtype: torch.dtype) -> MetaModel:
    layer = partial(DiTLayer, mixer=partial(Attention, num_heads=HEADS, bias=True), mlp=partial(MLP, ratio=4.0))
    model = MetaModel(
        preprocessor={
            "patches": PatchEmbed(SIZE, PATCH, CHANNELS, DIM, reads={"image": "image_noised"}),
            "condition": TimeLabelEmbed(CLASSES, DIM),
        },
        trunk=DiT(DIM, LAYERS, layer),
        head=PatchDecode(DIM, SIZE, PATCH, CHANNELS, out_channels=2 * CHANNELS, writes={"image": "image_prediction"}),
        stream="image",
    ).to(dtype)
    perturb(model)
    return model


def positions_by_numpy() -> np.ndarray:
    """The published sincos grid, written for one patch at a time: column first, then row, [sin | cos] each."""
    side, quarter = SIZE // PATCH, DIM // 4
    omega = 1.0 / 10000 ** (np.arange(quarter) / quarter)
    out = [
        np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)])
        for y in range(side)
        for x in range(side)
    ]
    return np.stack(out)


class ExactSinusoid(nn.Module):
    """The reference's time sinusoid (divided by half, as SiT does), without its cast to float32."""

    def forward(self, time: Tensor) -> Tensor:
        angle = time.double()[:, None] * torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
        return torch.cat((angle.cos(), angle.sin()), dim=-1)


def reference_of(dtype: torch.dtype, shift: float = 0.0) -> DiTTransformer2DModel:
    model = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=DIM // HEADS, in_channels=CHANNELS, out_channels=2 * CHANNELS,
        num_layers=LAYERS, sample_size=SIZE, patch_size=PATCH, num_embeds_ada_norm=CLASSES, norm_type="ada_norm_zero",
        norm_elementwise_affine=False, norm_eps=1e-6, activation_fn="gelu-approximate", attention_bias=True,
    ).eval().to(dtype)  # fmt: skip
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = shift
        if dtype == torch.float64:
            block.norm1.emb.time_proj = ExactSinusoid()
    if dtype == torch.float64:
        model.pos_embed.pos_embed = torch.from_numpy(positions_by_numpy()).unsqueeze(0)
    return model


def batch(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "image_noised": torch.randn(3, CHANNELS, SIZE, SIZE, generator=generator, dtype=torch.float64).to(dtype),
        "image_time": torch.rand(3, generator=generator),
        "image_class_id": torch.tensor([3, CLASSES, 0]),
    }


def compare(dtype: torch.dtype, ours: MetaModel, shift: float = 0.0) -> None:
    data, names = batch(dtype), NameMap.of(diffusers_names(LAYERS, **MAP), ours)
    reference = reference_of(dtype, shift)
    missing, unexpected = reference.load_state_dict(export_state(names, dict(ours.named_parameters())), strict=False)
    assert not unexpected and set(missing) <= {"pos_embed.pos_embed"}
    weight = torch.linspace(-1, 1, data["image_noised"].numel(), dtype=dtype).view_as(data["image_noised"])
    theirs = reference(data["image_noised"], timestep=data["image_time"], class_labels=data["image_class_id"]).sample[
        :, :CHANNELS
    ]
    (theirs * weight).square().sum().backward()
    out = ours(data)["image_prediction"]
    ours.zero_grad()
    (out * weight).square().sum().backward()
    check_values(out.detach(), theirs.detach())
    their_gradients = gradients(reference)
    for copy, name in names.copies.items():  # the reference holds a copy of the embeddings in every block
        their_gradients[name] = their_gradients[name] + their_gradients[copy]
    vanishing = {"k_proj.bias": "softmax ignores what all keys have in common"}
    check_gradients(gradients(ours), import_state(names, their_gradients), vanishing=vanishing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_equals_diffusers(dtype: torch.dtype) -> None:
    compare(dtype, ours_of(dtype))


def _swap_scale_and_shift(model: MetaModel) -> None:
    proj = model.trunk.layers[1].modulation.proj
    forward = proj.forward
    proj.forward = lambda x: torch.cat([forward(x).chunk(6, -1)[i] for i in (1, 0, 2, 3, 4, 5)], -1)


def _exact_gelu(model: MetaModel) -> None:
    model.trunk.layers[0].mlp.activation = "gelu"


def _transpose_patches(model: MetaModel) -> None:
    forward = model.preprocessor["patches"].projection.forward
    model.preprocessor["patches"].projection.forward = lambda image: forward(image.mT)


@pytest.mark.parametrize("fault", [_swap_scale_and_shift, _exact_gelu, _transpose_patches])
def test_planted_fault_is_found(fault) -> None:
    model = ours_of(torch.float64)
    fault(model)
    with pytest.raises(AssertionError):
        compare(torch.float64, model)


def test_other_sinusoid_is_found() -> None:
    with pytest.raises(AssertionError):
        compare(torch.float32, ours_of(torch.float32), shift=1.0)


def test_published_names_go_there_and_back() -> None:
    ours = dict(ours_of(torch.float32).named_parameters())
    names = NameMap(sit_names(**MAP), ours)
    theirs = export_state(names, ours)
    assert theirs["blocks.1.attn.qkv.weight"].shape == (3 * DIM, DIM)
    assert theirs["x_embedder.proj.weight"].shape == (DIM, CHANNELS, PATCH, PATCH)
    assert len(theirs) == 7 + LAYERS * 10 + 4  # outside the blocks, per block, final layer
    back = import_state(names, theirs)
    assert set(back) == set(ours) and all(torch.equal(back[name], ours[name]) for name in ours)
