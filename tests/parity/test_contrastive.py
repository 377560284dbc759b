"""CLIP and SigLIP against transformers: embeddings, loss, all gradients, and a hundred steps of training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rule import check_gradients, check_values, gradients, perturb
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from l3m_like.config import RunConfig
from l3m_like.losses import Contrastive, SigmoidContrastive
from l3m_like.pretrained import NameMap, export_state, family, import_state
from l3m_like.training.build import build_model
from l3m_like.training.init import materialize

TOKENS, VOCABULARY, END, PATCH = 8, 50, 49, 14
TOWER = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = [
    *("image_size=28", "patch=14", "channels=3", "dim=32", "layers=2", "heads=4", "text_dim=32", "text_layers=2"),
    *("text_heads=4", f"max_tokens={TOKENS}", f"vocab_size={VOCABULARY}", "tokenizer=x.json"),
]
#: the softmax does not see a constant in the scores
VANISHING = {"k_proj.bias": "the softmax does not see a constant in the scores"}


def ours_of(name: str, dtype: torch.dtype = torch.float64) -> Any:
    more = "embed_dim=24" if name == "clip" else "mlp_dim=128"
    cfg = RunConfig.from_file(f"configs/experiment/{name}.yaml", [*SIZES, more])
    model = build_model(cfg)
    for part in model.values():
        materialize(part, torch.device("cpu"))
        perturb(part.to(dtype))
    return model


def theirs_of(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    text = TOWER | {"vocab_size": VOCABULARY, "max_position_embeddings": TOKENS, "eos_token_id": END, "bos_token_id": 0}
    vision = TOWER | {"image_size": 28, "patch_size": PATCH}
    if name == "clip":
        text, vision = ({**part, "hidden_act": "gelu", "projection_dim": 24} for part in (text, vision))
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).to(dtype).eval()
    text |= {"projection_size": 32, "pad_token_id": 0}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).to(dtype).eval()


def names_of(name: str, model: nn.Module) -> NameMap:
    return NameMap.of(family(name).templates(model), model)


def batch(seed: int = 0, rows: int = 5, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, TOKENS + 1, (rows,), generator=generator)
    place = torch.arange(TOKENS)
    ids = torch.randint(1, END, (rows, TOKENS), generator=generator)
    ids = torch.where(place == lengths[:, None] - 1, END, torch.where(place < lengths[:, None], ids, 0))
    image = torch.randn(rows, 3, 28, 28, generator=generator, dtype=torch.float64).to(dtype)
    return {"image": image, "text_ids": ids, "text_mask": place < lengths[:, None], "row": torch.arange(rows)}


def run(model: Any, loss: Any, data: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    for part in model.values():
        data = part(data)
    return loss.term(data, len(data["row"]))[0] / len(data["row"]), data


def reference(model: nn.Module, data: dict[str, Tensor]) -> Any:
    return model(input_ids=data["text_ids"], pixel_values=data["image"], return_loss=True)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_equals_transformers(name: str) -> None:
    ours, theirs, data = ours_of(name), theirs_of(name), batch()
    names = names_of(name, ours)
    theirs.load_state_dict(export_state(names, dict(ours.named_parameters())))
    loss, out = run(ours, Contrastive() if name == "clip" else SigmoidContrastive(), data)
    expected = reference(theirs, data)
    check_values(out["image_embedding"].detach(), expected.image_embeds.detach())
    check_values(out["text_embedding"].detach(), expected.text_embeds.detach())
    check_values(loss.detach(), expected.loss.detach())
    loss.backward()
    expected.loss.backward()
    check_gradients(gradients(ours), import_state(names, gradients(theirs)), vanishing=VANISHING)
    back = import_state(names, dict(theirs.state_dict()))
    assert all(torch.equal(back[key], value) for key, value in ours.named_parameters())


def test_a_wrong_name_is_found() -> None:
    """Two towers' norms swapped."""
    ours, theirs, data = ours_of("clip"), theirs_of("clip"), batch()
    state = export_state(names_of("clip", ours), dict(ours.named_parameters()))
    first, second = "vision_model.pre_layrnorm.weight", "vision_model.post_layernorm.weight"
    theirs.load_state_dict(state | {first: state[second], second: state[first]})
    loss, _ = run(ours, Contrastive(), data)
    with pytest.raises(AssertionError):
        check_values(loss.detach(), reference(theirs, data).loss.detach())


def train_both(steps: int) -> list[tuple[float, float]]:
    """Both from the same weights, on the same batches, by AdamW: the losses of each step."""
    ours, theirs = ours_of("clip"), theirs_of("clip")
    theirs.load_state_dict(export_state(names_of("clip", ours), dict(ours.named_parameters())))
    settings = {"lr": 1e-3, "betas": (0.9, 0.98), "weight_decay": 0.1}
    optimizers = [torch.optim.AdamW(model.parameters(), **settings) for model in (ours, theirs)]
    losses = []
    for step in range(steps):
        data = batch(step)
        mine, _ = run(ours, Contrastive(), data)
        theirs_loss = reference(theirs, data).loss
        for optimizer, loss in zip(optimizers, (mine, theirs_loss), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append((float(mine.detach()), float(theirs_loss.detach())))
    return losses


@pytest.mark.parametrize("steps", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_trajectory_of_training(steps: int) -> None:
    losses = train_both(steps)
    assert len({round(ours, 6) for ours, _ in losses}) == steps
    for ours, theirs in losses:
        assert abs(ours - theirs) <= 1e-7 * abs(theirs)
