"""Adapters in files: merged into the matrices that they stand beside, and in the format of Hugging Face's PEFT.

PEFT keeps ``adapter_config.json`` beside ``adapter_model.safetensors``, in which A of the layer ``PATH`` is
``base_model.model.PATH.lora_A.weight``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.pretrained.name_map import NameMap

_PREFIX = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: our leaf -> PEFT's
_LEAVES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
#: settings of a PEFT adapter that change the computation in ways that ``LoRALinear`` does not know
_UNKNOWN = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication", "lora_bias", "fan_in_fan_out")


def merge(state: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """The state of the model without adapters: ``W + scaling B A`` in the place of W.

    The sum is taken in at least float32 and rounded once to W's dtype.

    Args:
        state: ``{parameter name: whole tensor}``, adapters among them.
        scaling: of the adapters (``LoRALinear.scaling``).
    """
    merged = {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] not in _LEAVES}
    for name, a in state.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "lora_a":
            weight, b = state[f"{path}.weight"], state[f"{path}.lora_b"]
            dtype = torch.promote_types(weight.dtype, torch.float32)
            update = scaling * (b.to(dtype) @ a.to(dtype))
            merged[f"{path}.weight"] = (weight.to(dtype) + update).to(weight.dtype)
    return merged


def layer_paths(names: NameMap) -> dict[str, str]:
    """``{path of a linear layer of ours: its path in the published format}``, of those that are a layer of their own there."""
    found = {}
    for name, pieces in names.pieces.items():
        source, theirs = pieces[0].source, pieces[0].theirs
        own = source.parts == 1 and source.shape is None and source.stack is None and not source.transpose
        if own and name.endswith(".weight") and theirs.endswith(".weight"):
            found[name.removesuffix(".weight")] = theirs.removesuffix(".weight")
    return found


def export_peft(
    folder: str | Path,
    state: Mapping[str, Tensor],
    paths: Mapping[str, str],
    *,
    alpha: float,
    rank_stabilized: bool = False,
    dropout: float = 0.0,
    base: str | None = None,
) -> None:
    """Write the adapters of ``state`` as a PEFT adapter of a causal language model.

    Args:
        folder: is made; files of these names in it are replaced.
        state: ``{parameter name: whole tensor}``; what is no adapter is left alone.
        paths: see ``layer_paths``.
        alpha, rank_stabilized, dropout: as the run's `lora` section has them.
        base: name or folder of the base model, noted for PEFT.

    Raises:
        UserError: no adapters, or of several ranks; one beside a layer that ``paths`` does not have.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    targets: dict[str, None] = {}
    ranks: set[int] = set()
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        if leaf not in _LEAVES:
            continue
        if path not in paths:
            raise UserError(f"export_peft: '{path}' is no layer of its own in the published format, so its adapter has no place.")
        target = paths[path]
        targets[target] = None
        ranks.add(tensor.shape[0 if leaf == "lora_a" else 1])
        tensors[f"{_PREFIX}{target}.{_LEAVES[leaf]}"] = tensor.detach().cpu().contiguous()
    if len(ranks) != 1:
        raise UserError(f"export_peft: adapters of one rank are needed, found ranks {sorted(ranks)}.")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": ranks.pop(),
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rank_stabilized,
        "target_modules": list(targets),
        "bias": "none",
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def import_peft(folder: str | Path, paths: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The adapters of a PEFT folder: ``({our parameter name: tensor}, {setting of the `lora` section: value})``.

    Args:
        paths: as for ``export_peft``.

    Raises:
        UserError: no such files; a kind of adapter that is not LoRA on linear layers; a layer that ``paths`` does not have.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    for file in (_CONFIG, _WEIGHTS):
        if not (folder / file).is_file():
            raise UserError(f"import_peft: there is no {file} in {folder}.")
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    odd = {key: config[key] for key in _UNKNOWN if config.get(key)}
    odd |= {} if config.get("bias", "none") == "none" else {"bias": config["bias"]}
    if config.get("peft_type") != "LORA" or odd:
        kind = f"{config.get('peft_type')} with {odd}" if odd else config.get("peft_type")
        raise UserError(f"import_peft: {folder} holds {kind}; plain LoRA on linear layers is needed.")
    ours = {f"{_PREFIX}{theirs}": path for path, theirs in paths.items()}
    state: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / _WEIGHTS).items():
        for leaf, theirs in _LEAVES.items():
            path = ours.get(name.removesuffix(f".{theirs}"))
            if name.endswith(f".{theirs}") and path is not None:
                state[f"{path}.{leaf}"] = tensor
                break
        else:
            raise UserError(f"import_peft: '{name}' of {folder} is no adapter of a matrix of this model.")
    layers = sorted({name.rpartition(".")[0] for name in state})
    settings = {"layers": layers, "rank": config["r"], "alpha": float(config["lora_alpha"])}
    return state, settings | {"rank_stabilized": bool(config.get("use_rslora")), "dropout": float(config.get("lora_dropout", 0))}
