"""`import l3m_like` costs next to nothing; names one level deep are there when they are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "numpy", "hydra", "omegaconf", "transformers", "PIL", "matplotlib", "wandb")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_library_imports_nothing_heavy() -> None:
    packages = "core layers kernels blocks losses data distributed training generate pretrained config"
    code = "import sys, importlib, l3m_like\n" + "\n".join(
        f"importlib.import_module('l3m_like.{name}')" for name in packages.split()
    )
    assert run(code + f"\nprint([name for name in {HEAVY} if name in sys.modules])") == "[]"


def test_importing_the_library_is_quick() -> None:
    """Without the interpreter's own start; the best of three, in CPU seconds, since the machine may be busy."""
    code = "import time; t = time.process_time(); import l3m_like; print(time.process_time() - t)"
    assert min(float(run(code)) for _ in range(3)) < 0.2


@pytest.mark.parametrize("package", ["core", "layers", "blocks", "losses", "data", "generate"])
def test_every_public_name_is_there(package: str) -> None:
    import importlib

    module = importlib.import_module(f"l3m_like.{package}")
    assert module.__all__ and sorted(module.__dir__()) == sorted(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = module.Nothing
