"""Plain containers -> typed sections. A wrong name, type or bound is a UserError with its place, value and fix."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from l3m_like.core.errors import UserError, did_you_mean

T = TypeVar("T")

#: ``path of a setting -> where its value was written`` ("llm.yaml:12", "command line", "default")
Where = Callable[[str], str]

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", type(None): "null"}


def nowhere(path: str) -> str:
    """The origin of values that were given in Python."""
    return "given in Python"


def join(path: str, key: Any) -> str:
    """The dotted path of ``key`` below ``path``."""
    return f"{path}.{key}" if path else str(key)


def show(value: Any) -> str:
    """A value as an error shows it: on one line, not endless."""
    text = {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def at(path: str, value: Any, where: Where) -> str:
    """The head of an error: a setting, its value and where that was written."""
    return f"{path} = {show(value)} ({where(path)})"


def key_of(field: dataclasses.Field[Any]) -> str:
    """A field's name in the file."""
    return field.metadata.get("key") or field.name


@functools.cache
def hints(section: type) -> dict[str, Any]:
    """The resolved annotations of a section, by Python name."""
    return typing.get_type_hints(section)


def settings(section: type) -> dict[str, dataclasses.Field[Any]]:
    """``{name in the file: field}`` of a section (without the one that takes the rest)."""
    return {
        key_of(field): field for field in dataclasses.fields(section) if "doc" in field.metadata and not field.metadata["rest"]
    }


def rest_of(section: Any) -> dataclasses.Field[Any] | None:
    """The field that takes a section's keys that are no setting, if it has one."""
    return next((field for field in dataclasses.fields(section) if field.metadata.get("rest")), None)


def build(section: type[T], given: Any, path: str, where: Where = nowhere) -> T:
    """The ``section`` (a dataclass of ``schema.py``) that the mapping ``given`` describes.

    Raises:
        UserError: an unknown key (with the nearest match), a missing one, a wrong type, a value out of bounds.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"{at(path, given, where)}: this is a section; it holds {', '.join(settings(section))}.")
    known = settings(section)
    rest = rest_of(section)
    values: dict[str, Any] = {rest.name: {key: value for key, value in given.items() if key not in known}} if rest else {}
    for key, value in given.items():
        if key not in known and rest is None:
            raise unknown_key(path, key, value, known, where)
    types_of = hints(typing.cast(type, section))
    for key, field in known.items():
        if key in given:
            values[field.name] = convert(types_of[field.name], given[key], join(path, key), where, field)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{join(path, key)} must be given: {field.metadata['doc']}")
    made = section(**values)
    problem = getattr(made, "problem", lambda: None)()
    if problem:
        name = problem.split(" ", 1)[0].rstrip(":")
        raise UserError(f"{path}.{problem} ({where(join(path, name))})")
    return made


def unknown_key(path: str, key: Any, value: Any, known: typing.Iterable[str], where: Where) -> UserError:
    """The error for a key that nothing reads."""
    full = join(path, key)
    inside = f"`{path}` has no setting '{key}'" if path else f"'{key}' is no section"
    return UserError(f"{at(full, value, where)}: {inside}. {did_you_mean(str(key), known)}")


def convert(hint: Any, value: Any, path: str, where: Where, field: dataclasses.Field[Any] | None = None) -> Any:
    """``value`` as the annotation ``hint`` wants it; ``field`` gives its choices and bounds."""
    metadata = field.metadata if field is not None else {}
    for refused, reason in metadata.get("reasons", {}).items():
        if value == refused and not isinstance(value, bool):
            raise UserError(f"{at(path, value, where)}: {reason}.")
    options = list(typing.get_args(hint)) if _is_union(hint) else [hint]
    if value is None and type(None) in options:
        return None
    for option in options:
        if dataclasses.is_dataclass(option):
            return build(typing.cast(type, option), value, path, where)
        origin = typing.get_origin(option) or option
        if origin is list and isinstance(value, (str, list, tuple)):
            items = [value] if isinstance(value, str) else value  # one pattern is a list of one
            (item,) = typing.get_args(option)
            return [convert(item, entry, f"{path}.{i}", where) for i, entry in enumerate(items)]
        if origin is dict and value is None and field is not None and field.default_factory is not dataclasses.MISSING:
            return {}  # `evals: null` in a derived file: none of them
        if origin is dict and isinstance(value, Mapping):
            _, item = typing.get_args(option)
            if metadata.get("section"):
                return {str(k): to_plain(build(metadata["section"], v, join(path, k), where)) for k, v in value.items()}
            # `{heldout: null}`: not this one of a file's defaults
            entries = {k: v for k, v in value.items() if v is not None or not dataclasses.is_dataclass(item)}
            return {str(k): v if item is Any else convert(item, v, join(path, k), where) for k, v in entries.items()}
        fitted = scalar(option, value)
        if fitted is not None:
            _check_bounds(fitted, metadata, path, where)
            return fitted
    wanted = " or ".join(dict.fromkeys(_wanted(option, metadata) for option in options))
    quoted = " Write it without quotes." if isinstance(value, str) and _is_number(value) and {int, float} & set(options) else ""
    raise UserError(f"{at(path, value, where)}: {wanted} is needed, this is {_kind(value)}.{quoted}")


def scalar(kind: Any, value: Any) -> Any:
    """``value`` as the scalar type ``kind``, or None if it is something else. Whole floats (1e6) are whole numbers."""
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, (int, float)) and not isinstance(value, bool) and float(value).is_integer():
        return int(value)
    if kind in (bool, str) and type(value) is kind:
        return value
    return None


def _check_bounds(value: Any, metadata: Mapping[str, Any], path: str, where: Where) -> None:
    place = at(path, value, where)
    if isinstance(value, str) and metadata.get("choices") and value not in metadata["choices"]:
        raise UserError(f"{place}: it is one of {', '.join(metadata['choices'])}. {did_you_mean(value, metadata['choices'])}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if metadata.get("at_least") is not None and not value >= metadata["at_least"]:
            raise UserError(f"{place}: it must be at least {metadata['at_least']}.")
        if metadata.get("above") is not None and not value > metadata["above"]:
            raise UserError(f"{place}: it must be above {metadata['above']}.")
        if metadata.get("at_most") is not None and not value <= metadata["at_most"]:
            raise UserError(f"{place}: it must be at most {metadata['at_most']}.")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _wanted(option: Any, metadata: Mapping[str, Any]) -> str:
    if option is str and metadata.get("choices"):
        return "one of " + ", ".join(metadata["choices"])
    origin = typing.get_origin(option) or option
    return {list: "a list", dict: "a named dict"}.get(origin) or _NAMES.get(origin, str(origin))


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a dict"
    return "a list" if isinstance(value, (list, tuple)) else _NAMES.get(type(value), type(value).__name__)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def to_plain(value: Any) -> Any:
    """Sections as plain containers, under their names in the file."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {key: to_plain(getattr(value, field.name)) for key, field in settings(type(value)).items()}
        rest = rest_of(value)
        return plain | to_plain(getattr(value, rest.name)) if rest else plain
    if isinstance(value, Mapping):
        return {key: to_plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(entry) for entry in value]
    return value
