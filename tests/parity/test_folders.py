"""A random model of transformers, saved as a folder in several files, is the same model when `init.from` reads it."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest
import torch
from rule import check_gradients, gradients
from torch import Tensor, nn

import l3m_like
from l3m_like.pretrained import NameMap, families, import_state
from tests.pretrained.tiny import FAMILIES, config, exact, publish, reference

#: of logits, relative to the largest
BOUND = {torch.float32: 1e-5, torch.float64: 1e-9}
S = 24


def batch() -> dict[str, Tensor]:
    """A row of two documents and padding, and one of a document that begins far beyond the original context."""
    documents = torch.tensor([[0] * 10 + [1] * 9 + [-1] * 5, [0] * S])
    positions = torch.stack((torch.tensor([*range(10), *range(9), *range(5)]), torch.arange(S) + 300))
    ids = torch.randint(0, 257, (2, S), generator=torch.Generator().manual_seed(2))
    return {"text_ids": ids, "text_positions": positions, "text_document_ids": documents}


def seen(documents: Tensor, window: int | None) -> Tensor:
    """[B, 1, S, S]: 0 where a query sees a key, a large negative number where not; padding sees itself."""
    at = torch.arange(S)
    near = (at[:, None] >= at) & (at[:, None] - at < (window or S))
    allowed = (documents[:, :, None] == documents[:, None, :]) & near | torch.eye(S, dtype=torch.bool)
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min).unsqueeze(1)


def compare(family: str, dtype: torch.dtype, folder: Path, model: nn.Module | None = None) -> None:
    """Logits (packed with padding, and plain) and all gradients of ``model`` (what ``folder`` is read into)."""
    theirs = reference(family)
    theirs = exact(theirs) if dtype == torch.float64 else theirs
    model = model or l3m_like.load(config(family, folder), dtype=dtype).model
    data = batch()
    real = data["text_document_ids"] >= 0
    mask = seen(data["text_document_ids"], getattr(theirs.config, "sliding_window", None)).to(dtype)
    ours, wanted = [], []
    for packed in (True, False):
        keys = data if packed else {"text_ids": data["text_ids"]}
        ours.append(model(keys, model.inference())["text_logits"][real if packed else ...])
        extra = {"attention_mask": mask, "position_ids": data["text_positions"]} if packed else {}
        wanted.append(theirs(input_ids=data["text_ids"], **extra).logits[real if packed else ...])
    for found, right in zip(ours, wanted, strict=True):
        assert found.shape == right.shape and found.dtype == right.dtype == dtype
        assert float((found - right).abs().max()) <= BOUND[dtype] * float(right.abs().max())
    for outputs, of in ((ours, model), (wanted, theirs)):
        of.zero_grad()
        sum((o * torch.linspace(-1, 1, o.numel(), dtype=dtype).view_as(o)).square().sum() for o in outputs).backward()
    names = NameMap.of(families.family(family).names, model)
    vanishing = {"k_proj.bias": "softmax ignores what all keys have in common; RoPE leaves a little of it"}
    check_gradients(gradients(model), import_state(names, gradients(theirs)), vanishing=vanishing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_folder_equals_transformers(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    compare(family, dtype, publish(family, tmp_path))


def _swap_keys_and_values(family: families.Family) -> families.Family:
    names = dict(family.names)
    key, value = (f"trunk.layers.{{i}}.mixer.{x}_proj.{{leaf}}" for x in "kv")
    names[key], names[value] = names[value], names[key]
    return dataclasses.replace(family, names=names)


def _swap_norms(family: families.Family) -> families.Family:
    names = dict(family.names)
    first, second = (f"trunk.layers.{{i}}.norm_{x}.weight" for x in "12")
    names[first], names[second] = names[second], names[first]
    return dataclasses.replace(family, names=names)


@pytest.mark.parametrize("fault", [_swap_keys_and_values, _swap_norms])
def test_wrong_map_is_found(fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = families.family("llama")
    monkeypatch.setattr(importlib.import_module("l3m_like.pretrained.llama"), "FAMILY", fault(right))
    folder = publish("llama", tmp_path)
    with pytest.raises(AssertionError):
        compare("llama", torch.float32, folder)


@pytest.mark.parametrize(("family", "change"), [("mistral", "window"), ("qwen3", "theta")])
def test_wrong_number_is_found(family: str, change: str, tmp_path: Path) -> None:
    model = l3m_like.load(config(family, publish(family, tmp_path))).model
    if change == "theta":
        model.trunk.rope.theta /= 2
    for layer in model.trunk.layers:
        layer.mixer.window = 7 if change == "window" else layer.mixer.window
    with pytest.raises(AssertionError):
        compare(family, torch.float32, tmp_path, model)
