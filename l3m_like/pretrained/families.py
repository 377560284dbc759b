"""Families of published models, each one file: a name map, and the fields of ``config.json`` that follow from a built model."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.pretrained.name_map import Templates

#: ``{model_type of a config.json: module}``; a module is imported when its family is asked for, and calls it ``FAMILY``
MODULES = {
    name: f"l3m_like.pretrained.{name}"
    for name in ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt2", "falcon", "llada")
} | {"DiTTransformer2DModel": "l3m_like.pretrained.dit", "sit": "l3m_like.pretrained.sit"}
#: likewise of networks that are parts of a model, and are not exported: ``{model_type: path of the family}``
PARTS = {
    "lpips_vgg": "l3m_like.pretrained.lpips.VGG",
    "lpips_alex": "l3m_like.pretrained.lpips.ALEX",
    "timm": "l3m_like.pretrained.timm_vit.FAMILY",
}


@dataclass(frozen=True)
class Family:
    """How models of one kind are published on Hugging Face.

    Attributes:
        model_type, architecture: of ``config.json``.
        names: where each tensor lies; a function of the model where that depends on its sizes.
        describe: ``describe(model)``: the fields of ``config.json`` that follow from a built model (nested as they are there).
            Raises UserError for a model that is not of this family, naming the setting.
        normal: a ``config.json`` of any age as ``describe`` would write it: old spellings renamed, absent fields filled in.
        knobs: ``{field: the knob of the shipped configs that sets it}``, dots for nested fields; for messages.
        ignored: patterns (regular expressions) of tensors in published files that nobody needs.
        diffusers: its folders are written as diffusers names their files.
    """

    model_type: str
    architecture: str
    names: Templates | Callable[[nn.Module], Templates]
    describe: Callable[[nn.Module], dict[str, Any]]
    normal: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    knobs: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    diffusers: bool = False

    def templates(self, model: nn.Module) -> Templates:
        """``names`` of ``model``.

        Raises:
            UserError: the model is none of this family.
        """
        return self.names(model) if callable(self.names) else self.names

    def ignores(self, name: str) -> bool:
        """Is ``name`` of a published file one that nobody needs?"""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


def family(name: str) -> Family:
    """The family of a ``model_type``, or that of your own with the path ``my_module.FAMILY``.

    Raises:
        UserError: there is none.
    """
    module, _, attribute = PARTS.get(name, name).rpartition(".")
    if not module:
        if name not in MODULES:
            raise UserError(
                f"there is no family for model_type '{name}'. {did_you_mean(name, (*MODULES, *PARTS))} "
                "One of your own is named by its path: init.family: my_module.FAMILY (docs/add_a_model.md)."
            )
        module, attribute = MODULES[name], "FAMILY"
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        raise UserError(f"family: {name}: {error}. Its folder belongs into run.imports, or beside the config.") from None
    if not isinstance(found, Family):
        raise UserError(f"family: {name} is no Family of l3m_like.pretrained.families.")
    return found


def family_of(model: nn.Module) -> Family:
    """The first family that ``model`` is of (a Mistral without a window is a Llama).

    Raises:
        UserError: none is; with what each of them says.
    """
    refused = []
    for name in MODULES:
        try:
            family(name).describe(model)
        except UserError as error:
            refused.append(f"\n  {name}: {error}")
        else:
            return family(name)
    raise UserError(f"the family of this model must be named; it is none of those that are known:{''.join(refused)}")
