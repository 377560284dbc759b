"""The sections that are built from constructors: every `_target_` is found and its arguments compared with the signature
before anything is built, and what a constructor raises is reported with its path in the file."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from l3m_like.config.strict import Where, _kind, _wanted, at, join, nowhere, scalar
from l3m_like.core.errors import UserError, did_you_mean

#: keys that Hydra's instantiate reads itself
SPECIAL = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")


def check(node: Any, path: str, where: Where = nowhere, *, supplied: bool = False) -> Any:
    """``node`` with the defaults of its constructors filled in, after checking every `_target_` below it.

    Args:
        supplied: the run adds arguments to the outermost constructor, so that missing ones are no error here.

    Raises:
        UserError: a target that cannot be imported, an argument that it does not take or lacks, a scalar of a wrong type.
    """
    if isinstance(node, (list, tuple)):
        return [check(value, join(path, i), where) for i, value in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    for key in node:
        if str(key).startswith("_") and str(key).endswith("_") and key not in SPECIAL:
            raise UserError(f"{at(join(path, key), node[key], where)}: {did_you_mean(str(key), SPECIAL)}")
    checked = {key: check(value, join(path, key), where) for key, value in node.items()}
    if "_target_" not in node:
        return checked
    target = node["_target_"]
    place = f"{join(path, '_target_')} = {target} ({where(join(path, '_target_'))})"
    if not isinstance(target, str):
        raise UserError(f"{place}: it is a dotted name, e.g. l3m_like.blocks.Transformer.")
    made = locate(target, place)
    if not callable(made):
        raise UserError(f"{place}: this is {type(made).__name__}, nothing that can be called.")
    signature = parameters(made)
    if signature is None:
        return checked
    accepted, annotations, open_ended = signature
    name = target.rpartition(".")[2]
    for key in node:
        if key not in SPECIAL and key not in accepted and not open_ended:
            full = join(path, key)
            raise UserError(f"{at(full, node[key], where)}: {name} has no argument '{key}'. {did_you_mean(key, accepted)}")
    # arguments that may come by position (`_args_`, or from whoever calls a partial) are neither missing nor filled in
    by_position = node.get("_partial_") or node.get("_args_")
    for key, parameter in accepted.items():
        if key in node:
            _check_type(annotations.get(key), node[key], join(path, key), where)
        elif parameter.default is parameter.empty and not (by_position or supplied):
            raise UserError(f"{join(path, key)} must be given: {name} ({where(join(path, '_target_'))}) needs '{key}'.")
        elif _is_plain(parameter.default) and (parameter.kind is parameter.KEYWORD_ONLY or not by_position):
            checked[key] = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
    return checked


def locate(target: str, place: str = "") -> Any:
    """The object that a dotted name means. Raises UserError with the nearest public name."""
    place = place or f"_target_ = {target}"
    parts = target.split(".")
    found: Any = None
    for n in range(len(parts), 0, -1):
        module = ".".join(parts[:n])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if module == missing or module.startswith(missing + "."):
                continue  # the name itself is absent, so its last part may be an attribute
            raise UserError(f"{place}: importing {module} needs the package '{missing}', which is not installed.") from error
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{place}: importing {module} failed with {type(error).__name__}: {error}") from error
        for i, part in enumerate(parts[n:], start=n):
            try:
                found = getattr(found, part)
            except AttributeError:
                raise UserError(f"{place}: {'.'.join(parts[:i])} has no '{part}'. {_nearest(target, found)}") from None
            except ImportError as error:
                raise UserError(f"{place}: importing it failed with {type(error).__name__}: {error}") from error
        return found
    raise UserError(
        f"{place}: there is no module '{parts[0]}' beside the config file or installed. {did_you_mean(target, public_names())}"
        if "." in target
        else f"{place}: it is a dotted name, module.Name. {_nearest(target, None)}"
    )


def _nearest(target: str, holder: Any) -> str:
    """The hint for a name that ``holder`` lacks: from the whole library by last name, else from the holder itself."""
    last = target.rpartition(".")[2]
    if target.startswith("l3m_like.") or holder is None:
        by_name = {name.rpartition(".")[2]: name for name in public_names()}
        hint = did_you_mean(last, by_name)
        near = hint.removeprefix("Did you mean '").removesuffix("'?")
        if near in by_name:
            return f"Did you mean '{by_name[near]}'?"
        if holder is None:
            return hint
    return did_you_mean(last, [name for name in dir(holder) if not name.startswith("_")])


@functools.cache
def public_names() -> tuple[str, ...]:
    """``l3m_like.<package>.<Name>`` of everything that a config can name."""
    import l3m_like

    names = []
    for package in pkgutil.iter_modules(l3m_like.__path__, "l3m_like."):
        if package.ispkg and package.name != "l3m_like.config":
            module = importlib.import_module(package.name)
            names += [f"{package.name}.{name}" for name in getattr(module, "__all__", ())]
    return tuple(names)


def parameters(made: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], dict[str, Any], bool] | None:
    """``(named parameters, their annotations, takes any keyword)`` of a function or class; None if Python does not know.

    A constructor that hands ``**ports`` on takes what the next constructor of its bases takes.
    """
    constructors = [made] if not inspect.isclass(made) else _constructors(made)
    accepted: dict[str, inspect.Parameter] = {}
    annotations: dict[str, Any] = {}
    for constructor in constructors:
        try:
            found = inspect.signature(constructor).parameters.values()
        except (ValueError, TypeError):
            return None
        with contextlib.suppress(Exception):  # an annotation that cannot be resolved here only loses its type check
            annotations = typing.get_type_hints(constructor) | annotations
        open_ended = False
        for parameter in found:
            if parameter.kind is parameter.VAR_KEYWORD:
                open_ended = True
            elif parameter.kind is not parameter.VAR_POSITIONAL and parameter.name != "self":
                accepted.setdefault(parameter.name, parameter)
        if not open_ended:
            return accepted, annotations, False
    return accepted, annotations, not inspect.isclass(made) or not _ends_in_module(made)


def _constructors(cls: type) -> list[Callable[..., Any]]:
    own = [base.__dict__["__init__"] for base in cls.__mro__ if "__init__" in base.__dict__ and base is not object]
    own = [init for init in own if not _is_module_init(init)]
    return own or [cls]


def _is_module_init(init: Any) -> bool:
    return getattr(init, "__module__", "") == "torch.nn.modules.module"  # takes anything, and then refuses it


def _ends_in_module(cls: type) -> bool:
    return any(_is_module_init(base.__dict__.get("__init__")) for base in cls.__mro__)


def _is_plain(default: Any) -> bool:
    if isinstance(default, tuple):
        return all(_is_plain(entry) for entry in default)
    return default is None or type(default) in (bool, int, float, str)


def _check_type(hint: Any, value: Any, path: str, where: Where) -> None:
    """Refuse a scalar that the annotation certainly excludes (a word for a number); anything less certain passes."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None:
        if all(option in (int, float, bool, str) for option in options):
            raise UserError(f"{path} = null ({where(path)}): {' or '.join(_wanted(o, {}) for o in options)} is needed.")
        return
    if not set(options) <= {int, float, bool, str, type(None)} or not isinstance(value, (str, bool, int, float, list, Mapping)):
        return
    if isinstance(value, Mapping) and "_target_" in value:
        return
    if all(option is type(None) or scalar(option, value) is None for option in options):
        wanted = " or ".join(_wanted(option, {}) for option in options)
        raise UserError(f"{at(path, value, where)}: {wanted} is needed, this is {_kind(value)}.")


def instantiate(node: Any, path: str, where: Where = nowhere, **supplied: Any) -> Any:
    """Build ``node`` (a constructor call, or named ones) with plain containers; ``supplied`` are further arguments.

    Raises:
        UserError: whatever a constructor raises, with the path of the section in the file.
    """
    import hydra.utils
    from hydra.errors import InstantiationException

    try:
        if not supplied:
            return hydra.utils.instantiate(node, _convert_="all")
        # called here rather than by Hydra, which would copy what is supplied into a config
        return hydra.utils.instantiate({**node, "_partial_": True}, _convert_="all")(**supplied)
    except UserError as error:
        raise UserError(f"{path} ({where(path)}): {error}") from error
    except InstantiationException as error:
        inner = str(error).rpartition("full_key: ")[2].strip() if "full_key: " in str(error) else ""
        full = join(path, inner) if inner else path
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise UserError(f"{full} ({where(full)}): {cause}") from error
        what = str(cause).splitlines()[0] if isinstance(cause, InstantiationException) else f"{type(cause).__name__}: {cause}"
        raise UserError(f"{full} ({where(full)}): {what}\nFull trace: add --debug.") from error
