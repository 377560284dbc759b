"""A diffusion language model that begins with the weights of an autoregressive one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import l3m_like
from l3m_like.config import RunConfig
from l3m_like.core.errors import UserError
from tests.generate.tiny import CONFIGS, OVERRIDES, train_run
from tests.parity.rule import check_values

MASK = 257
START = [*OVERRIDES["dllm"], "sequence=64", "model.noise.mask.shift=true", "loss.elbo.shift=true", "parallel.precision=fp64"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoregressive model with one row more than its text has ids."""
    spare = ["vocab_size=258", "data.train.process.vocab_size=257"]
    return train_run(tmp_path_factory.mktemp("runs"), "llm", *spare, steps=20)


def start(run: Path, *overrides: str) -> l3m_like.training.load.Loaded:
    return l3m_like.load(RunConfig.from_file(CONFIGS / "dllm.yaml", [*START, f"+init.from={run}", *overrides]), dtype="float64")


def test_shifted_outputs_are_those_of_the_language_model(run: Path) -> None:
    """With the causal mask that it had, the model says of a masked last token what the language model says of the next one."""
    before, after = l3m_like.load(run, dtype="float64"), start(run, "model.trunk.mask=causal")
    theirs = before.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in after.model.state_dict().items())
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    noised = torch.where(torch.arange(12) == 11, MASK, ids)
    said = after({"text_noised": noised})["text_logits"]
    expected = before({"text_ids": ids})["text_logits"]
    check_values(said[:, 10], expected[:, 10])  # the place before the mask, as `shift` reads it
    with pytest.raises(AssertionError):
        check_values(said[:, 11], expected[:, 10])  # the mask's own place


@pytest.mark.slow
def test_it_trains_on_in_both_directions(run: Path, tmp_path: Path) -> None:
    metrics = {}
    for name, begin in (("warm", [f"+init.from={run}"]), ("cold", [])):
        short = ["steps=12", "lr=0.01", "evals=null", "checkpoint.every=null", "log.console=false", "schedule.warmup=0"]
        where = [f"run.dir={tmp_path}", f"run.name={name}"]
        metrics[name] = l3m_like.train(RunConfig.from_file(CONFIGS / "dllm.yaml", [*START, *short, *where, *begin]))["loss"]
    assert metrics["warm"] < metrics["cold"] - 0.1


def test_a_vocabulary_without_a_row_for_the_mask_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match="mask_id is 258, but the model's ids are 0 .. 257"):
        start(run, "mask_id=258")
