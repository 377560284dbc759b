"""What setup.py asks for and this interpreter lacks. For environment.sh; the standard library is enough to run it.

python run/requirements.py missing [EXTRA]    the requirements that are not met, one a line
python run/requirements.py pins               constraints.txt without what is installed: what is there stays as it is
"""

from __future__ import annotations

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def wanted(extra: str = "") -> list[str]:
    """The requirements of setup.py, and of one of its extras."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup")
    given = {word.arg: word.value for word in call.keywords}
    extras = ast.literal_eval(given["extras_require"])
    if extra and extra not in extras:
        raise SystemExit(f"setup.py has no extra '{extra}'; it has {', '.join(extras)}")
    every = ast.literal_eval(given["install_requires"]) + (extras[extra] if extra else [])
    return [line.partition(";")[0] for line in every if is_for_this_platform(line)]


def is_for_this_platform(requirement: str) -> bool:
    """``name; sys_platform == 'linux'`` is for Linux alone. (The one marker that setup.py uses.)"""
    platform = re.search(r";\s*sys_platform == '(\w+)'", requirement)
    return platform is None or platform[1] == sys.platform


def missing(extra: str = "") -> list[str]:
    return [requirement for requirement in wanted(extra) if not is_met(requirement)]


def is_met(requirement: str) -> bool:
    """Is it installed, in a version that ``>=`` and ``<`` allow? (All that setup.py uses.)"""
    found = version_of(requirement)
    if found is None:
        return False
    for operator, bound in re.findall(r"(>=|<)\s*([\d.]+)", requirement):
        if (numbers(found) >= numbers(bound)) != (operator == ">="):
            return False
    return True


def pins() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#") and version_of(line) is None]


def version_of(requirement: str) -> str | None:
    name = re.match(r"[\w.-]+", requirement)
    try:
        return metadata.version(name[0]) if name else None
    except metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` -> (2, 13): as many as count, so that 2.11 is not below 2.11.0."""
    found = [int(part) for part in re.match(r"[\d.]*", version)[0].rstrip(".").split(".") if part]  # type: ignore[index]
    while found and found[-1] == 0:
        found.pop()
    return tuple(found)


if __name__ == "__main__":
    print("\n".join(pins() if sys.argv[1] == "pins" else missing(sys.argv[2] if len(sys.argv) > 2 else "")))
