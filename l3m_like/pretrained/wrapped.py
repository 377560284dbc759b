"""Classes that ``HFModel`` (of transformers) and ``TimmViT`` (of timm) wrap: their parameters have published names already."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from l3m_like.blocks.hf_model import HFModel, TiedHead
from l3m_like.core.errors import UserError
from l3m_like.core.meta_model import walk
from l3m_like.pretrained.families import Family
from l3m_like.pretrained.name_map import Source, Templates
from l3m_like.pretrained.timm_vit import wrapped_timm

#: fields of ``config.json`` in which a folder and the model may differ: they change no output of given weights
_FREE = re.compile(r"use_cache|initializer_range|max_position_embeddings|\w+_token_id|\w*(dropout|pdrop)\w*")


def wrapped_family(model: nn.Module) -> Family | None:
    """The family of the class that ``model`` wraps, with the names as they are; None: it wraps none.

    Raises:
        UserError: it wraps several.
    """
    found = [(path, block) for path, block in walk(model) if isinstance(block, HFModel)]
    if not found:
        return wrapped_timm(model)
    if len(found) > 1:
        raise UserError(f"the model has {len(found)} HFModels ({', '.join(path for path, _ in found)}); a folder holds one.")
    path, block = found[0]
    ours = _fields(block.hf_config)
    free = {name: value for name, value in ours.items() if _FREE.fullmatch(name)}
    tied = [name for name, module in block.model.named_modules() if isinstance(module, TiedHead)]

    def normal(config: Mapping[str, Any]) -> dict[str, Any]:
        return _fields(type(block.hf_config).from_dict(dict(config))) | free

    return Family(
        model_type=block.hf_config.model_type,
        architecture=type(block.model).__name__,
        names=_names(path, block),
        describe=lambda model: ours,
        normal=normal,
        knobs={name: f"model.{path}.config.{name}" for name in ours},
        ignored=tuple(re.escape(f"{name}.weight") for name in tied),
    )


def _names(path: str, block: HFModel) -> Templates:
    """Where each parameter lies in published files: under its own name, but where transformers itself stacks experts that are
    stored one by one, and renames what holds them."""
    conversion = importlib.import_module("transformers.conversion_mapping")
    steps = conversion.get_checkpoint_conversion_mapping(block.hf_config.model_type) or []
    names: dict[str, str | Source] = {}
    for name, _ in block.model.named_parameters():
        theirs, parts = name, ()
        for step in reversed(steps):  # from the class back to the files
            (target, *others), sources = step.target_patterns, [source.replace(r"\.", ".") for source in step.source_patterns]
            done = [type(operation).__name__ for operation in getattr(step, "operations", None) or ()]
            if others or target not in theirs:
                continue
            if not done and len(sources) == 1 and not set("^$()[]\\|+?") & set(sources[0] + target):
                theirs = theirs.replace(target, sources[0])
            elif done in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) and theirs.endswith(target):
                pieces = [source.split(".") for source in sources]
                different = [at for at, words in enumerate(zip(*pieces, strict=True)) if len(set(words)) > 1]
                words = list(pieces[0])
                if len(sources) > 1:
                    words[different[0]] = "{part}"
                    parts = tuple(piece[different[0]] for piece in pieces)
                theirs = theirs.removesuffix(target) + ".".join(words).replace("*", "{e}")
        names[f"{path}.model.{name}"] = Source(theirs, stack="e", split=parts) if "{e}" in theirs else theirs
    return names


def _fields(config: Any) -> dict[str, Any]:
    """The fields of ``config.json`` that are the class's own, those with default values too."""
    from transformers import PreTrainedConfig

    fields = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in fields.items() if name not in PreTrainedConfig().to_dict()}
