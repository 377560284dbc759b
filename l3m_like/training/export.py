"""A run's weights as published ones (a folder or a file), a folder's weights as a checkpoint; tensor by tensor, on any mesh."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.blocks import Transformer
from l3m_like.config import RunConfig, start_run
from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.meta_model import Frozen, MetaModel, Tower, walk
from l3m_like.data.tokenizer import TextTokenizer
from l3m_like.distributed.mesh import build_mesh
from l3m_like.pretrained.families import Family, family, family_of
from l3m_like.pretrained.folder import (
    CONFIG,
    PREPROCESSOR,
    STATE_FILES,
    Folder,
    FolderMissing,
    find_folder,
    small_files,
    write_folder,
    write_json,
    write_state,
)
from l3m_like.pretrained.lora import export_peft, layer_paths, merge
from l3m_like.pretrained.name_map import NameMap, export_tensor
from l3m_like.pretrained.wrapped import wrapped_family
from l3m_like.training.build import build_model
from l3m_like.training.checkpoint import Checkpointer, WholeTensors
from l3m_like.training.hugging_face import same_colours
from l3m_like.training.load import load
from l3m_like.training.lora import adapter_names, adapters
from l3m_like.training.start_from import find_checkpoint, frozen_parts

# ---- there -----------------------------------------------------------------------------------------------------------------


def export(
    run: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    ema: bool = False,
    dtype: torch.dtype | None = None,
    most: int = 5 * 10**9,
    family_name: str | None = None,
    part: str | None = None,
) -> list[str]:
    """Write the weights of a run as a Hugging Face folder, or as a file; returns what to tell the user.

    Where the run began from a folder that is still there, its ``config.json`` (for what does not follow from the model),
    tokenizer files and dtypes are taken over. What serves training alone (blocks that are ``training_only``, such as a decoder
    behind an image tower) and frozen parts are left out if the family has no place for them.

    Args:
        run: a run's directory.
        out: a new folder; or a new file (``.pt``), for families that are published as one: a dict with the state ``model`` and,
            if the run kept averages, ``ema``; with ``ema``, the averaged state alone.
        step: of the checkpoint; None: the newest.
        ema: the averaged weights.
        dtype: of the parameters; None: those of the folder that the run began from, else those of the checkpoint. Buffers,
            constants and what a module reads as it is stored (``full_precision``) keep theirs.
        most: bytes of a file.
        family_name: see ``families.family``; None: that of the folder that the run began from, else the one that fits.
        part: path of the part that is written (``decoder``); None: the whole model.

    Raises:
        UserError: no such run, step or part; no averaged weights; a model that no family describes; a folder that is not empty.
    """
    run, out = Path(run), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already. Give the name of a new folder, or of a new file.")
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is no run's directory: it has no config.yaml.")
    cfg = RunConfig.from_file(run / "config.yaml")
    if ema and cfg.ema is None:
        raise UserError(f"--ema: the run in {run} kept no average (its config has ema: null).")
    checkpoints, newest = find_checkpoint(str(run), "--run")
    whole = WholeTensors(checkpoints, newest if step is None else step)
    model, inside = _meta_part(cfg, part)
    source, notes = _source(cfg, part)
    file = out.suffix in STATE_FILES
    of = _family(cfg, model, source, family_name, file)
    masks = {trunk.mask for trunk in model.modules() if isinstance(trunk, Transformer)} - {"causal"}
    if masks and "CausalLM" in of.architecture:
        notes.append(f"its mask is {masks.pop()}: read as {of.architecture} it has causal attention, and is another model.")
    names, left = _names(of, model, whole, inside)
    notes += left
    if file:
        states = {"": True} if ema else {"model": False} | ({"ema": True} if cfg.ema is not None else {})
        kept = {name: _Saved(model, names, whole, averaged, inside) for name, averaged in states.items()}
        return [*notes, _write_state_file(out, of, model, names, kept, dtype)]
    tensors = _Saved(model, names, whole, ema, inside)
    constants = of.constants(model)
    layout = {
        name: (_dtype(name, tensors.dtype(names.theirs[names.copies.get(name, name)][0].ours), dtype, source), shape)
        for name, shape in names.shapes.items()
    }
    first = next(iter(layout.values()))[0]
    config = _config(cfg, model, of, source, first)
    for name, value in constants.items():
        stored = source.tensors[name].dtype if source and name in source.tensors else torch.promote_types(first, torch.float32)
        layout[name] = stored, tuple(value.shape)
    out.mkdir(parents=True, exist_ok=True)
    stem = "diffusion_pytorch_model" if of.layout == "diffusers" else "model"

    def make(name: str) -> Tensor:
        return constants[name] if name in constants else export_tensor(names, names.copies.get(name, name), tensors)

    write_folder(out, layout, make, most, stem)
    if source is not None:
        for path in small_files(source.path):
            shutil.copyfile(path, out / path.name)
        _write_colours(out / PREPROCESSOR, of, model, source)
    elif of.layout == "transformers":
        notes += _write_tokenizer(cfg, out, config)
        _write_preprocessor(out / PREPROCESSOR, of.colours(model), config.get("vision_config", config))
    write_json(out / CONFIG, config)  # last: without it the folder is none
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return [*notes, f"{out}: {of.architecture}, {len(layout)} tensors, {size:,} bytes, of {whole.path}"]


def _write_state_file(
    out: Path, of: Family, model: nn.Module, names: NameMap, states: Mapping[str, _Saved], dtype: torch.dtype | None
) -> str:
    """One file of ``torch.save``, which is held in memory while it is written; what to tell the user.

    Args:
        states: by their names there; "": the only one, without a name.
    """
    made: dict[str, dict[str, Tensor]] = {}
    for state, tensors in states.items():
        values = {name: export_tensor(names, names.copies.get(name, name), tensors) for name in names.shapes}
        wide = torch.promote_types(dtype or next(iter(values.values())).dtype, torch.float32)
        fixed = {name: value.to(wide) for name, value in of.constants(model).items()}
        first = {name: names.theirs[names.copies.get(name, name)][0].ours for name in values}
        cast = {name: _dtype(name, (value.dtype, tensors.casts(first[name])), dtype, None) for name, value in values.items()}
        made[state] = {name: value.to(cast[name]).contiguous() for name, value in values.items()} | fixed
    out.parent.mkdir(parents=True, exist_ok=True)
    write_state(out, made)
    held = " and ".join(f"'{name}'" for name in made if name) or "averaged"
    return f"{out}: {of.architecture}, {len(names.shapes)} tensors, {held}, {out.stat().st_size:,} bytes"


def export_adapters(
    run: str | Path, out: str | Path, *, step: int | None = None, ema: bool = False, family_name: str | None = None
) -> list[str]:
    """Write the adapters of a run alone, as a PEFT folder; arguments, and what it returns, as ``export``.

    Raises:
        UserError: no such run or step; a run without `lora`, or that trained more than adapters; as ``export``.
    """
    run = Path(run)
    cfg = RunConfig.from_file(run / "config.yaml")
    if cfg.lora is None or cfg.lora.train:
        what = "trained more than adapters (lora.train)" if cfg.lora else "has no `lora`"
        raise UserError(f"--adapters: the run in {run} {what}. Leave it out: to-hf writes the whole model, adapters merged.")
    checkpoints, newest = find_checkpoint(str(run), "--run")
    model, _ = _meta_part(cfg, None)
    of = family(family_name) if family_name else wrapped_family(model) or family_of(model)
    whole = WholeTensors(checkpoints, newest if step is None else step)
    names, _ = _names(of, model, whole)
    saved = _Saved(model, names, whole, ema)
    state = {name: saved[name] for name in sorted(adapter_names(model))}
    lora, base = cfg.lora, cfg.init.from_ if cfg.init is not None else None
    shape = {"alpha": lora.alpha, "rank_stabilized": lora.rank_stabilized, "dropout": lora.dropout}
    export_peft(out, state, layer_paths(names), **shape, base=base)
    return [f"{out}: {len(state) // 2} adapters of rank {lora.rank} of {of.architecture}"]


class _Saved(Mapping[str, Tensor]):
    """A model's tensors as a checkpoint holds them, adapters merged, read when they are asked for. Stacks are asked for once
    for each of their tensors: the last few are kept."""

    def __init__(self, model: nn.Module, names: NameMap, whole: WholeTensors, ema: bool, inside: str = "") -> None:
        averaged = {name for name, p in model.named_parameters() if ema and p.requires_grad}
        exact = [(path, module) for path, module in model.named_modules() if getattr(module, "full_precision", False)]
        self._exact = {name for name, _ in model.named_buffers()}
        self._exact |= {f"{path}.{name}" if path else name for path, module in exact for name, _ in module.named_parameters()}
        stored = [*names.pieces, *adapter_names(model)]
        self._keys = {name: f"{'ema' if name in averaged else 'model'}/{inside}{name}" for name in stored}
        self._adapters = {f"{path}.weight": layer for path, layer in adapters(model).items()}
        self._names, self._whole = names, whole
        self._kept: dict[str, Tensor] = {}

    def dtype(self, name: str) -> tuple[torch.dtype, bool]:
        """(dtype in the checkpoint, may it be cast)."""
        key = self._keys[name]
        return (self._whole.dtype(key) if key in self._whole.index else torch.float32), self.casts(name)

    def casts(self, name: str) -> bool:
        """Whether it may have another dtype: not a buffer, nor a parameter of a module with ``full_precision``."""
        return name not in self._exact

    def __getitem__(self, name: str) -> Tensor:
        if name in self._kept:
            return self._kept[name]
        key = self._keys[name]
        value = self._whole.read([key])[key]
        if name in self._adapters:
            path = name.removesuffix(".weight")
            both = {n: self[n] for n in (f"{path}.lora_a", f"{path}.lora_b")}
            value = merge({name: value, **both}, self._adapters[name].scaling)[name]
        if len(self._names.pieces.get(name, ())) > 1:
            self._kept[name] = value
            while len(self._kept) > 3:  # gate, up and down of one layer
                del self._kept[next(iter(self._kept))]
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._keys  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _meta_part(cfg: RunConfig, path: str | None) -> tuple[nn.Module, str]:
    """The model or a part of it, and the prefix of the part's names."""
    if cfg.mup is not None:
        raise UserError("the run has `mup`: no config.json has a place for its factors of outputs and scores.")
    model = build_model(cfg)
    if path is None:
        return model, ""
    parts = {name: module for name, module in model.named_modules() if name and isinstance(module, (MetaModel, Frozen, Tower))}
    if path not in parts:
        raise UserError(f"--part {path}: the model has no such part. {did_you_mean(path, parts)}")
    part = parts[path]
    return (part.model, f"{path}.model.") if isinstance(part, (Frozen, Tower)) else (part, f"{path}.")


def _family(cfg: RunConfig, model: nn.Module, source: Folder | None, named: str | None, file: bool) -> Family:
    """The family that an export is of; it must be published as a file, or not, as ``file`` says."""
    if named is None and cfg.init is not None:
        named = cfg.init.family
    found = family(named) if named else wrapped_family(model) or (family(source.model_type) if source else None)
    if found is None or (named is None and (found.layout == "file") != file):
        return family_of(model, file=file)
    if (found.layout == "file") != file:
        kind = "a file of torch.save: give --out a name that ends in .pt" if found.layout == "file" else "a folder"
        raise UserError(f"{found.architecture} is published as {kind}.")
    return found


def _names(of: Family, model: nn.Module, whole: WholeTensors, inside: str = "") -> tuple[NameMap, list[str]]:
    """The model's tensors, and what stays behind, in words; without a word frozen parts that the family does not know.

    Raises:
        UserError: anything else that the checkpoint holds of the model would be lost.
    """
    names = NameMap.of(of.templates(model), model, strict=False)
    frozen = tuple(f"{path}." for path in frozen_parts(model))
    held = [key.removeprefix(f"model/{inside}") for key in whole.index if key.startswith(f"model/{inside}")]
    kept = {*names.pieces, *adapter_names(model)}  # adapters are merged
    lost = [name for name in held if name not in kept and not name.startswith(frozen)]
    training = {path: block for path, block in walk(model) if block.training_only}
    behind = [path for path in training if any(name.startswith(f"{path}.") for name in lost)]
    lost = [name for name in lost if not name.startswith(tuple(f"{path}." for path in behind))]
    if lost:
        raise UserError(
            f"{of.architecture} has no place for '{lost[0]}', one of {len(lost)} such tensors of {whole.path}; --family names "
            "another family, --part a part that is written alone."
        )
    return names, [f"what serves training alone is left out: {', '.join(behind)}"] if behind else []


def _source(cfg: RunConfig, part: str | None) -> tuple[Folder | None, list[str]]:
    """The folder that the run, or the part of it, began from, if it is still there."""
    if cfg.init is None:
        return None, []
    where, setting = (cfg.init.from_, "init.from") if part is None else (cfg.init.parts.get(part), f"init.parts.{part}")
    if where is None:
        return None, []
    try:
        found = find_folder(where, setting, download=False)
    except FolderMissing as error:
        return None, [f"{error} Its config.json and tokenizer are not copied."]
    return found, []


def _dtype(name: str, saved: tuple[torch.dtype, bool], asked: torch.dtype | None, source: Folder | None) -> torch.dtype:
    dtype, casts = saved
    if asked is not None and casts and dtype.is_floating_point:
        return asked
    return source.tensors[name].dtype if source is not None and name in source.tensors and asked is None else dtype


def _config(cfg: RunConfig, model: nn.Module, of: Family, source: Folder | None, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json``: what follows from the model, and the rest as the folder had it that the run began from."""
    ours = of.describe(model)
    if of.layout == "diffusers":
        return {"_class_name": of.architecture, **ours}
    name = str(dtype).removeprefix("torch.")
    if source is not None and source.model_type == of.model_type:
        there = of.normal(source.config)
        changed = {field: value for field, value in ours.items() if there.get(field) != value}
        kept = dict(source.config)
        if "rope_parameters" in changed:  # the older spelling, which readers would prefer
            kept = {field: value for field, value in kept.items() if field not in ("rope_scaling", "rope_theta")}
        for field in [field for field in changed if field.endswith(("_config", "_cfg"))]:  # of one of its towers, or timm's
            changed[field] = {**kept.get(field, {}), **changed[field]}
        if of.layout == "timm":  # its arguments are stronger than its fields
            arguments = {**kept.get("model_args", {}), **changed.get("model_args", {})}
            arguments |= {name: ours[name] for name in ("num_classes", "global_pool") if name in {*arguments, *changed}}
            return {**kept, **changed} | ({"model_args": arguments} if arguments else {})
        old = {"torch_dtype"} & set(source.config)
        return {**kept, **changed, (old.pop() if old else "dtype"): name}
    if of.layout == "timm":
        return ours
    config = {"architectures": [of.architecture], "model_type": of.model_type, **ours, "dtype": name}
    train = cfg.to_dict()["data"]["train"]
    length = (train.get("pack") or {}).get("length")
    return config if length is None else {**config, "max_position_embeddings": length}


def _write_colours(path: Path, of: Family, model: nn.Module, source: Folder) -> None:
    """Into the copied file ``path`` the colours that the model takes out of images, where it says others."""
    ours, theirs = of.colours(model), source.colours
    if path.is_file() and ours is not None and theirs is not None and not same_colours(ours, theirs):
        fields = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {**fields, "image_mean": ours[0], "image_std": ours[1]})


def _write_preprocessor(path: Path, colours: tuple[list[float], list[float]] | None, config: Mapping[str, Any]) -> None:
    """What becomes of images before a model that has no source folder; nothing for a model without images."""
    if colours is not None:
        side = config["image_size"]
        fields = {"do_resize": True, "size": {"height": side, "width": side}, "do_center_crop": False}
        fields |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
        write_json(path, {**fields, "image_mean": colours[0], "image_std": colours[1]})


def _write_tokenizer(cfg: RunConfig, out: Path, config: dict[str, Any]) -> list[str]:
    """The tokenizer of the run's data, and its end token in ``config``."""
    process, text = cfg.to_dict()["data"]["train"].get("process") or {}, config.get("text_config", config)
    if not isinstance(process.get("tokenizer"), str) or "vocab_size" not in text:
        return [] if "vocab_size" not in text else ["the run's data names no tokenizer: none is written"]
    # of the data: the model may have rows for more (a mask token)
    tokenizer = TextTokenizer(process["tokenizer"], process.get("vocab_size") or text["vocab_size"], process.get("end"))
    if tokenizer.is_bytes:
        text["eos_token_id"] = tokenizer.end_id
        return ["the tokenizer is bytes, which have no tokenizer.json: none is written"]
    try:
        tokenizer.write(out)
    except UserError as error:
        return [f"no tokenizer is written: {error}"]
    text["eos_token_id"] = tokenizer.end_id
    return []


# ---- and back --------------------------------------------------------------------------------------------------------------


def import_folder(folder: str, config: str | Path, out: str | Path, overrides: Sequence[str] = ()) -> list[str]:
    """A run's directory ``out`` with the weights of a folder as its checkpoint of step 0, which ``init.from`` and ``load`` read.

    Every rank of a launcher calls it; each reads and writes its shards.

    Raises:
        UserError: the folder does not fit the config's model.
    """
    quoted = folder.replace("\\", "\\\\").replace("'", "\\'")
    cfg = RunConfig.from_file(config, [*overrides, f"init.from='{quoted}'"])
    cfg.run.dir, cfg.run.name = str(Path(out).parent), Path(out).name
    mesh = build_mesh(cfg.mesh_axes())
    model = load(cfg, mesh=mesh).model
    run_dir = start_run(cfg)
    tensors = {f"model/{name}": tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    checkpointer = Checkpointer(run_dir / "checkpoints", asynchronous=False)
    frozen = {path: part.loaded_from for path, part in frozen_parts(model).items()}
    checkpointer.save(0, tensors, {"step": 0, "config": cfg.to_dict(), "frozen": frozen})
    checkpointer.close()
    return [f"{run_dir}: {len(tensors)} tensors of {folder}, as the checkpoint of step 0"]
