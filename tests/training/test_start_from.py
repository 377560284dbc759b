"""Weights from another run, frozen parts, and what a run that was stopped leaves behind."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import l3m_like
from l3m_like.core.errors import Stopped, UserError
from l3m_like.training.checkpoint import load_full
from tests.distributed.toys import VECTORS

TOYS = "tests.distributed.toys."


def tree(folder: Path, name: str, *, frozen: bool = False, **settings: Any) -> dict[str, Any]:
    encode: dict[str, Any] = {"_target_": TOYS + "Encode"}
    if frozen:
        encode = {"_target_": "l3m_like.core.Frozen", "model": encode}
    return {
        "steps": 2,
        "batch": {"global": 4},
        "data": VECTORS,
        "model": {
            "_target_": "l3m_like.core.MetaModel",
            "stream": "data",
            "preprocessor": {"encode": encode},
            "head": {"_target_": TOYS + "Decode"},
        },
        "loss": {"rebuild": {"_target_": TOYS + "Rebuild", "stream": "data"}},
        "optim": {"lr": 0.01},
        "checkpoint": {"every": 1},
        "log": {"console": False, "every": 1},
        "run": {"dir": str(folder), "name": name},
    } | settings


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in load_full(folder / name / "checkpoints").items() if key.startswith("model/")}


def test_a_frozen_part_is_in_the_checkpoint_and_the_source_may_go(tmp_path: Path) -> None:
    teacher, frozen = tree(tmp_path, "teacher", frozen=True, seed=1), tree(tmp_path, "student", frozen=True)
    with pytest.raises(UserError, match="preprocessor.encode is Frozen, but no weights were loaded"):
        l3m_like.train(copy.deepcopy(frozen))
    teacher["model"]["preprocessor"]["encode"]["random_weights"] = True
    l3m_like.train(teacher)
    frozen["init"] = {"from": str(tmp_path / "teacher")}
    l3m_like.train(copy.deepcopy(frozen))
    kept = [name for name in weights(tmp_path, "student") if ".encode." in name]
    assert len(kept) == 2
    for name in kept:
        assert torch.equal(weights(tmp_path, "student")[name], weights(tmp_path, "teacher")[name])
    shutil.rmtree(tmp_path / "teacher")
    l3m_like.train(copy.deepcopy(frozen) | {"steps": 3})  # goes on, and does not read the source again
    states = [json.loads(path.read_text()) for path in (tmp_path / "student" / "checkpoints").glob("step_*/state.json")]
    assert {state["step"] for state in states} == {2, 3}
    assert all(state["frozen"] == {"preprocessor.encode": str(tmp_path / "teacher")} for state in states)
    assert l3m_like.load(tmp_path / "student").step == 3


def test_what_strict_leaves_out_is_not_called_loaded(tmp_path: Path) -> None:
    l3m_like.train(tree(tmp_path, "other"))
    start = {"from": str(tmp_path / "other"), "strict": False}
    with pytest.raises(UserError, match="preprocessor.encode is Frozen, but no weights were loaded into it"):
        l3m_like.train(tree(tmp_path, "student", frozen=True, init=start))
    l3m_like.train(tree(tmp_path, "plain", init=start))
    with pytest.raises(UserError, match="holds no 'preprocessor.encode.model.preprocessor.proj.weight'"):
        l3m_like.train(tree(tmp_path, "student", frozen=True, init={"from": str(tmp_path / "other")}))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_is_not_called_done(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from l3m_like.training.updates import Update

    step, sent = Update.step, []

    def signalled(self: Update, *args: Any) -> Any:
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return step(self, *args)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Update, "step", signalled)
        with pytest.raises(Stopped, match="after step 2 of 9; saved"):
            l3m_like.train(tree(tmp_path, "run", steps=9))
    assert signal.getsignal(number) == before
    l3m_like.train(tree(tmp_path, "run", steps=9))
    l3m_like.train(tree(tmp_path, "whole", steps=9))
    for name, value in weights(tmp_path, "whole").items():
        assert torch.equal(weights(tmp_path, "run")[name], value), name


def test_who_stops_waits_for_no_data_and_no_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that is slow, or gone, costs no checkpoint; an evaluation that was due is made when the run goes on."""
    from l3m_like.data.loader import Loader

    whole, made = Loader.next_step, []
    evals = {"heldout": {"data": VECTORS["train"], "every": 2}}

    def fetched(self: Loader) -> Any:
        made.append(self.number)
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGTERM)  # step 2 knows
        if len(made) > 2:
            raise OSError("the disk is gone")
        return whole(self)

    def evaluated(name: str) -> list[Any]:
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["heldout/loss"]) for line in lines if "heldout/loss" in line]

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "next_step", fetched)
        with pytest.raises(Stopped, match="after step 2 of 5; saved"):
            l3m_like.train(tree(tmp_path, "run", steps=5, evals=evals))
    assert made == [0, 1] and not evaluated("run")
    assert l3m_like.train(tree(tmp_path, "run", steps=5, evals=evals)) == l3m_like.train(
        tree(tmp_path, "whole", steps=5, evals=evals)
    )
    assert evaluated("run") == evaluated("whole") and [step for step, _ in evaluated("run")] == [2, 4, 5]


def test_the_wait_for_data_is_that_of_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from l3m_like.data.loader import Loader

    whole = Loader.next_step

    def slow(self: Loader) -> Any:
        time.sleep(0.5 if self.number == 3 else 0.0)
        return whole(self)

    monkeypatch.setattr(Loader, "next_step", slow)
    l3m_like.train(tree(tmp_path, "run", steps=5, evals={"heldout": {"data": VECTORS["train"], "every": 1}}))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    waits = {line["step"]: (line["data_wait"], line["seconds"]) for line in lines if "data_wait" in line}
    assert all(wait <= seconds for wait, seconds in waits.values()), waits
    assert waits[3][0] >= 0.5 and sorted(waits) == [1, 2, 3, 4, 5]


def test_a_signal_in_the_last_step_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from l3m_like.training import train as module

    fetched = module.fetch
    made = 0

    def signalled(*args: Any) -> Any:
        nonlocal made
        made += 1
        if made == 2:  # the word of the last step says so
            os.kill(os.getpid(), signal.SIGTERM)
        return fetched(*args)

    evals = {"heldout": {"data": VECTORS["train"]}}
    whole = l3m_like.train(tree(tmp_path, "whole", evals=evals))
    monkeypatch.setattr(module, "fetch", signalled)
    assert l3m_like.train(tree(tmp_path, "run", evals=evals)) == whole and "heldout/loss" in whole


def test_a_run_without_a_checkpoint_gives_its_directory_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from l3m_like.training.checkpoint import Checkpointer

    def full(self: Checkpointer, *args: Any) -> None:
        raise UserError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", full)
        with pytest.raises(UserError, match="disk is full"):
            l3m_like.train(tree(tmp_path, "run"))
    logged = (tmp_path / "run" / "metrics.jsonl").read_text()
    l3m_like.train(tree(tmp_path, "run", seed=1))
    (aside,) = (tmp_path / "run").glob("metrics-*.jsonl")
    assert aside.read_text() == logged and (tmp_path / "run" / "metrics.jsonl").read_text() != logged
    with pytest.raises(UserError, match="seed is 1 there and 2 here"):
        l3m_like.train(tree(tmp_path, "run", seed=2))


def test_a_batch_norm_is_refused_on_several_ranks() -> None:
    from types import SimpleNamespace

    from l3m_like.core import Frozen, MetaModel, Wrap
    from l3m_like.distributed.parallelize import refuse_batch_norm

    wrapped = Wrap(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), reads={"i": "x"}, writes={"o": "y"})
    refuse_batch_norm(MetaModel(wrapped), SimpleNamespace(world_size=1))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="preprocessor.module.1 is BatchNorm1d.*GroupNorm"):
        refuse_batch_norm(MetaModel(wrapped), SimpleNamespace(world_size=2))  # type: ignore[arg-type]
    refuse_batch_norm(MetaModel(Frozen(wrapped)), SimpleNamespace(world_size=2))  # type: ignore[arg-type]


def test_a_language_model_becomes_a_diffusion_model(tmp_path: Path) -> None:
    """Of an autoregressive run with a spare row for the mask all weights are taken; with ``shift`` they mean the same."""
    from l3m_like.config.schema import Init
    from l3m_like.training.start_from import load_weights
    from tests.generate.tiny import save_run, tiny

    run = save_run(tmp_path / "llm", "llm", "vocab_size=258", "data.train.process.vocab_size=257")
    source = l3m_like.load(run)
    shift = ["model.noise.mask.shift=true", "loss.elbo.shift=true", "sample.shift=true"]
    made = tiny("dllm", *shift, seed=5)
    load_weights(made.model, Init(from_=str(run)))
    assert {name for name, _ in made.model.named_parameters()} == {name for name, _ in source.model.named_parameters()}
    ids = torch.arange(24).view(2, 12)
    expected = source({"text_ids": ids})["text_logits"]
    assert not torch.allclose(made({"text_noised": ids})["text_logits"], expected)  # its outputs see all places
    made.model.trunk.mask = "causal"
    assert torch.equal(made({"text_noised": ids})["text_logits"], expected)
    # what it would say in the first place of an answer is what the language model says there
    greedy = source.generate(prompts=["To be"], max_new_tokens=1, greedy=True).tokens
    assert made.generate(prompts=["To be"], max_new_tokens=1, temperature=0.0).tokens == greedy
    narrow = save_run(tmp_path / "narrow", "llm")
    with pytest.raises(UserError, match=r"257.*258|258.*257"):
        load_weights(made.model, Init(from_=str(narrow)))


def test_random_paths_that_would_do_nothing() -> None:
    from l3m_like.config.schema import Init
    from l3m_like.core import MetaModel, Wrap
    from l3m_like.training.start_from import starts

    model = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in ("embed", "head")})
    model["head"].weight = model["embed"].weight
    with pytest.raises(UserError, match=r"'head' are tied to others \('embed.weight'\), which do not begin anew"):
        starts(model, Init(from_="somewhere", random=["head"]))
    assert starts(model, Init(from_="somewhere", random=["head", "embed"]))
    image = MetaModel(Wrap(nn.Linear(3, 3), reads={"input": "x"}, writes={"output": "y"}))
    both = nn.ModuleDict({"image": image})
    with pytest.raises(UserError, match="'image' is, or holds, 'image', which gets weights from init.parts"):
        starts(both, Init(parts={"image": "somewhere"}, random=["image"]))
    assert starts(both, Init(parts={"image": "somewhere"}, random=["image.preprocessor"]))
