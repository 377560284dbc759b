"""Own data in one override: ``data=image_folder data.path=/data/cats``.

A file ``data/NAME.yaml`` (shipped, or beside the user's config) says what replaces ``source``, and if need be ``process`` and
``pack``, of ``data.train``; ``${data.path}`` and ``${data.folder}`` in it are the command line's. Evaluations on data read
``data.heldout``, and without it they are left out: what is trained on is not what is evaluated on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from l3m_like.core.errors import UserError, did_you_mean

#: what the command line may say beside ``data=NAME``
SETTINGS = ("path", "heldout", "folder")
PARTS = ("source", "process", "pack")


def expand(overrides: Sequence[str], parsed: Sequence[Any], folders: Sequence[Path], evals: Callable[[], list[str]]) -> list[str]:
    """The overrides, ``data=NAME`` and its settings written out (before the others, which may change what it gives).

    Args:
        overrides, parsed: the command line's, as text and as Hydra's objects.
        folders: where ``data/NAME.yaml`` is looked for.
        evals: gives the names of the run's evaluations that read data.

    Raises:
        UserError: an unknown name, or no ``data.path``.
    """
    chosen = [o for o in parsed if o.key_or_group == "data" and isinstance(o.value(), str)]
    if not chosen:
        return list(overrides)
    name = chosen[-1].value()
    files = {file.stem: file for folder in reversed(folders) for file in (folder / "data").glob("*.yaml")}
    if name not in files:
        raise UserError(f"data={name} (command line): there is no data/{name}.yaml. {did_you_mean(name, files)}")
    for override in parsed:
        if override.key_or_group in {f"data.{s}" for s in SETTINGS} and override.is_sweep_override():
            raise UserError(f"{override.input_line} (command line): several values are a sweep: add -m.")
    given = {o.key_or_group.removeprefix("data."): o.value() for o in parsed if o.key_or_group in {f"data.{s}" for s in SETTINGS}}
    if "path" not in given:
        raise UserError(f"data={name} (command line): it needs data.path=..., where the data is.")
    preset = yaml.safe_load(files[name].read_text(encoding="utf-8")) or {}
    for part in preset:
        if part not in PARTS:
            raise UserError(f"{files[name]}: '{part}' is not one of {', '.join(PARTS)}. {did_you_mean(part, PARTS)}")
    if "folder" in given and "${data.folder}" not in files[name].read_text(encoding="utf-8"):
        raise UserError(f"data.folder = {given['folder']} (command line): data={name} reads no media by a path. Remove it.")
    given = {key: None if value is None else str(value) for key, value in given.items()}
    written = _replace("data.train", preset, given["path"], given.get("folder"))
    for evaluation in evals():
        place = f"evals.{evaluation}"
        if given.get("heldout") is None:
            written.append(f"~{place}")
        else:
            written += _replace(f"{place}.data", preset, given["heldout"], given.get("folder"))
    taken = {id(o) for o in chosen} | {id(o) for o in parsed if o.key_or_group in {f"data.{s}" for s in SETTINGS}}
    return written + [text for text, o in zip(overrides, parsed, strict=True) if id(o) not in taken]


def split(overrides: Sequence[str], parsed: Sequence[Any]) -> tuple[list[str], list[str]]:
    """``data=NAME``, and the other overrides: Hydra, which knows no such group, gets only those."""
    own: list[str] = []
    others: list[str] = []
    for text, override in zip(overrides, parsed, strict=True):
        (own if override.key_or_group == "data" and isinstance(override.value(), str) else others).append(text)
    return own, others


def _replace(place: str, preset: Mapping[str, Any], path: str, folder: str | None) -> list[str]:
    lines = []
    for part, value in preset.items():
        filled = _filled(value, {"${data.path}": path, "${data.folder}": folder})
        lines += [f"~{place}.{part}", f"++{place}.{part}={_written(filled)}"]
    return lines


def _filled(value: Any, known: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _filled(entry, known) for key, entry in value.items()}
    if isinstance(value, list):
        return [_filled(entry, known) for entry in value]
    if not isinstance(value, str) or value in known:
        return known.get(value, value) if isinstance(value, str) else value
    for name, text in known.items():
        value = value.replace(name, str(text))
    return value


def _written(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_written(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_written(entry) for entry in value) + "]"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return {"None": "null", "True": "true", "False": "false"}.get(repr(value), str(value))
