"""Published weights: Hugging Face folders (``config.json`` and safetensors files, of which regions of single tensors are read and
written), and single files of ``torch.save``."""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from l3m_like.core.errors import UserError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: what transformers makes of images
PREPROCESSOR = "preprocessor_config.json"
#: how diffusers calls them
DIFFUSERS_SINGLE = "diffusion_pytorch_model.safetensors"
DIFFUSERS_INDEX = "diffusion_pytorch_model.safetensors.index.json"
#: of older folders
PICKLED = "pytorch_model.bin"
#: of a single file
STATE_FILES = (".pt", ".pth", ".bin")
#: what a single file is, and a tensor that says so; the first that it holds counts
KINDS = (
    ("dit_dh", "s_embedder.proj.weight"),
    ("sit", "x_embedder.proj.weight"),
    ("rae_decoder", "trainable_cls_token"),  # not decoder_embed.weight, which MAE's files hold too
    ("rae_decoder", "decoder.trainable_cls_token"),
    ("aimv2", "trunk.blocks.0.mlp.fc3.weight"),
    ("aimv1", "trunk.post_trunk_norm.bias"),
)
#: what a folder holds beside weights and config.json, as the tokenizers of transformers and its generation read it
SMALL_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", PREPROCESSOR,
)  # fmt: skip
#: as safetensors calls them
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class FolderMissing(UserError):
    """No such folder on this machine, and no such model in the hub's cache."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a folder."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Folder:
    """A Hugging Face folder. Making one reads the files' headers; ``read`` maps the bytes that it needs, and copies no others.

    Args:
        path: with ``config.json``, and ``model.safetensors`` or the files that ``model.safetensors.index.json`` names (or the
            same as diffusers names them).

    Raises:
        UserError: a file is missing, cut short or damaged; weights that are quantised, or no safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = _json(path / CONFIG)
        if "quantization_config" in self.config:
            raise UserError(f"{path} holds quantised weights (quantization_config in its {CONFIG}). Give the unquantised model.")
        index = next((path / name for name in (INDEX, DIFFUSERS_INDEX) if (path / name).is_file()), None)
        single = next((name for name in (SINGLE, DIFFUSERS_SINGLE) if (path / name).is_file()), None)
        if index is not None:
            placed: dict[str, str] = _json(index)["weight_map"]
            files = sorted(set(placed.values()))
        elif single is not None:
            placed, files = {}, [single]
        else:
            raise UserError(
                f"{path} holds neither {SINGLE} nor {INDEX} nor {PICKLED}. Other formats are not read: convert them "
                "(save_pretrained of transformers writes safetensors)."
            )
        self.tensors: dict[str, Stored] = {}
        for file in files:
            self.tensors |= _header(path / file)
        for name, file in placed.items():
            if name not in self.tensors or self.tensors[name].file != file:
                raise UserError(f"{index} says that '{name}' is in {file}, which does not hold it. Download it again.")
        self._open: dict[str, Any] = {}
        self._stored: dict[str, str] = {}

    @property
    def model_type(self) -> str:
        """Of ``config.json``; "timm" for a folder of timm's, which names an architecture instead.

        Raises:
            UserError: it names none.
        """
        found = self.config.get("model_type", self.config.get("_class_name"))  # the second is diffusers'
        if found is None and "architecture" in self.config:
            return "timm"
        if found is None:
            raise UserError(f"{self.path / CONFIG} has no model_type.")
        return found

    @property
    def colours(self) -> tuple[list[float], list[float]] | None:
        """Mean and deviation of the colours in [0, 1] of the images that the model was trained on, where files say so."""
        fields, names = self.config.get("pretrained_cfg") or {}, ("mean", "std")
        if (self.path / PREPROCESSOR).is_file():
            fields, names = _json(self.path / PREPROCESSOR), ("image_mean", "image_std")
        mean, std = (fields.get(name) for name in names)
        if fields.get("do_normalize") is False or not (isinstance(mean, list) and isinstance(std, list)):
            return None
        return mean, std

    def respell(self, spellings: Mapping[str, str]) -> None:
        """Call tensors by other names: ``{pattern (regular expression): replacement}``."""
        for pattern, replacement in spellings.items():
            for name in [name for name in self.tensors if re.fullmatch(pattern, name)]:
                new = re.sub(pattern, replacement, name)
                self.tensors[new] = self.tensors.pop(name)
                self._stored[new] = self._stored.pop(name, name)

    def read(self, name: str, region: tuple[slice, ...]) -> Tensor:
        """A region of the tensor ``name``, on the CPU, in the dtype of the file."""
        file = self.tensors[name].file
        name = self._stored.get(name, name)
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.path / file, "pt")
            return self._open[file].get_slice(name)[region]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.path / file} cannot be read: {error}. Download it again.") from error


class StateFile(Folder):
    """One file of ``torch.save``: a state dict, or a dict with one under ``ema`` (which is taken) or ``model``, and the
    ``args`` of its training. Nothing but tensors, containers and an ``argparse.Namespace`` is unpickled.

    Args:
        path: the file.
        config: of the folder in which it lies (None: the ``args``).

    Raises:
        UserError: it cannot be read, or holds something else.
    """

    def __init__(self, path: Path, config: dict[str, Any] | None = None) -> None:
        self.path = path if config is None else path.parent
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
        args = content.get("args", {}) if isinstance(content, dict) else {}
        state = next((content[key] for key in ("ema", "model") if isinstance(content.get(key), dict)), content)
        if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
            raise UserError(f"{path} holds no state dict, neither by itself nor under 'ema' or 'model'.")
        self._state: dict[str, Tensor] = state
        self._stored: dict[str, str] = {}
        self._alone = config is None
        self.config = dict(vars(args) if isinstance(args, argparse.Namespace) else args) if config is None else config
        self.tensors = {name: Stored(path.name, value.dtype, tuple(value.shape)) for name, value in state.items()}

    @property
    def model_type(self) -> str:
        if not self._alone:
            return super().model_type
        for kind, name in KINDS:
            if name in self._state:
                return kind
        raise UserError(f"{self.path} is of no kind that is known by its names. Name it: init.family.")

    def read(self, name: str, region: tuple[slice, ...]) -> Tensor:
        return self._state[self._stored.get(name, name)][region]


def find_folder(where: str, setting: str, *, download: bool = True) -> Folder | None:
    """The Hugging Face folder or state file ``where``, or the hub's model ``owner/name``; None: a folder that is none (a run's).

    Args:
        download: a model that is not in the hub's cache is fetched.

    Raises:
        FolderMissing: it is not there.
        UserError: see ``Folder``.
    """
    path = Path(where).expanduser()
    if path.suffix in STATE_FILES:
        if not path.is_file():
            raise FolderMissing(f"{setting} = {where}: there is no such file.")
        return StateFile(path)
    if path.is_dir():
        return _folder(path) if (path / CONFIG).is_file() else None
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", where) and not path.parent.is_dir():
        return _folder(_of_hub(where, setting, download))
    return None


def _folder(path: Path) -> Folder:
    """The folder, by its safetensors files if it has any."""
    if (path / PICKLED).is_file() and not any(path.glob("*.safetensors")):
        return StateFile(path / PICKLED, _json(path / CONFIG))
    return Folder(path)


def _of_hub(name: str, setting: str, download: bool) -> Path:
    """The snapshot of a model in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = ["*.safetensors", "*.safetensors.index.json", CONFIG, *SMALL_FILES]
    missing = f"{setting} = {name}: no such folder here, and the hub's cache has no such model"
    try:
        path = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        if any(path.glob("*.safetensors")) or (path / PICKLED).is_file():  # else a tokenizer was all that was asked for
            return path
    except LocalEntryNotFoundError:
        pass
    if not download:
        raise FolderMissing(f"{missing}, or no weights of it.")
    try:
        path = Path(snapshot_download(name, allow_patterns=patterns))
        if not any(path.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=[PICKLED])
        return path
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise FolderMissing(
            f"{missing}; fetching it failed ({type(error).__name__}: {str(error).splitlines()[0]}). Where there is a network, "
            f"run `hf download {name}`; then give the folder, or HF_HOME."
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def _header(path: Path) -> dict[str, Stored]:
    """What a safetensors file holds: 8 bytes with the length of a JSON header, the header, the tensors' bytes."""
    if not path.is_file():
        raise UserError(f"{path} is missing, which {path.with_name(INDEX)} names. Download it again.")
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if path.stat().st_size != end:
            raise ValueError(f"it has {path.stat().st_size:,} bytes instead of {end:,}")
        stored = {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"'{name}' has the dtype {entry['dtype']}")
            stored[name] = Stored(path.name, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise UserError(f"{path} is damaged: {error}. Download it again.") from error
    return stored


# ---- writing -----------------------------------------------------------------------------------------------------------------


def plan_files(sizes: Mapping[str, int], most: int, stem: str = "model") -> dict[str, list[str]]:
    """``{file: its tensors}``, as transformers deals them: in their order, a new file where ``most`` bytes would be exceeded; a
    tensor that exceeds them alone gets a file of its own.

    Args:
        sizes: bytes of every tensor.
    """
    files: list[list[str]] = []
    here: list[str] = []
    held = 0
    for name, size in sizes.items():
        if size > most:
            files.append([name])
            continue
        if held + size > most:
            files.append(here)
            here, held = [], 0
        here.append(name)
        held += size
    if here:
        files.append(here)
    if len(files) == 1:
        return {f"{stem}.safetensors": files[0]}
    return {f"{stem}-{at:05d}-of-{len(files):05d}.safetensors": names for at, names in enumerate(files, 1)}


def write_folder(
    path: Path,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    make: Callable[[str], Tensor],
    most: int,
    stem: str = "model",
) -> None:
    """Write the weights of a folder, one tensor in memory at a time.

    Args:
        tensors: dtype and shape of every one.
        make: ``make(name)``: its values, on the CPU.
        most: bytes of a file.
        stem: of the files' names.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}
    files = plan_files(sizes, most, stem)
    for file, names in files.items():
        _write_file(path / file, {name: tensors[name] for name in names}, make)
    if len(files) > 1:
        total = {"total_parameters": sum(math.prod(shape) for _, shape in tensors.values()), "total_size": sum(sizes.values())}
        placed = {name: file for file, names in files.items() for name in names}
        write_json(path / f"{stem}.safetensors.index.json", {"metadata": total, "weight_map": dict(sorted(placed.items()))})


def write_state(path: Path, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write a file of ``torch.save``: ``states`` by their names, or the one that has none ("")."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save({name: dict(state) for name, state in states.items()} if "" not in states else dict(states[""]), temporary)
    os.replace(temporary, path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_file(path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], make: Callable[[str], Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    # the widest first, as the library itself writes them: every tensor is then aligned to its dtype
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    for name in order:
        dtype, shape = tensors[name]
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            dtype, shape = tensors[name]
            values = make(name)
            assert tuple(values.shape) == shape and values.device.type == "cpu"
            file.write(_bytes(values.to(dtype)))
    os.replace(temporary, path)


def _bytes(values: Tensor) -> memoryview:
    return values.contiguous().flatten().view(torch.uint8).numpy().data


def small_files(path: Path) -> Iterable[Path]:
    """The files of a folder beside its weights and ``config.json``."""
    return (path / name for name in SMALL_FILES if (path / name).is_file())
