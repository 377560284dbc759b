"""Blocks of image models: what they draw depends on the row alone, and is what their papers say."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from l3m_like.blocks import ClassHead, DrawPrefix, LogitScale, MaskPatches, MixImages, PatchEmbed, PatchHead, Transformer
from l3m_like.core import MetaModel
from l3m_like.core.errors import UserError
from l3m_like.core.init import Normal, Uniform, XavierUniform
from l3m_like.data import CaptionedImage
from l3m_like.data.dataset import Visit
from l3m_like.layers import MLP, Attention, Colours, Pool, TransformerLayer
from l3m_like.layers.patch_embed import sincos_positions
from l3m_like.losses import PatchRegression
from l3m_like.training.init import init_specs
from l3m_like.training.optim.groups import depth_factors, parameter_groups


def part_of(out: Any, rows: slice) -> Any:
    return {key: value[rows] for key, value in out.items()} if isinstance(out, dict) else tuple(value[rows] for value in out)


def same(first: Any, second: Any) -> bool:
    pairs = zip(first.values(), second.values(), strict=True) if isinstance(first, dict) else zip(first, second, strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


ROW = torch.tensor([10, 11, 12, 13, 90, 91])


@pytest.mark.parametrize("block", [MaskPatches(0, 0.5, skip=1, stream="image"), DrawPrefix(0, stream="image")])
def test_draws_depend_on_the_row_alone(block: Any) -> None:
    tokens = torch.randn(6, 17, 4, generator=torch.Generator().manual_seed(0))
    outputs = block.outputs
    whole = block.compute(tokens, ROW, outputs=outputs)
    rows = slice(2, 4)
    assert same(part_of(whole, rows), block.compute(tokens[rows], ROW[rows], outputs=outputs))
    assert not torch.equal(whole["masked"][0], whole["masked"][1])
    other = type(block)(1, stream="image").compute(tokens, ROW, outputs=outputs)
    assert not torch.equal(whole["masked"][:, :16], other["masked"][:, :16])


def test_patches_are_left_out_and_put_back() -> None:
    tokens = torch.arange(6 * 17.0).view(6, 17, 1)
    out = MaskPatches(0, 0.75, skip=1, stream="image").compute(tokens, ROW, outputs=("kept", "restore", "masked"))
    assert out["kept"].shape == (6, 5, 1) and torch.equal(out["kept"][:, 0], tokens[:, 0])
    assert torch.equal(out["masked"].sum(1), torch.full((6,), 12))
    patches = torch.cat((out["kept"][:, 1:], torch.full((6, 12, 1), -1.0)), dim=1)
    back = patches.gather(1, out["restore"][..., None])[..., 0]
    assert torch.equal(back, torch.where(out["masked"], -1.0, tokens[:, 1:, 0]))
    assert torch.equal(MaskPatches(0, skip=1).compute(tokens, ROW, outputs=("kept",))["kept"], tokens)


# ---- mixing --------------------------------------------------------------------------------------------------------------


def mixed(block: MixImages, rows: int = 6, size: int = 8) -> tuple[Tensor, ...]:
    image = torch.arange(rows, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, size, size)
    return block.compute(image, torch.arange(rows), torch.arange(rows) + 100)


@pytest.mark.parametrize("only", [{"cutmix": None}, {"mixup": None}, {}])
def test_a_mixed_image_is_made_of_both_by_their_parts(only: dict[str, Any]) -> None:
    image, other, weight = mixed(MixImages(0, **only, stream="image"))
    own = torch.arange(6.0)
    assert other.tolist() == [1, 0, 3, 2, 5, 4]
    assert torch.allclose(image.mean((1, 2, 3)), own + (other - own) * weight, atol=1e-6)
    assert float(weight.min()) >= 0 and float(weight.max()) < 1 and float(weight.max()) > 0
    if "mixup" in only:  # boxes hold one or the other
        assert all(set(row.flatten().tolist()) <= {float(i), float(other[i])} for i, row in enumerate(image))


def test_mixing_a_half_is_half_of_mixing_all() -> None:
    block = MixImages(3, stream="image")
    image = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = block.compute(image, torch.arange(6), ROW)
    assert same(part_of(whole, slice(2, 4)), block.compute(image[2:4], torch.arange(2, 4), ROW[2:4]))
    assert torch.equal(block.eval().compute(image, torch.arange(6), ROW)[0], image)
    with pytest.raises(UserError, match="partner"):
        block.train().compute(image[:3], torch.arange(3), ROW[:3])


def test_parts_are_beta_variates() -> None:
    row = torch.arange(4000)
    for a in (0.2, 0.8, 1.0):
        drawn = MixImages(0, mixup=a, stream="image")._beta(row, a, "mixup")
        assert float(drawn.min()) >= 0 and float(drawn.max()) <= 1
        assert float(drawn.mean()) == pytest.approx(0.5, abs=0.02)
        assert float(drawn.var()) == pytest.approx(1 / (4 * (2 * a + 1)), rel=0.06)


# ---- stochastic depth ----------------------------------------------------------------------------------------------------


def trunk(drop_path: float, layers: int = 3) -> Transformer:
    torch.manual_seed(0)
    layer = partial(TransformerLayer, mixer=partial(Attention, num_heads=2), mlp=partial(MLP, ratio=2.0))
    return Transformer(8, layers, layer, mask="full", drop_path=drop_path, seed=0, stream="image")


def test_stochastic_depth_leaves_branches_out_by_rows() -> None:
    model, tokens = trunk(0.6), torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0))
    keep = model._kept(ROW, tokens)
    assert keep.shape == (3, 2, 6) and torch.equal(keep[0], torch.ones(2, 6))
    assert {round(value, 4) for value in keep[2].flatten().tolist()} == {0.0, 2.5}
    many = model._kept(torch.arange(20000), tokens)
    assert torch.allclose(many.mean(2), torch.ones(3, 2), atol=0.03)
    out = model.compute(tokens, row=ROW)
    assert torch.allclose(out[2:4], model.compute(tokens[2:4], row=ROW[2:4]), atol=1e-6)  # type: ignore[index]
    whole = trunk(0.0).compute(tokens)
    assert not torch.allclose(out, whole) and torch.equal(model.eval().compute(tokens), whole)  # type: ignore[arg-type]
    by_hand = tokens
    for number, layer in enumerate(model.layers):
        by_hand = by_hand + keep[number, 0].view(-1, 1, 1) * layer.mixer(layer.norm_1(by_hand))  # type: ignore[operator]
        by_hand = by_hand + keep[number, 1].view(-1, 1, 1) * layer.mlp(layer.norm_2(by_hand))  # type: ignore[operator]
    assert torch.allclose(out, by_hand, atol=1e-5)  # type: ignore[arg-type]


def test_layers_near_the_input_learn_more_slowly() -> None:
    model = MetaModel(PatchEmbed(4, 2, 1, 8), trunk(0.0), stream="image")
    factors = depth_factors(dict(model.named_parameters()), 0.5)
    assert factors["preprocessor.projection.proj.weight"] == 0.5**4
    assert factors["trunk.layers.0.norm_1.weight"] == 0.5**3 and factors["trunk.layers.2.norm_1.weight"] == 0.5
    groups = parameter_groups(dict(model.named_parameters()), lr=1.0, weight_decay=0.1, layer_decay=0.5)
    assert {group["lr"] for group in groups} == {0.5, 0.25, 0.125, 0.0625}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    with pytest.raises(UserError, match="layer_decay"):
        depth_factors(["head.proj.weight"], 0.5)


# ---- small ones ----------------------------------------------------------------------------------------------------------


def test_pools() -> None:
    x = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert torch.equal(Pool("first")(x), x[:, 0]) and torch.equal(Pool("last")(x, mask), x[:, 2])
    assert torch.equal(Pool("end")(x, mask), torch.stack((x[0, 1], x[1, 2])))
    assert torch.equal(Pool("mean")(x, mask), torch.stack((x[0, :2].mean(0), x[1].mean(0))))
    assert torch.equal(Pool("mean", skip=1)(x), x[:, 1:].mean(1))
    with pytest.raises(UserError, match="did you mean|Did you mean"):
        Pool("frist")


def test_logit_scale_stays_below_its_bound() -> None:
    block = LogitScale(10.0, most=20.0, writes=["scale"])
    with torch.no_grad():
        block.log_scale.fill_(5.0)
    block.after_step(None)
    assert float(block.compute(outputs=("scale",))["scale"].detach()) == pytest.approx(20.0)
    assert set(init_specs(block)) == {"log_scale"}
    for wrong in ({"start": 0.0}, {"start": 30.0, "most": 20.0}, {"start": 1.0, "bias": 1.0}):
        with pytest.raises(UserError, match="LogitScale"):
            LogitScale(**wrong)


def test_captions_of_classes() -> None:
    settings: dict[str, Any] = {"size": 2, "vocab_size": 257, "max_tokens": 12, "channels": 1}
    process = CaptionedImage(**settings, names=["cat", "dog"], templates=["a {}", "{}!"])
    assert process._caption({"cls": b"1"}, Visit("x", 0, 0))[0] in ("a dog", "dog!")
    assert {process._caption({"cls": b"0"}, Visit("x", epoch, 0))[0] for epoch in range(9)} == {"a cat", "cat!"}
    with pytest.raises(UserError, match="names for 2"):
        process._caption({"cls": b"2"}, Visit("x", 0, 0))
    with pytest.raises(UserError, match="write {} once"):
        CaptionedImage(**settings, names=["cat"], templates=["a"])
    with pytest.raises(UserError, match="give names"):
        CaptionedImage(**settings, templates=["a {}"])


def test_colours_are_taken_out_by_the_model() -> None:
    """What a ViT sees, and what predicted pixels are compared with, is (pixel in [0, 1] - mean) / std."""
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    settings: dict[str, Any] = {"image_size": 8, "patch": 4, "channels": 3, "dim": 8}
    torch.manual_seed(0)
    colours = Colours(mean, std)
    plain, block = PatchEmbed(**settings).double(), PatchEmbed(**settings, colours=colours).double()
    for ours, theirs in zip(block.parameters(), plain.parameters(), strict=True):
        ours.data = theirs.data.normal_()
    image = torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1
    normed = torch.stack([((image[:, c] + 1) / 2 - mean[c]) / std[c] for c in range(3)], 1)
    torch.testing.assert_close(block.compute(image), plain.compute(normed))
    assert not torch.allclose(block.compute(image), plain.compute(image))
    patches, masked = torch.randn(2, 4, 48, dtype=torch.float64), torch.tensor([[True, False, True, True]] * 2)
    for normalize in (True, False):
        found = PatchRegression(4, normalize=normalize, colours=colours).compute(patches, image, masked)
        torch.testing.assert_close(found, PatchRegression(4, normalize=normalize).compute(patches, normed, masked))
    with pytest.raises(UserError, match="a number for each channel, std above 0"):
        Colours(mean, [0.2])
    with pytest.raises(UserError, match="images have 3 channels, mean and std 1 numbers"):
        PatchEmbed(**settings, colours=Colours([0.5], [0.2])).double().compute(image)


# ---- heads, and how weights start ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drop", "tokens", "kept"), [(None, 9, slice(None)), ("first", 10, slice(1, None)), ("last", 9, slice(-1))]
)
def test_a_patch_head_adds_the_positions_of_patches(drop: str | None, tokens: int, kept: slice) -> None:
    torch.manual_seed(0)
    head = PatchHead(12, 2, 1, drop=drop, layers=1, width=8, bias=False, mlp_bias=False, positions="sincos").double()
    assert head.inner is not None and not {"proj.bias", "layers.0.mlp.up.bias"} & set(init_specs(head))
    x = torch.randn(2, tokens, 12, dtype=torch.float64)
    hidden = head.inner(x[:, kept])
    hidden = hidden + sincos_positions(3, 3, 8, torch.float64, x.device)[: hidden.shape[1]]
    torch.testing.assert_close(head.compute(x), head.proj(head.norm(head.layers[0](hidden))))
    with pytest.raises(UserError, match="with layers of a width that 4 divides"):
        PatchHead(12, 2, 1, positions="sincos")


def test_a_class_head_with_a_norm() -> None:
    head = ClassHead(8, 3, norm="layer").double()
    assert head.norm is not None and set(init_specs(head)) == {
        f"{name}.{leaf}" for name in ("proj", "norm") for leaf in ("weight", "bias")
    }
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(head.compute(x), head.proj(head.norm(x[:, 0])))


def test_a_model_says_how_weights_start() -> None:
    """The last of the patterns that match decides, and the model inside another before its layers."""
    draw = {"head.*.weight": XavierUniform(), "head.proj.*": Uniform(0.5)}
    model = MetaModel(head=ClassHead(8, 3, norm="rms", stream="image"), draw=draw)
    assert init_specs(model) == {
        "head.proj.weight": Uniform(0.5),
        "head.proj.bias": Uniform(0.5),
        "head.norm.weight": XavierUniform(),
    }
    outer = MetaModel(head=model, draw={"head.head.proj.bias": Normal(1.0)})
    assert init_specs(outer)["head.head.proj.bias"] == Uniform(0.5), "the nearest decides"
    with pytest.raises(UserError, match="draw: the pattern 'trunk.*' matches no parameter"):
        MetaModel(head=ClassHead(8, 3, stream="image"), draw={"trunk.*": Normal(1.0)})
