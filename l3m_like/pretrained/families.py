"""Families of published models, each one file: a name map, and the fields of ``config.json`` that follow from a built model."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.pretrained.name_map import Templates

_HERE = "l3m_like.pretrained"
#: ``{model_type of a config.json: path of its family}``; a module is imported when its family is asked for. An export takes the
#: first that a model is of
MODELS = {
    name: f"{_HERE}.{name}.FAMILY"
    for name in ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt2", "falcon", "llada")
} | {
    "clip": f"{_HERE}.clip.CLIP",
    "siglip": f"{_HERE}.clip.SIGLIP",
    "timm": f"{_HERE}.timm_vit.FAMILY",
    "vit_mae": f"{_HERE}.vit_mae.FAMILY",
    "aimv2_vision_model": f"{_HERE}.aim.AIMV2_VISION",
    "aimv2": f"{_HERE}.aim.AIMV2",
    "aimv1": f"{_HERE}.aim.AIMV1",
    "DiTTransformer2DModel": f"{_HERE}.dit.FAMILY",
    "sit": f"{_HERE}.sit.FAMILY",
    "dit_dh": f"{_HERE}.dit_dh.FAMILY",
    "rae_decoder": f"{_HERE}.rae.FAMILY",
}
#: likewise of networks that are parts of a model, and of parts of published models: no export takes them by itself
PARTS = {
    "lpips_vgg": f"{_HERE}.lpips.VGG",
    "lpips_alex": f"{_HERE}.lpips.ALEX",
    "AutoencoderKL": f"{_HERE}.autoencoder_kl.FAMILY",
    "clip_vision_model": f"{_HERE}.clip.CLIP_VISION",
    "vit_mae_encoder": f"{_HERE}.vit_mae.ENCODER",
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
        spellings: ``{pattern: replacement}`` of other names of tensors in published files.
        layout: how it is published: as folders of "transformers", "diffusers" or "timm", or as a "file" of ``torch.save``.
        reads: other model types of which a folder holds such a model as well (a CLIP holds an image tower).
        constants: tensors of published files that are computed here: compared when they are read, and written. On the CPU, in
            float64.
        free: fields that change no output of given weights: they are written, and not compared.
        colours: mean and deviation of the colours in [0, 1] that a model takes out of images: compared with what a folder says
            of its images, and written. None: nothing is known of them.
        sized_by: ``{field: path of the block that it is about}``: not compared where that one begins with random weights.
    """

    model_type: str
    architecture: str
    names: Templates | Callable[[nn.Module], Templates]
    describe: Callable[[nn.Module], dict[str, Any]]
    normal: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    knobs: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    spellings: Mapping[str, str] = field(default_factory=dict)
    layout: str = "transformers"
    reads: tuple[str, ...] = ()
    constants: Callable[[nn.Module], Mapping[str, Tensor]] = lambda model: {}
    free: tuple[str, ...] = ()
    sized_by: Mapping[str, str] = field(default_factory=dict)
    colours: Callable[[nn.Module], tuple[list[float], list[float]] | None] = lambda model: None

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
    module, _, attribute = (MODELS | PARTS).get(name, name).rpartition(".")
    if not module:
        raise UserError(
            f"there is no family for model_type '{name}'. {did_you_mean(name, (*MODELS, *PARTS))} "
            "One of your own is named by its path: init.family: my_module.FAMILY (docs/add_a_model.md)."
        )
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        raise UserError(f"family: {name}: {error}. Its folder belongs into run.imports, or beside the config.") from None
    if not isinstance(found, Family):
        raise UserError(f"family: {name} is no Family of l3m_like.pretrained.families.")
    return found


def family_of(model: nn.Module, *, file: bool = False) -> Family:
    """The first family that ``model`` is of (a Mistral without a window is a Llama).

    Args:
        file: of those that are published as one file; else of those that are folders.

    Raises:
        UserError: none is; with what each of them says.
    """
    refused = []
    for name in MODELS:
        found = family(name)
        try:
            found.describe(model)
        except UserError as error:
            refused.append(f"\n  {name}: {error}")
            continue
        if (found.layout == "file") == file:
            return found
        refused.append(f"\n  {name}: it is published as a {'folder' if file else 'file (--out NAME.pt)'}.")
    raise UserError(f"the family of this model must be named; it is none of those that are known:{''.join(refused)}")
