"""The doctor finds what is wrong, and says how to repair it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from l3m_like.training import doctor

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(180)  # four processes import torch
def test_this_machine_is_well(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "run" / "doctor.py"), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    for part in ("python", "torch", "gpu", "gloo, 2 processes", "all-reduce works", "writable", "threads", "wandb", "errors: 0"):
        assert part in run.stdout


def test_errors_give_exit_code_1_and_a_fix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "process_group", lambda: [doctor.Finding("ok", "gloo, 2 processes", "")])
    monkeypatch.setattr(doctor, "torchvision_build", list)
    versions = {"omegaconf": None}
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, "1"))
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert "missing: omegaconf" in out and "-> pip install" in out and "errors: 1" in out


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[doctor.Finding]:
        raise RuntimeError("no such thing")

    for name in ("torch_build", "accelerators", "packages", "torchvision_build", "process_group"):
        monkeypatch.setattr(doctor, name, broken)
    findings = doctor.examine()
    assert sum(f.state == "error" and "no such thing" in f.found for f in findings) == 5
    assert any(f.name == "python" and f.state == "ok" for f in findings)


def test_a_gpu_under_a_cpu_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor, "nvidia_driver", lambda: "570.1")
    (finding,) = doctor.accelerators()
    assert finding.state == "error" and "CPU build" in finding.found and "CUDA build" in finding.fix


def test_little_room_and_no_right_to_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = type("Usage", (), {"free": 10**9})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    (finding,) = doctor.folder(tmp_path / "runs")
    assert finding.state == "warning" and "1 GB free" in finding.found

    def refuse(dir: Path) -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    (finding,) = doctor.folder(tmp_path / "runs")
    assert finding.state == "error" and "run.dir=" in finding.fix


def test_too_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    (finding,) = doctor.threads()
    assert finding.state == "warning" and "OMP_NUM_THREADS=" in finding.fix
