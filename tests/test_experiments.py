"""Every shipped experiment: composed, built on the meta device and planned at full size; the tiny ones also train and go on."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
import yaml

import l3m_like
from l3m_like.config import RunConfig
from l3m_like.training.train import plan

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "experiment"
EXPERIMENTS = sorted(path for path in CONFIGS.rglob("*.yaml") if "preset" not in path.parts)
#: those that train on shipped data
TINY = [path for path in EXPERIMENTS if "--config configs/experiment/" in path.read_text(encoding="utf-8")]
#: published, or (tiny ones) counted by hand in `test_tiny_sizes`
PARAMETERS = {
    "aimv1_600m": 1_087_594_572,  # with the twelve MLPs of its head
    "aimv2_l": 530_631_680,  # with its decoder
    "aimv2_moe": 476_681_472,
    "clip_b16": 149_620_737,
    "clip_l14": 433_534_465,
    "deepseek_v3": 682_636_472_320,  # 671_026_404_352 and, for multi-token prediction, 11_610_067_968
    "dllm_qwen3": 608_623_616,
    "dream_7b": 7_615_616_512,
    "gpt2": 124_439_808,
    "mae_b16": 111_655_680,
    "llada_8b": 8_015_581_184,
    "llm_1.4b": 1_439_895_552,
    "llama3.2_1b": 1_235_814_400,
    "llama3_70b": 70_553_706_496,
    "llama3_8b": 8_030_261_248,
    "qwen2.5_0.5b": 494_032_768,
    "qwen2.5_72b": 72_706_203_648,
    "qwen2.5_7b": 7_615_616_512,
    "qwen3_0.6b": 596_049_920,
    "qwen3_1.7b": 1_720_574_976,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_8b": 8_190_735_360,
    "siglip_b16": 203_155_970,
    "sit_b2": 130_315_808,
    "sit_l2": 457_840_672,
    "sit_s2": 32_865_056,
    "sit_xl2": 674_834_720,
    "vit_l16": 304_326_632,
    "vit_l16_l3m": 304_181_224,
}
MOST_LINES = {
    "llm": 70, "sit": 90, "rae": 140, "rae_xl": 40, "dit_dh": 130, "dit_dh_xl": 30, "moe": 20, "deepseek": 70, "deepseek_v3": 25,
    "distill": 60, "dream_7b": 16,
    "clip": 115, "siglip": 20, "vit": 90, "mae": 100, "aimv1": 86, "aimv2": 135,
    "aimv1_600m": 27, "aimv2_l": 30, "aimv2_moe": 26, "clip_l14": 52, "vit_l16_l3m": 17, "llm_1.4b": 27,
}
#: the trained ones alone, where a published encoder is frozen
TRAINED = {"dit_dh_xl": 838_380_628}
#: trained by the slow tests alone; of most, other tests compare how they train and go on
SLOW = ("block_diffusion", "siglip", "vit", "mae", "aimv1", "aimv2", "dit_dh", "rae", "moe", "sft", "dllm", "clip", "hf_model")
#: starts from another experiment's run: tests/training/test_distillation.py trains it
FROM_A_RUN = ("distill",)


composed = functools.cache(RunConfig.from_file)


def name_of(path: Path) -> str:
    return path.stem


def test_experiments_are_found() -> None:
    names = {path.stem for path in EXPERIMENTS}
    assert {"llm", "sit", *PARAMETERS} <= names
    assert {path.stem for path in TINY} >= {"llm", "sit", "dllm", "block_diffusion"}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_plan(path: Path) -> None:
    """All that --check needs works at full size, and takes no memory."""
    cfg = composed(path)
    run = plan(cfg, dp_size=1)
    parameters = dict(run.model.named_parameters())
    assert all(parameter.is_meta for parameter in parameters.values())
    if path.stem in PARAMETERS:
        assert sum(parameter.numel() for parameter in parameters.values()) == PARAMETERS[path.stem]
    if path.stem in TRAINED:
        assert sum(p.numel() for p in parameters.values() if p.requires_grad) == TRAINED[path.stem]
    for name, evaluation in cfg.evals.items():
        data = {} if evaluation.data is None else {"data": cfg.instantiate(f"evals.{name}.data")}
        if evaluation.run is not None:
            sampler = {"sampler": cfg.instantiate("sample")} if evaluation.run.get("sampler", 0) is None else {}
            cfg.instantiate(f"evals.{name}.run", **data, **sampler)
    if cfg.sample is not None:
        cfg.instantiate("sample")
    assert run.steps and run.micro_rows * run.accumulation == cfg.batch.global_
    assert all(graph.steps for update in run.updates for graph in update.graphs.values())


def test_the_readme_lists_them() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert not [path.stem for path in EXPERIMENTS if f"`{path.stem}`" not in readme]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_saved_config_is_the_same_run(path: Path, tmp_path: Path) -> None:
    cfg = composed(path)
    assert cfg.run.name == path.stem and RunConfig.from_dict(cfg.to_dict()) == cfg
    cfg.save(tmp_path)
    again = RunConfig.from_file(tmp_path / "config.yaml")
    assert again.to_dict() == cfg.to_dict() | {"run": again.to_dict()["run"]}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_file_is_short(path: Path) -> None:
    """One experiment is one file that fits a screen or two; sizes of a model are a few knobs."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES.get(path.stem, 15)
    assert max(map(len, lines)) <= 145
    assert lines[0].startswith("# "), "the first line says what it is"


@pytest.mark.parametrize("path", TINY, ids=name_of)
def test_header_names_its_own_command(path: Path) -> None:
    assert f"--config configs/experiment/{path.name}" in path.read_text(encoding="utf-8").split("\n\n")[0]


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow) if path.stem in SLOW else path for path in TINY if path.stem not in FROM_A_RUN],
    ids=name_of,
)
def test_trains_and_goes_on(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Three steps, then two more from the checkpoint: the losses are those of five steps in one go."""
    monkeypatch.chdir(tmp_path)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))

    def losses(name: str, steps: int) -> list[float]:
        # a schedule without an end, or the first three of five steps would differ from three steps
        flat = ["schedule.name=constant", "schedule.warmup=0", "schedule.floor=0"]
        short = [f"run.name={name}", f"steps={steps}", "batch.global=4", "log.console=false", "deterministic=true"]
        seldom = ["evals.heldout.every=null", "evals.heldout.samples=4", "checkpoint.every=null"]
        seldom += ["sample.steps=2"] if path.stem == "sit" else []  # its evaluations sample
        seldom += ["evals.zero_shot=null"] if path.stem in ("clip", "siglip") else []  # reads all held-out images
        metrics = l3m_like.train(RunConfig.from_file(path, [*flat, *short, *seldom]))
        assert metrics["step"] == steps
        assert torch.tensor([metrics["loss"], metrics["heldout/loss"]]).isfinite().all()
        rows = map(json.loads, (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows if "loss" in row]

    torch.manual_seed(0)
    first = losses("interrupted", 3)
    both = losses("interrupted", 5)
    torch.manual_seed(1)  # a stream of random numbers that nothing may depend on
    assert both == losses("whole", 5)
    assert both[:3] == first and len(both) == 5
    saved = yaml.safe_load((tmp_path / "runs" / "whole" / "config.yaml").read_text(encoding="utf-8"))
    assert saved["steps"] == 5
