"""Every setting as a Markdown table, for docs/configs.md:  ``python -m l3m_like.config.table`` rewrites it there."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from l3m_like.config.run_config import RunConfig
from l3m_like.config.strict import hints, join, rest_of, settings, show

BEGIN, END = "<!-- settings: begin (written by python -m l3m_like.config.table) -->", "<!-- settings: end -->"


def rows(section: type = RunConfig, path: str = "") -> Iterator[tuple[str, str, str, str]]:
    """``(path, type, default, meaning)`` of every setting, nested ones after the section they are in."""
    rest = rest_of(section)
    fields = settings(section) | ({"NAME": rest} if rest else {})
    for key, field in fields.items():
        hint = hints(section)[field.name]
        full = join(path, key)
        inner, named = _inner(hint, field)
        yield full + (".NAME" if named else ""), _type(hint, field), _default(field), field.metadata["doc"]
        if inner is not None:
            yield from rows(inner, full + (".NAME" if named else ""))


def _inner(hint: Any, field: dataclasses.Field[Any]) -> tuple[type | None, bool]:
    """The section that a setting holds, and whether it holds several by name."""
    if field.metadata["section"]:
        return field.metadata["section"], True
    for option in typing.get_args(hint) or (hint,):
        if dataclasses.is_dataclass(option):
            return typing.cast(type, option), typing.get_origin(hint) is dict
    return None, False


def _type(hint: Any, field: dataclasses.Field[Any]) -> str:
    choices = field.metadata["choices"]
    options = typing.get_args(hint) if typing.get_origin(hint) not in (list, dict, None) else (hint,)
    names = []
    for option in options:
        if option is str and choices:
            names += choices
        elif option is type(None):
            names.append("null")
        elif dataclasses.is_dataclass(option):
            names.append("section")
        elif typing.get_origin(option) is dict or option is dict:
            names.append("named")
        elif typing.get_origin(option) is list:
            names.append(f"list of {typing.get_args(option)[0].__name__}")
        else:
            names.append(option.__name__)
    return " / ".join(names)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{show(field.default)}`"
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        return "" if dataclasses.is_dataclass(made) else f"`{made}`"
    return "**required**"


def table() -> str:
    """The table, between its marks."""
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{path}` | {kind} | {default} | {doc} |" for path, kind, default, doc in rows()]
    return "\n".join([BEGIN, *lines, END])


def replaced(text: str) -> str:
    """A document with the table in it brought up to date."""
    return text[: text.index(BEGIN)] + table() + text[text.index(END) + len(END) :]


if __name__ == "__main__":
    document = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/configs.md")
    document.write_text(replaced(document.read_text(encoding="utf-8")), encoding="utf-8")
