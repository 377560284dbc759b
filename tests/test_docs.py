"""Every command in the README and the docs runs. Commands for a GPU, a network or a cluster are marked
``<!-- needs: gpu -->`` on the line before, and are composed with ``--check`` instead."""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"(?:<!-- needs: (?P<needs>[\w|]+) -->\n)?```bash\n(?P<body>.*?)```", re.DOTALL)
#: these run in CI of their own, whole
ELSEWHERE = ("bash run/quickstart.sh", "bash run/test.sh")


def commands() -> list[tuple[str, str, str | None]]:
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in FENCE.finditer(page.read_text()):
            for line in block["body"].replace("\\\n", " ").splitlines():
                if line.strip() and not line.lstrip().startswith("#"):
                    found.append((page.name, line.strip(), block["needs"]))
    return found


def test_files_that_are_named_exist() -> None:
    """Of docs, tools and experiments, wherever a page, a config or the code names one."""
    named = re.compile(r"(?<![\w/.<{])(?:docs|run|configs|tests)/(?!data/NAME)[\w./-]*\w\.(?:md|py|sh|yaml|png)\b")
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.yaml")]
    pages += [*(ROOT / "l3m_like").rglob("*.py"), *(ROOT / "run").glob("*.py")]
    missing = {(page.name, name) for page in pages for name in named.findall(page.read_text()) if not (ROOT / name).is_file()}
    assert not missing


def test_commands_are_found() -> None:
    assert len(commands()) >= 5


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("page", "command", "needs"),
    # torchrun and its ranks import everything three times: of its commands the README's run here
    [
        pytest.param(page, command, needs, marks=pytest.mark.slow if "torchrun" in command and page != "README.md" else ())
        for page, command, needs in commands()
    ],
    ids=lambda value: str(value)[:60],
)
def test_command(page: str, command: str, needs: str | None, tmp_path: Path) -> None:
    if command.startswith(ELSEWHERE):
        assert (ROOT / command.split()[1]).is_file()
        return
    words = shlex.split(command.split(" #")[0])
    if needs:
        assert "run/launcher.py" in words, "only a run can be composed instead of executed"
        at = words.index("run/launcher.py")
        words = ["python", *words[at:], "--check=model"]
    elif "run/launcher.py" in words and "--check" not in command and "--help" not in words:
        words += ["steps=2", "log.every=1", f"run.dir={tmp_path}"]
        words += [] if " data=" in command else ["evals.heldout.samples=8"]  # other data has no held-out part
        words += ["sample.steps=2"] if any("sit" in word for word in words) else []  # pictures of samples are made too
    if words[0] == "torchrun":
        launch = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*launch, *words[1:]], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170)
        code, said = done.returncode, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    else:
        process = SERVER.Process(target=run_script, args=(words[1:], tmp_path / "said.txt"))
        process.start()
        process.join(170)
        process.kill()
        code, said = process.exitcode, (tmp_path / "said.txt").read_text()[-5000:]
    assert code == 0, f"{page}: {command}\n{said}"


#: a clean process that has imported what the scripts import, and is forked for each
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__, "l3m_like.training.train", "l3m_like.training.check", "l3m_like.benchmarks.bench"])


def run_script(words: list[str], out: Path) -> None:
    """``python SCRIPT ARGUMENTS``, as in a process of its own; what it prints goes to a file."""
    os.chdir(ROOT)
    descriptor = os.open(out, os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
