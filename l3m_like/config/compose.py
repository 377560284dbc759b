"""A YAML file, what its `defaults` list names, and the command line -> one tree whose interpolations are not yet resolved.

Hydra composes. Every override is handed to it in the form that adds or replaces (`++key=value`), because what is a wrong key
is decided afterwards, by the schema and the constructors' signatures, for files and the command line alike and with the
nearest match. Beside the tree comes the origin of every value.
"""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from l3m_like.config import own_data
from l3m_like.core.errors import UserError, did_you_mean

COMMAND_LINE = "command line"
DEFAULT = "default"
#: written beside a run's config.yaml: where each value came from, and which expression it was
ORIGINS_FILE = "config_origins.yaml"


class Origins:
    """Where each value was written: ``llm.yaml:12``, ``command line``, ``default``. Scalars and lists are recorded; a dict
    has the origin of what is in it. One that was written as an expression has the origins of what that reads as well:
    ``llm.yaml:12 = ${dim} (command line)``."""

    def __init__(self, recorded: dict[str, str] | None = None) -> None:
        self.recorded = dict(recorded or {})
        #: ``{path: the expression that was written there}``, none of which reads itself
        self.expressions: dict[str, str] = {}

    def record(self, path: str, origin: str) -> None:
        """``path`` was given anew: what was known about it, below it and above it as a scalar, is gone."""
        above = path.split(".")
        for old in [".".join(above[:n]) for n in range(1, len(above))]:
            self.recorded.pop(old, None)
        self.drop(path)
        self.recorded[path] = origin

    def drop(self, path: str) -> None:
        for old in [p for p in self.recorded if p == path or p.startswith(path + ".")]:
            del self.recorded[old]
            self.expressions.pop(old, None)

    def __call__(self, path: str) -> str:
        """The origin of ``path``: its own, else that of the list or expression it is part of, else of what it holds."""
        parts = path.split(".")
        above = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        inside = (origin for p, origin in self.recorded.items() if p.startswith(path + "."))
        origin = next((self.recorded[p] for p in above if p in self.recorded), None) or next(inside, DEFAULT)
        expression = next((self.expressions[p] for p in above if p in self.expressions), None)
        if expression is None or expression in origin:  # a saved config's origins tell it already
            return origin
        return f"{origin} = {expression} ({', '.join(dict.fromkeys(self(name) for name in references(expression)))})"


@dataclass
class Composed:
    """A composed, unresolved configuration."""

    tree: DictConfig
    origins: Origins = field(default_factory=Origins)
    #: the file's stem: the experiment's name
    name: str = "run"
    #: folders of the user's files, for `_target_: my_block.MyBlock`
    imports: list[str] = field(default_factory=list)
    #: keys that a `${...}` reads in some file, even where the value that read it was overridden
    reads: set[str] = field(default_factory=set)


def shipped_configs() -> Path:
    """The folder of the shipped configs: beside the package in a clone, inside it when it is installed."""
    package = Path(__file__).resolve().parents[1]
    beside = package.parent / "configs"
    return beside if (beside / "experiment").is_dir() else package / "_configs"


def search_folders(path: Path) -> list[Path]:
    """Where the names in a `defaults` list are looked for, in order."""
    shipped = shipped_configs()
    folders = [path.parent, *_own_search_path(path), shipped / "experiment", shipped]
    return list(dict.fromkeys(folder.resolve() for folder in folders))


def _own_search_path(path: Path) -> list[Path]:
    """`hydra.searchpath` of the file itself (ours, on the command line, would replace it)."""
    listed = (_read_yaml(path).get("hydra") or {}).get("searchpath") or []
    return [Path(str(folder).removeprefix("file://")) for folder in listed]


def find_config(path: str | Path) -> Path:
    """The config file at ``path``, absolute. Raises UserError with the nearest file."""
    found = Path(path).expanduser().resolve()
    if found.is_file():
        if found.suffix != ".yaml":
            raise UserError(f"--config {path}: a config file ends in .yaml.")
        return found
    if found.is_dir():
        near = sorted(str(file.name) for file in found.glob("*.yaml"))
        raise UserError(f"--config {path}: this is a folder. Name a file in it: {', '.join(near) or 'it has no .yaml file'}.")
    files = [file for folder in (found.parent, shipped_configs() / "experiment") for file in folder.glob("*.yaml")]
    same = [file for file in files if file.stem == found.stem]
    hint = f"Did you mean '{same[0]}'?" if same else did_you_mean(str(found), [str(file) for file in files])
    raise UserError(f"--config {path}: there is no such file. {hint}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path.name} is no valid YAML: {_yaml_problem(error)}") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise UserError(f"{path.name}: a config file is a mapping of keys to values, this is a {type(loaded).__name__}.")
    return loaded or {}


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{line}{getattr(error, 'problem', None) or error}"


def parse_overrides(overrides: Sequence[str]) -> list[Any]:
    """Hydra's parsed ``Override`` objects. Raises UserError for what is no override."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parsed = []
    for text in overrides:
        try:
            parsed.append(OverridesParser.create().parse_override(text))
        except HydraException as error:  # its parse error, or the bare one of its grammar
            reason = str(error).splitlines()[0]
            hint = "An override is key=value" if "=" not in text else "Quote values with special characters: 'key=\"a value\"'"
            raise UserError(f"{text} ({COMMAND_LINE}): this is no override: {reason}. {hint}.") from error
    return parsed


def for_hydra(overrides: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """The overrides as Hydra gets them: `++` before every value (not before config groups and deletions)."""
    out = []
    for override in parse_overrides(overrides):
        if override.is_delete() or override.is_hydra_override() or is_group(override, folders):
            out.append(override.input_line)
        else:
            out.append("++" + override.input_line.lstrip("+"))
    return out


def is_group(override: Any, folders: Sequence[Path]) -> bool:
    """Whether an override names a config group (a folder of presets), not a value."""
    return override.package is not None or any((folder / override.key_or_group).is_dir() for folder in folders)


@contextlib.contextmanager
def hydra_errors(path: Path, folders: Sequence[Path]) -> Iterator[None]:
    """What Hydra and OmegaConf raise while composing, as a UserError."""
    from hydra.errors import HydraException, MissingConfigException

    try:
        with warnings.catch_warnings():
            # a file wins over its defaults; Hydra wants `_self_` written for that, from its 1.0 days
            warnings.filterwarnings("ignore", message=r".*Defaults list is missing `_self_`.*")
            yield
    except MissingConfigException as error:
        missing = error.missing_cfg_file or ""
        group = str(Path(str(missing)).parent) if "/" in str(missing) else ""
        names = {file.stem for folder in folders for file in (folder / group).glob("*.yaml")}
        looked = ", ".join(str(folder) for folder in folders)
        raise UserError(
            f"{path.name}: its defaults name '{missing}', which is not found. {did_you_mean(Path(str(missing)).name, names)} "
            f"Looked in {looked}."
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"{path.name} (or a file in its defaults) is no valid YAML: {_yaml_problem(error)}") from error
    except RecursionError as error:
        raise UserError(
            f"{path.name}: its defaults name the file itself. Rename it, so that it differs from the shipped one."
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        cause = f" {error.__cause__}" if error.__cause__ is not None and str(error.__cause__) not in str(error) else ""
        raise UserError(f"{path.name}: {str(error).strip()}{cause}") from error
    except ValueError as error:  # OmegaConf's bare one for a name where a list's index is needed
        raise UserError(
            f"{path.name}: an override addresses a list by a name; give its number or the whole list: {error}"
        ) from error


@contextlib.contextmanager
def _without_outer_hydra() -> Iterator[None]:
    """Hydra keeps one global instance; a sweep's job composes while the sweep's own is in use."""
    from hydra.core.global_hydra import GlobalHydra

    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        if outer is not None:
            GlobalHydra.instance().clear()
            GlobalHydra.instance().initialize(outer)


def compose(config: str | Path, overrides: Sequence[str] = ()) -> Composed:
    """Compose the file with its defaults and the command line's ``overrides``; nothing is resolved or checked yet.

    Raises:
        UserError: a file that is missing or no YAML, a default that is not found, an override that does not parse.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    from l3m_like.config.torchrun_launcher import register

    register()  # so that a file may say `override hydra/launcher: torchrun`
    path = find_config(config)
    folders = search_folders(path)
    overrides = expand_own_data(path, overrides)
    parsed = parse_overrides(overrides)
    for override in parsed:
        if override.is_hydra_override():
            raise UserError(
                f"{override.input_line} ({COMMAND_LINE}): Hydra's own settings act in a sweep only; add -m or remove it."
            )
        if override.is_sweep_override():
            raise UserError(
                f"{override.input_line} ({COMMAND_LINE}): several values are a sweep: add -m. A list is written [a,b]."
            )
    with (
        hydra_errors(path, folders),
        _without_outer_hydra(),
        hydra.initialize_config_dir(str(path.parent), version_base="1.3", job_name=path.stem),
    ):
        lines = [search_path_override(folders), *for_hydra(overrides, folders)]
        tree = hydra.compose(config_name=path.stem, overrides=lines)
        chain = GlobalHydra.instance().config_loader().compute_defaults_list(path.stem, lines, RunMode.RUN).defaults
    OmegaConf.set_struct(tree, False)

    origins = Origins()
    imports = []
    reads: set[str] = set()
    saved = path.parent / ORIGINS_FILE
    for default in chain:
        name = default.config_path
        if name is None or name.startswith("hydra/") or str(default.package or "").split(".")[0] == "hydra":
            continue
        file = next((folder / f"{name}.yaml" for folder in folders if (folder / f"{name}.yaml").is_file()), None)
        if file is None:
            continue
        known = yaml.safe_load(saved.read_text()) if file == path and saved.is_file() else None
        _record_file(file, default.package or "", origins, known)
        tokens = yaml.scan(file.read_text(encoding="utf-8"))
        reads |= {name for token in tokens if isinstance(token, yaml.ScalarToken) for name in references(token.value)}
        if shipped_configs() not in file.parents and known is None:
            imports.append(str(file.parent))
    if saved.is_file():
        _refuse_written_out(path, parsed, origins)
    for override in parsed:
        if override.is_delete():
            origins.drop(override.key_or_group)
        elif not is_group(override, folders):
            _record(
                unresolved(OmegaConf.create({"_": override.value()}))["_"],
                override.key_or_group,
                COMMAND_LINE,
                origins,
            )
    return Composed(tree, origins, path.stem, list(dict.fromkeys(imports)), reads)


def expand_own_data(path: Path, overrides: Sequence[str]) -> list[str]:
    """The overrides, with ``data=NAME data.path=...`` written out (see ``own_data``)."""
    import hydra

    folders = search_folders(path)

    def evaluations() -> list[str]:
        with (
            hydra_errors(path, folders),
            _without_outer_hydra(),
            hydra.initialize_config_dir(str(path.parent), version_base="1.3", job_name=path.stem),
        ):
            found = hydra.compose(config_name=path.stem, overrides=[search_path_override(folders)]).get("evals") or {}
            return [name for name, evaluation in unresolved(found).items() if evaluation and evaluation.get("data")]

    return own_data.expand(overrides, parse_overrides(overrides), folders, evaluations)


def unresolved(tree: Any) -> dict[str, Any]:
    """A tree as plain containers, its `${...}` as they were written."""
    plain = OmegaConf.to_container(tree, resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def search_path_override(folders: Sequence[Path]) -> str:
    """The override that gives Hydra the folders after the file's own."""
    quoted = ",".join("'" + str(folder).replace("\\", "\\\\").replace("'", "\\'") + "'" for folder in folders[1:])
    return f"hydra.searchpath=[{quoted}]"


def _record(value: Any, path: str, origin: str, origins: Origins) -> None:
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            _record(entry, f"{path}.{key}", origin, origins)
    else:
        origins.record(path, origin)


def _record_file(file: Path, package: str, origins: Origins, known: dict[str, str] | None) -> None:
    """Record every value of one file by its line; ``known`` are the origins that were saved with the file."""
    root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    shown = _short(file)

    def walk(node: Any, path: str) -> None:
        if isinstance(node, yaml.MappingNode) and node.value:
            for key, value in node.value:
                if key.value == "<<":  # merged mappings come first: the mapping's own keys win
                    for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                        walk(merged, path)
            for key, value in node.value:
                if key.value != "<<" and not (not path and key.value in ("defaults", "hydra")):
                    walk(value, f"{path}.{key.value}" if path else key.value)
            return
        if path:
            origins.record(path, (known or {}).get(path) or f"{shown}:{node.start_mark.line + 1}")
        if isinstance(node, yaml.SequenceNode):
            for i, entry in enumerate(node.value):
                _inside(entry, f"{path}.{i}")

    def _inside(node: Any, path: str) -> None:  # entries of a list belong to it; they only add their lines
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                _inside(value, f"{path}.{key.value}")
        else:
            origins.recorded[path] = (known or {}).get(path) or f"{shown}:{node.start_mark.line + 1}"

    if root is not None:
        walk(root, package)


def _short(file: Path) -> str:
    """A file as a message shows it: relative to the working directory where that is shorter."""
    with contextlib.suppress(ValueError):
        return str(file.relative_to(Path.cwd()))
    return str(file)


def _refuse_written_out(path: Path, parsed: Sequence[Any], origins: Origins) -> None:
    """A saved config has its `${...}` written out: overriding what they read would change less than it says."""
    for override in parsed:
        key = override.key_or_group
        readers = [p for p, origin in origins.recorded.items() if any(overlap(key, read) for read in references(origin))]
        if readers:
            raise UserError(
                f"{override.input_line} ({COMMAND_LINE}): {path} is the saved config of a run, in which `${{{key}}}` is "
                f"written out ({', '.join(readers[:3])}{' ...' if len(readers) > 3 else ''}). "
                "Override those, or start from the original file."
            )


def references(text: str) -> list[str]:
    """The keys that the `${...}` in a string read (resolvers such as `${oc.env:X}` read none)."""
    return [name.lstrip(".") for name in re.findall(r"\$\{([^${}]+)\}", text) if ":" not in name]


def overlap(a: str, b: str) -> bool:
    """Whether one of two dotted keys holds the other."""
    return a == b or a.startswith(b + ".") or b.startswith(a + ".")


def add_imports(folders: Sequence[str]) -> None:
    """Put the user's folders on Python's path (at its end: they never hide an installed package)."""
    for folder in folders:
        if folder not in sys.path:
            sys.path.append(folder)
