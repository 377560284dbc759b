"""ViT against timm, MAE and AIMv2's image tower against transformers: outputs, losses, all gradients; AIM's losses and mask
against the formulas of the papers."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from rule import check_gradients, check_values, gradients, perturb
from torch import Tensor, nn
from transformers import Aimv2VisionConfig, Aimv2VisionModel, ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae import modeling_vit_mae

from l3m_like.config import RunConfig
from l3m_like.core import MetaModel
from l3m_like.core.random import uniform
from l3m_like.layers import sincos_positions
from l3m_like.pretrained import NameMap, export_state, family, import_state
from l3m_like.training.build import build_model
from l3m_like.training.init import materialize

SIZE = ["image_size=28", "channels=3", "dim=32", "layers=2", "heads=4"]
MORE = {
    "vit": ["patch=14", "classes=5", "drop_path=0"],
    "mae": ["patch=7", "decoder_dim=16", "decoder_layers=1", "decoder_heads=2"],
    "aimv1": ["patch=7", "head_dim=24"],
    "aimv2": [
        *("patch=7", "mlp_dim=48", "max_tokens=8"),
        *("decoder_dim=16", "decoder_layers=1", "decoder_heads=2", "decoder_mlp_dim=24"),
    ],
}
#: the softmax does not see a constant in the scores
VANISHING = {"k_proj.bias": "the softmax does not see a constant in the scores"}


@cache
def config(name: str) -> RunConfig:
    return RunConfig.from_file(f"configs/experiment/{name}.yaml", [*SIZE, *MORE[name]])


def ours_of(name: str) -> MetaModel:
    model = build_model(config(name))
    materialize(model, torch.device("cpu"))
    perturb(model.double())
    return model


def images(rows: int = 3) -> Tensor:
    return torch.randn(rows, 3, 28, 28, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def compare(ours: MetaModel, theirs: nn.Module, names: NameMap, mine: Tensor, expected: Tensor) -> None:
    """Values, and the gradients of a number that all of them are part of."""
    check_values(mine.detach(), expected.detach())
    weight = torch.linspace(-1, 1, mine.numel(), dtype=mine.dtype).view_as(mine)
    (mine * weight).sum().backward()
    (expected * weight).sum().backward()
    mine_p = {name: grad for name, grad in gradients(ours).items() if name in names.pieces}
    check_gradients(mine_p, import_state(names, gradients(theirs)), vanishing=VANISHING)


def load(theirs: nn.Module, names: NameMap, ours: MetaModel) -> None:
    theirs.load_state_dict(export_state(names, dict(ours.named_parameters())))


def test_vit_equals_timm() -> None:
    ours = ours_of("vit")
    theirs = timm.models.VisionTransformer(
        img_size=28, patch_size=14, embed_dim=32, depth=2, num_heads=4, num_classes=5
    ).double()  # fmt: skip
    names = NameMap.of(family("timm").templates(ours), ours)
    load(theirs, names, ours)
    data = {"image": images(), "image_label": torch.arange(3), "row": torch.arange(3)}
    compare(ours, theirs, names, ours.eval()(data)["image_logits"], theirs(data["image"]))


def mae_of() -> nn.Module:
    config = ViTMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=28, patch_size=7,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=64,
        mask_ratio=0.75, norm_pix_loss=True, layer_norm_eps=1e-6,
    )  # fmt: skip
    return ViTMAEForPreTraining(config).double()


def now(name: str) -> str:
    """A published name as the class has it since transformers 5."""
    name = re.sub(r"attention\.attention\.(\w)\w+", r"attention.\1_proj", name.replace("vit.encoder.layer.", "vit.layers."))
    name = name.replace("attention.output.dense", "attention.o_proj")
    return name.replace("intermediate.dense", "mlp.fc1").replace("output.dense", "mlp.fc2")


def run_mae(noise_of: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    ours, theirs = ours_of("mae"), mae_of()
    names = NameMap.of(family("vit_mae").templates(ours), ours)
    fixed = {"vit.embeddings.position_embeddings": 32, "decoder.decoder_pos_embed": 16}
    state = export_state(names, dict(ours.named_parameters()))
    missing, unexpected = theirs.load_state_dict({now(name): value for name, value in state.items()}, strict=False)
    assert set(missing) == set(fixed) and not unexpected
    for name, dim in fixed.items():  # it has them in float32
        row_first = modeling_vit_mae.build_2d_sinusoidal_position_embedding(height=4, width=4, embed_dim=dim, cls_token=True)
        exact = torch.cat((torch.zeros(1, dim).double(), sincos_positions(4, 4, dim, torch.float64, torch.device("cpu"))))
        assert float((row_first.roll(dim // 2, dims=-1) - exact).abs().max()) < 1e-6
        theirs.get_parameter(name).data.copy_(exact[None])
    row = torch.tensor([4, 9, 1])
    noise = uniform(row, (16,), seed=0, purpose="mask_patches/image", dtype=torch.float64)
    data = {"image": images(), "row": row}
    out = ours(data)
    expected = theirs(data["image"], noise=noise_of(noise))
    loss = config("mae").instantiate("loss")["pixels"]
    return ours, theirs, names, out, expected, loss.term(out | data, 3.0)[0] / 3


def test_mae_equals_transformers() -> None:
    ours, theirs, names, out, expected, loss = run_mae(lambda noise: noise)
    assert torch.equal(out["image_masked"], expected.mask.bool())
    check_values(out["image_patches"].detach(), expected.logits.detach())
    check_values(loss.detach(), expected.loss.detach())
    loss.backward()
    expected.loss.backward()
    theirs_g = {name: gradients(theirs)[now(name)] for name in names.theirs}
    check_gradients(gradients(ours), import_state(names, theirs_g), vanishing=VANISHING)


def test_another_mask_is_found() -> None:
    *_, out, expected, loss = run_mae(lambda noise: 1 - noise)
    assert not torch.equal(out["image_masked"], expected.mask.bool())
    with pytest.raises(AssertionError):
        check_values(loss.detach(), expected.loss.detach())


class ExactNorm(nn.Module):
    """RMSNorm without the reference's cast to float32."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def aimv2_of() -> nn.Module:
    config = Aimv2VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7,
        use_head=False, is_native=False, rms_norm_eps=1e-5,
    )  # fmt: skip
    model = Aimv2VisionModel(config).double()
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Aimv2RMSNorm":
            model.set_submodule(name, ExactNorm(module))
    return model


def test_aimv2_tower_equals_transformers() -> None:
    """As for probing: the inference graph, where all patches see each other."""
    ours, theirs = ours_of("aimv2"), aimv2_of()
    names = NameMap.of(family("aimv2_vision_model").templates(ours), ours, strict=False)
    assert all("decoder" in name or name.startswith(("head", "postprocessor.join", "preprocessor.text")) for name in names.left)
    load(theirs, names, ours)
    data = {"image": images(), "row": torch.arange(3)}
    compare(ours, theirs, names, ours(data, ours.inference())["image_features"], theirs(data["image"]).last_hidden_state)


# ---- AIM, written out ----------------------------------------------------------------------------------------------------


def prefixes(row: Tensor, patches: int) -> list[int]:
    drawn = uniform(row, seed=0, purpose="prefix/image", dtype=torch.float64)
    return [1 + int(u * (patches - 1)) for u in drawn]


def attends(model: MetaModel, data: dict[str, Tensor], key: str, query: int, patch: int, side: int = 4) -> bool:
    """Whether what the model writes at ``query`` changes with the pixels of ``patch``."""
    image = data["image"].clone()
    y, x = divmod(patch, side)
    image[:, :, 7 * y : 7 * y + 7, 7 * x : 7 * x + 7] += 1
    with torch.no_grad():
        before, after = (model(data | {"image": i})[key][:, query] for i in (data["image"], image))
    return bool((before - after).abs().max() > 1e-9)


@pytest.mark.parametrize("name", ["aimv1", "aimv2"])
def test_prefix_is_seen_whole_and_the_rest_causally(name: str) -> None:
    model, row = ours_of(name), torch.tensor([7])
    (prefix,) = prefixes(row, 16)
    assert 2 < prefix < 15
    data = {"image": images(1), "row": row, "text_ids": torch.zeros(1, 8).long(), "text_mask": torch.ones(1, 8).bool()}
    for query, patch in ((0, prefix - 1), (0, prefix), (prefix, prefix), (prefix, prefix + 1), (15, 0), (prefix - 1, prefix)):
        allowed = patch <= query or (query < prefix and patch < prefix)
        assert attends(model, data, "image_features", query, patch) == allowed, (query, patch, prefix)


def pixel_loss(predicted: Tensor, image: Tensor, prefix: list[int], side: int = 4) -> Tensor:
    """Row by row and patch by patch: the patch i that the prefix lacks, from what stands before it, normalised by itself."""
    rows = []
    for b, length in enumerate(prefix):
        errors = []
        for i in range(length, side * side):
            y, x = divmod(i, side)
            target = image[b, :, 7 * y : 7 * y + 7, 7 * x : 7 * x + 7].permute(1, 2, 0).flatten()
            target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6).sqrt()
            errors.append(((predicted[b, i - 1] - target) ** 2).mean())
        rows.append(torch.stack(errors).mean())
    return torch.stack(rows).mean()


def test_loss_of_aim() -> None:
    model, row = ours_of("aimv1"), torch.tensor([6, 0, 3])
    data = {"image": images(), "row": row}
    out = model(data)
    assert out["image_patches"].shape == (3, 15, 147)
    loss = config("aimv1").instantiate("loss")["pixels"].term(out | data, 3.0)[0] / 3
    check_values(loss.detach(), pixel_loss(out["image_patches"].detach(), data["image"], prefixes(row, 16)))
    assert len(set(prefixes(torch.arange(400), 16))) == 15 and min(prefixes(torch.arange(400), 16)) == 1


def test_losses_of_aimv2() -> None:
    """0.4 of the pixels' and the caption's, whose first token follows the last patch."""
    model, row = ours_of("aimv2"), torch.tensor([6, 0, 3])
    lengths = torch.tensor([3, 8, 1])
    mask = torch.arange(8) < lengths[:, None]
    ids = torch.where(mask, torch.randint(0, 257, (3, 8), generator=torch.Generator().manual_seed(0)), 0)
    data = {"image": images(), "row": row, "text_ids": ids, "text_mask": mask}
    out = model(data)
    losses = config("aimv2").instantiate("loss")
    assert {name: loss.weight for name, loss in losses.items()} == {"pixels": 0.4, "caption": 1.0}
    pixels = losses["pixels"].term(out | data, 3.0)[0] / 3
    check_values(pixels.detach(), pixel_loss(out["image_patches"].detach(), data["image"], prefixes(row, 16)))
    head = model.head.caption  # type: ignore[union-attr]
    logits = F.linear(head.norm(out["fused_hidden"]), head.proj.weight)
    nll = [-logits[b, 15 + t].log_softmax(-1)[ids[b, t]] for b in range(3) for t in range(int(lengths[b]))]
    count = losses["caption"].count_of(data)
    assert int(count) == int(lengths.sum())
    check_values(losses["caption"].term(out | data, float(count))[0] / count, torch.stack(nll).mean())  # type: ignore[operator]
