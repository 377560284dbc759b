"""Samples are the same on one process, on dp_shard 2 and on tp 2, from the same checkpoint; and from a model that trains."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from l3m_like import load
from l3m_like.core.random import normal
from l3m_like.distributed.gradients import local
from l3m_like.distributed.mesh import build_mesh
from l3m_like.generate import FlowLikelihood, FlowODE
from tests.distributed.pool import run as on_ranks
from tests.generate.test_autoregressive import BYTES, Recording
from tests.generate.tiny import PROMPTS, save_run, tiny, train_run
from tests.parity.rule import check_values

ROOT = Path(__file__).parents[2]
IMAGES = {"steps": 2, "num_samples": 5, "guidance": 2.0, "method": "heun"}
TEXTS = {"prompts": PROMPTS[:3], "max_new_tokens": 8}
SENTENCE = "the quick brown fox jumps over the lazy dog. "
LEARNED = {"the quick": " brown fox jumps", "jumps o": "ver the lazy dog", "a": "zy dog. the quic"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    starts = random.Random(0).choices(range(len(SENTENCE)), k=200)
    lines = [json.dumps({"text": (3 * SENTENCE)[start : start + 80], "split": "train"}) for start in starts]
    (folder / "text.jsonl").write_text("\n".join(lines))
    even = ["vocab_size=258", "data.train.process.vocab_size=257"]  # tensor parallelism cuts it
    trained = train_run(folder, "llm", f"text={folder / 'text.jsonl'}", *even, steps=60)
    return {kind: save_run(folder / kind, kind) for kind in ("llm", "sit")} | {"trained": trained}


def sampled(run: Path, axes: dict[str, int], ema: bool, calls: list[dict]) -> list:
    """On every rank: the run on a mesh of ``axes``, then one ``generate`` for each of ``calls``."""
    loaded = load(run, ema=ema, mesh=build_mesh(axes))
    made = [loaded.generate(**settings) for settings in calls]
    return [samples.images if hasattr(samples, "images") else (samples.tokens, samples.texts) for samples in made]


@pytest.mark.parametrize(
    ("axes", "ema"), [({"dp_shard": 2}, False), ({"tp": 2}, True), ({"dp_replicate": 2, "dp_shard": 1}, True)], ids=str
)
def test_images_on_a_mesh(runs, axes, ema) -> None:
    expected = load(runs["sit"], ema=ema).generate(**IMAGES).images
    for (found,) in on_ranks(2, sampled, runs["sit"], axes, ema, [IMAGES]):
        assert found.dtype == torch.float64 and float((found - expected).abs().max()) < 1e-10


@pytest.mark.parametrize("axes", [{"dp_shard": 2}, {"tp": 2}], ids=str)
def test_texts_on_a_mesh(runs, axes) -> None:
    """With three prompts of unequal length, two ranks need different numbers of rows and, with `stop`, of steps."""
    here = load(runs["llm"])
    stop = here.generate(**TEXTS).texts[0][2]  # what the first row says after three tokens
    calls = [TEXTS | more for more in ({}, {"batch": 1}, {"cache": False}, {"stop": [stop]})]
    expected = [(samples.tokens, samples.texts) for samples in (here.generate(**settings) for settings in calls)]
    assert len({len(tokens) for tokens in expected[-1][0]}) > 1
    for found in on_ranks(2, sampled, runs["llm"], axes, False, calls):
        assert found == expected


@pytest.mark.parametrize("axes", [{"dp_shard": 2}, {"tp": 2}], ids=str)
def test_greedy_texts_of_a_trained_model_on_a_mesh(runs, axes) -> None:
    """With the cache, without it, and on a mesh it says the same: what it has learned."""
    calls = [{"prompts": list(LEARNED), "max_new_tokens": 16, "greedy": True} | more for more in ({}, {"cache": False})]
    expected = [BYTES.encode(text) for text in LEARNED.values()], list(LEARNED.values())
    here = load(runs["trained"])
    for settings in calls:
        samples = here.generate(**settings)
        assert (samples.tokens, samples.texts) == expected
    for found in on_ranks(2, sampled, runs["trained"], axes, False, calls):
        assert found == [expected, expected]


def logits_of_steps(run: Path, axes: dict[str, int] | None, **settings: Any) -> dict[int, torch.Tensor]:
    """``{row: logits of every step}`` of the rows that this rank computes."""
    loaded = load(run, mesh=build_mesh(axes) if axes else None)
    sampler = Recording(list(LEARNED), 8, end=False, **settings)
    sampler.run(loaded.model, process=BYTES, mesh=loaded.mesh)
    return {row: torch.stack(steps) for row, steps in sampler.seen.items()}


@pytest.mark.parametrize("kind", ["llm", "trained"])
@pytest.mark.parametrize("axes", [{"dp_shard": 2}, {"tp": 2}], ids=str)
def test_logits_of_every_step_on_a_mesh(runs, axes, kind) -> None:
    """Against those without a cache in one process."""
    expected = logits_of_steps(runs[kind], None, cache=False)
    for found in on_ranks(2, logits_of_steps, runs[kind], axes):
        assert set(found) <= set(expected)
        for row, logits in found.items():
            check_values(logits[: len(expected[row])], expected[row])


def likelihoods(run: Path, axes: dict[str, int] | None, calls: list[dict]) -> list[torch.Tensor]:
    """Nats of this rank's images, of which the first ranks have the first ones, for each of ``calls``."""
    mesh = build_mesh(axes) if axes else None
    loaded = load(run, mesh=mesh)
    size, rank = (mesh.dp_size, mesh.dp_rank) if mesh is not None else (1, 0)
    rows = torch.arange(4).chunk(size)[rank]
    images = normal(rows, (1, 8, 8), seed=3, purpose="x", dtype=torch.float64)
    found = [FlowLikelihood(10, **call).run(loaded.model, images, rows + 1, rows, mesh=mesh) for call in calls]
    assert all(p.requires_grad and p.grad is None for p in loaded.model.parameters())
    return found


@pytest.mark.parametrize("axes", [{"dp_shard": 2}, {"tp": 2}], ids=str)
def test_likelihood_on_a_mesh(runs, axes) -> None:
    """dopri5 takes another number of steps for every image, and each is a gather of shards that all ranks must make."""
    calls = [{"steps": 2}, {"method": "dopri5", "steps": 3, "atol": 1e-3, "rtol": 1e-3}]
    expected = likelihoods(runs["sit"], None, calls)
    ranks = on_ranks(2, likelihoods, runs["sit"], axes, calls)
    for call, whole in enumerate(expected):
        found = torch.cat([rank[call] for rank in ranks]) if "dp_shard" in axes else ranks[1][call]
        assert float((found - whole).abs().max()) < 1e-8 * float(whole.abs().max())
    assert float(expected[0].std()) > 1e-3 * float(expected[0].abs().max())  # images differ, so swapped ranks would be seen


def sampled_in_training(run: Path, broken: bool) -> tuple[list[torch.Tensor], bool]:
    """Train mode, gradients; sample, change the shards in place (as averaged weights are swapped in), sample, change back."""
    loaded = load(run, mesh=build_mesh({"dp_shard": 2}))
    model = loaded.model.train()
    sampler = FlowODE((1, 8, 8), 10, **IMAGES)
    if broken:
        from l3m_like.generate import sampler as module

        kept, module.reshard = module.reshard, lambda model: None
    parameters = dict(model.named_parameters())  # as an optimizer holds them
    found = []
    for seed in (None, 7, None):
        before = {name: local(p).clone() for name, p in parameters.items()}
        with torch.no_grad():
            for p in parameters.values() if seed is not None else ():
                local(p).mul_(0.5)
        found.append(sampler.run(model, mesh=loaded.mesh).images)
        with torch.no_grad():
            for name, p in parameters.items():
                local(p).copy_(before[name])
    if broken:
        module.reshard = kept
    x = normal(torch.arange(2), (1, 8, 8), seed=0, purpose="x", dtype=torch.float64)
    out = model({"image": x, "image_label": torch.tensor([1, 2]), "row": torch.arange(2)})
    out["image_prediction"].square().sum().backward()
    return found, model.training and all(p.grad is not None for p in parameters.values())


def test_sampling_from_a_model_that_trains(runs) -> None:
    halved = tiny("sit", seed=2)
    with torch.no_grad():
        for p in halved.model.parameters():
            p.mul_(0.5)
    sampler = FlowODE((1, 8, 8), 10, **IMAGES)
    expected = sampler.run(load(runs["sit"]).model).images, sampler.run(halved.model).images
    for found, trains in on_ranks(2, sampled_in_training, runs["sit"], False):
        for one, other in zip(found, (expected[0], expected[1], expected[0]), strict=True):
            assert float((one - other).abs().max()) < 1e-10
        assert trains
    # the planted fault: a root that keeps its gathered parameters samples from the old ones
    (found, _), _ = on_ranks(2, sampled_in_training, runs["sit"], True)
    assert float((found[1] - expected[1]).abs().max()) > 1e-6


# ---- run/sample.py ---------------------------------------------------------------------------------------------------


def script():
    """run/sample.py as a module."""
    spec = importlib.util.spec_from_file_location("sample_script", ROOT / "run" / "sample.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_script_writes_a_png(runs, tmp_path, capsys) -> None:
    from PIL import Image

    out = tmp_path / "grid.png"
    assert script().main(["--run", str(runs["sit"]), "steps=2", "--ema", "num_samples=20", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"written to {out}" in printed and "step 2, averaged weights" in printed
    expected = load(runs["sit"], ema=True).generate(steps=2, num_samples=20).grid()[..., 0]
    assert np.array_equal(np.asarray(Image.open(out)), expected)
    assert script().main(["--run", str(runs["sit"]), "steps=1", "num_samples=1"]) == 0
    assert (runs["sit"] / "samples" / "step_00000002.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--step", "9"], "steps 2"),
        (["guidence=2"], "Did you mean 'guidance'"),
        (["--parallel", "dp=2"], "no axis 'dp'"),
        (["--parallel", "tp=two"], "e.g. tp=2"),
    ],
)
def test_script_errors_are_short(runs, capsys, arguments, words) -> None:
    assert script().main(["--run", str(runs["sit"]), *arguments]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and words in printed and printed.count("\n") <= 3


def printed_on_ranks(arguments: list[str]) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = script().main(arguments)
    return status, out.getvalue()


def test_script_on_two_processes(runs) -> None:
    expected = load(runs["llm"]).generate(**TEXTS)
    for mesh in ([], ["--parallel", "tp=2"]):
        arguments = ["--run", str(runs["llm"]), *mesh, f"prompts={TEXTS['prompts']}", "max_new_tokens=8"]
        (status, printed), (status_1, printed_1) = on_ranks(2, printed_on_ranks, arguments)
        assert status == status_1 == 0
        assert str(expected) in printed and printed_1 == ""
