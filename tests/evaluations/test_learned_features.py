"""What is learned helps: features of the tiny AIMv2, trained on real images, against those of random weights."""

from __future__ import annotations

from pathlib import Path

import pytest

import l3m_like
from l3m_like.config import RunConfig

EXPERIMENT = "defaults: [aimv2, preset/probe, _self_]\n"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_linear_probe_gains_fifteen_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "probed.yaml").write_text(EXPERIMENT)

    def probed(name: str, *settings: str) -> float:
        cfg = RunConfig.from_file(tmp_path / "probed.yaml", [f"run.name={name}", "evals.heldout.every=null", *settings])
        return l3m_like.train(cfg)["probe/top1"]

    random = probed("random", "steps=1", "lr=0", "schedule.warmup=0")
    assert probed("trained", "steps=300") >= random + 0.15
