"""Discriminators against a direct transcription of the published one, and the augmentation against its definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from l3m_like.blocks import Discriminator, ImageFeatures
from l3m_like.blocks.heads.discriminator import to_8_bit
from l3m_like.core import Frozen
from l3m_like.core.errors import UserError
from l3m_like.layers import DiffAugment, PatchDiscriminator, SpectralConv, TimmViT, TokenDiscriminator
from l3m_like.layers.discriminator import TokenHead
from l3m_like.layers.timm_vit import IMAGENET
from tests.parity.rule import check_gradients, check_values, gradients, perturb

DIM, TOKENS = 12, 25


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) + x) / math.sqrt(2)


class RowNorm(nn.Module):
    """Statistics over the tokens of one row at a time, biased variance."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for row in x:
            centred = row - row.mean(-1, keepdim=True)
            rows.append(centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt())
        return torch.stack(rows) * self.weight[:, None] + self.bias[:, None]


def stage(dim: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, padding_mode="circular")
    return nn.Sequential(spectral_norm(convolution, eps=1e-12), RowNorm(dim), nn.LeakyReLU(0.2))


def published_head(dim: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(stage(dim, 1), Residual(stage(dim, kernel)), spectral_norm(nn.Conv1d(dim, 1, 1), eps=1e-12))


def load(head: nn.Sequential, ours: TokenHead) -> dict[str, nn.Parameter]:
    """Copy our weights and power-iteration vectors; ``{our name: their parameter}``."""
    pairs = {"enter": head[0][0], "mix": head[1].inner[0], "score": head[2]}
    theirs = {}
    with torch.no_grad():
        for name, convolution in pairs.items():
            layer = getattr(ours, name)
            convolution.weight_orig.copy_(layer.weight)
            convolution.bias.copy_(layer.bias)
            convolution.weight_u.copy_(F.normalize(layer.u, dim=0))
            theirs |= {f"{name}.weight": convolution.weight_orig, f"{name}.bias": convolution.bias}
        for name, norm in {"norm_1": head[0][1], "norm_2": head[1].inner[1]}.items():
            for leaf in ("weight", "bias"):
                getattr(norm, leaf).copy_(getattr(getattr(ours, name), leaf))
                theirs[f"{name}.{leaf}"] = getattr(norm, leaf)
    return theirs


def compare(ours: TokenDiscriminator, kernel: int = 9) -> None:
    """A forward of torch's spectral norm (that of the published code) makes v of u, then u of v: the same single step as ours."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(3, 2, TOKENS, DIM, generator=generator, dtype=torch.float64)
    heads = [published_head(DIM, kernel).double() for _ in ours.heads]
    parameters = {
        f"heads.{number}.{name}": parameter
        for number, (head, own) in enumerate(zip(heads, ours.heads, strict=True))
        for name, parameter in load(head, own).items()  # type: ignore[arg-type]
    }
    theirs = torch.cat([head(features[:, place].mT).flatten(1) for head, place in zip(heads, ours.layers, strict=True)], dim=1)
    out = ours(features)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    (theirs * weight).square().sum().backward()
    (out * weight).square().sum().backward()
    check_values(out.detach(), theirs.detach())
    vanishing = {"enter.bias": "a mean over tokens is subtracted", "mix.bias": "a mean over tokens is subtracted"}
    check_gradients(gradients(ours), {name: p.grad for name, p in parameters.items()}, vanishing=vanishing)  # type: ignore[misc]


def discriminator() -> TokenDiscriminator:
    made = TokenDiscriminator(DIM, layers=[1, 0, 1]).double()
    perturb(made)
    for module in made.modules():
        if isinstance(module, SpectralConv):  # as after some steps
            module.u.copy_(torch.randn(module.u.shape, generator=torch.Generator().manual_seed(len(module.u))))
    return made


def test_equals_the_published_heads() -> None:
    compare(discriminator())


def _zeros_at_the_border(made: TokenDiscriminator) -> None:
    made.heads[0].mix.circular = False  # type: ignore[union-attr,assignment]


def _other_eps(made: TokenDiscriminator) -> None:
    made.heads[1].norm_2.eps = 1e-5  # type: ignore[union-attr,assignment]


@pytest.mark.parametrize("fault", [_zeros_at_the_border, _other_eps])
def test_planted_fault_is_found(fault) -> None:
    made = discriminator()
    fault(made)
    with pytest.raises(AssertionError):
        compare(made)


def test_spectral_norm_finds_the_largest_singular_value() -> None:
    torch.manual_seed(0)
    layer = SpectralConv(5, 7, 3)
    perturb(layer)
    x = torch.randn(2, 5, 11)
    before = layer(x).detach()
    assert torch.equal(layer(x).detach(), before)  # a forward changes nothing
    for _ in range(100):
        layer.follow(layer.weight.detach())
    largest = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
    expected = F.conv1d(x, layer.weight.detach() / largest, layer.bias.detach(), padding=1)
    torch.testing.assert_close(layer(x).detach(), expected)


def test_patch_discriminator() -> None:
    made = PatchDiscriminator(1, width=8, downsamplings=2)
    perturb(made)
    image = torch.rand(2, 1, 28, 28)
    logits = made(image)
    assert logits.shape == (2, 25)
    assert torch.allclose(made(image[:1]), logits[:1], atol=1e-6)  # no row depends on another
    places = [14 * 14, 7 * 7, 6 * 6, 5 * 5]
    sizes = [8 * 16, 16 * 8 * 16, 32 * 16 * 16, 32 * 16]
    assert made.flops(image) == sum(4 * place * size for place, size in zip(places, sizes, strict=True))


# ---- what it sees --------------------------------------------------------------------------------------------------------


def test_augmentation_is_what_it_says() -> None:
    """Shift by whole pixels with zeros coming in, then brightness, saturation and contrast, by an independent transcription."""
    from l3m_like.core.random import uniform

    augment = DiffAugment(3, translation=0.25, cutout=0.5)
    row = torch.arange(5)
    image = torch.rand(5, 3, 8, 8, dtype=torch.float64) * 2 - 1
    u = uniform(row, (8,), seed=3, purpose="diff_augment/it", dtype=torch.float64)
    out = augment(image, row, "it")
    for number in range(5):
        down, right, light, saturation, contrast, top, left, _ = u[number].tolist()
        down, right = int(down * 5) - 2, int(right * 5) - 2
        padded = F.pad(image[number], [2] * 4)
        expected = padded[:, 2 + down : 10 + down, 2 + right : 10 + right] + light - 0.5
        grey = expected.mean(0, keepdim=True)
        expected = grey + (expected - grey) * 2 * saturation
        expected = expected.mean() + (expected - expected.mean()) * (contrast + 0.5)
        top, left = int(top * 9) - 2, int(left * 9) - 2
        expected[:, max(top, 0) : top + 4, max(left, 0) : left + 4] = 0
        torch.testing.assert_close(out[number], expected)
    assert len({tuple(line) for line in u.tolist()}) == 5


def test_augmentation_moves_low_precision_by_whole_pixels() -> None:
    image, row = (torch.rand(4, 1, 8, 600) * 16).round() / 16, torch.arange(4)  # values that bf16 holds
    augment = DiffAugment(3, color=0, cutout=0.25)
    assert torch.equal(augment(image.bfloat16(), row, "it").float(), augment(image, row, "it"))


def test_augmentation_depends_on_the_row_alone() -> None:
    augment, image = DiffAugment(0, probability=0.5), torch.rand(6, 1, 8, 8)
    out = augment(image, torch.arange(6), "it")
    torch.testing.assert_close(augment(image[2:4], torch.arange(2, 4), "it"), out[2:4])
    assert not torch.equal(augment(image, torch.arange(6), "other"), out)
    assert 0 < sum(torch.equal(a, b) for a, b in zip(out, image, strict=True)) < 6
    with pytest.raises(UserError, match="color is 2"):
        DiffAugment(0, color=2)


def test_eight_bits() -> None:
    image = torch.linspace(-1.2, 1.2, 999, requires_grad=True)
    steps = (to_8_bit(image).detach() + 1) * 127.5
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    assert len(steps.round().unique()) == 256
    to_8_bit(image).sum().backward()
    assert torch.equal(image.grad, (image.detach().abs() <= 1).float())


def features(**settings) -> Frozen:
    arguments = {"img_size": 8, "patch_size": 4, "embed_dim": DIM, "depth": 3, "num_heads": 2}
    encoder = TimmViT("vit_tiny_patch16_224", arguments=arguments, image_size=16)
    return Frozen(ImageFeatures(encoder, [0, 2]), random_weights=True, **settings)


def test_discriminator_passes_gradients_through_frozen_features() -> None:
    block = Discriminator(
        None, TokenDiscriminator(DIM, layers=[1, 0]), features(passes_gradients=True), DiffAugment(0), stream="image"
    )
    perturb(block)
    data = {
        "image_reconstruction": torch.rand(2, 1, 8, 8, requires_grad=True),
        "row": torch.arange(2),
        "image": torch.rand(2, 1, 8, 8),
    }
    judged = block(data, True)
    assert judged["image_fake_logits"].shape == (2, 2 * 16) and "image_real_logits" not in judged
    judged["image_fake_logits"].sum().backward()
    assert bool(data["image_reconstruction"].grad.abs().sum() > 0)
    assert all(p.grad is None for p in block.features.parameters()) and not block.features.training
    both = block(data)
    # the reconstruction in steps of 1/127.5 is nearly the same
    torch.testing.assert_close(both["image_fake_logits"], judged["image_fake_logits"], atol=0.05, rtol=0.05)
    assert not torch.allclose(both["image_real_logits"], both["image_fake_logits"], atol=0.05)
    with pytest.raises(UserError, match="either pixels"):
        Discriminator(TokenDiscriminator(DIM, layers=[0]), None, features(passes_gradients=True))
    with pytest.raises(UserError, match="passes_gradients"):
        Discriminator(None, TokenDiscriminator(DIM, layers=[0]), features())


def test_hidden_layers_are_those_of_timm() -> None:
    """Without the last norm and the class token; the last one, normalised, is what the encoder gives."""
    encoder = features().model.preprocessor.encoder.double()
    perturb(encoder)
    image = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    hidden = encoder.hidden(image, [0, 2])
    assert hidden.shape == (2, 2, 16, DIM)
    torch.testing.assert_close(F.layer_norm(hidden[:, 1], (DIM,), eps=encoder.model.norm.eps), encoder(image))
    mean, std = (torch.tensor(numbers, dtype=torch.float64).view(3, 1, 1) for numbers in IMAGENET)
    prepared = ((image + 1) / 2 - mean) / std
    torch.testing.assert_close(encoder.prepare(image), prepared)


def test_a_skipped_step_leaves_the_vector() -> None:
    layer = SpectralConv(3, 4, 1)
    with torch.no_grad():
        for tensor in (layer.weight, layer.u):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
        before = layer.u.clone()
        layer.follow(layer.weight, torch.ones(()))
        assert torch.equal(layer.u, before)
        layer.follow(layer.weight, torch.zeros(()))
        assert not torch.equal(layer.u, before)
