"""Loading a run: which weights, and every way in which there are none."""

from __future__ import annotations

import pytest
import torch

from l3m_like import load
from l3m_like.config.run_config import RunConfig
from l3m_like.core import UserError
from l3m_like.core.init import Normal
from tests.generate.tiny import CONFIGS, OVERRIDES, save_run, tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "sit", "sit", steps=(2, 4))


def weights(loaded) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in loaded.model.named_parameters()}


def assert_same(ours, theirs) -> None:
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("step", "ema", "seed"), [(None, False, 4), (2, False, 2), (None, True, 104), (2, True, 102)])
def test_weights_of_a_step(run, step, ema, seed) -> None:
    loaded = load(run, step=step, ema=ema)
    assert_same(weights(loaded), weights(tiny("sit", seed=seed)))
    assert loaded.step == (step or 4) and loaded.ema is ema
    assert not loaded.model.training


def test_dtype_and_tied_weights(tmp_path) -> None:
    run = save_run(tmp_path / "llm", "llm", precision="fp32")
    loaded = load(run)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    for dtype in (torch.bfloat16, "float64"):
        model = load(run, dtype=dtype).model
        assert {str(p.dtype).removeprefix("torch.") for p in model.parameters()} == {str(dtype).removeprefix("torch.")}
        assert model.head.proj.weight is model.preprocessor.embed.weight
    with pytest.raises(UserError, match="dtype int8"):
        load(run, dtype="int8")


def test_a_config_gives_the_weights_of_step_0() -> None:
    loaded = load(CONFIGS / "llm.yaml", overrides=[*OVERRIDES["llm"], "seed=5"])
    name = "preprocessor.embed.weight"
    expected = Normal(0.02).draw(5, name, [torch.arange(n) for n in (257, 32)], (257, 32))
    assert torch.equal(weights(loaded)[name], expected) and loaded.step is None
    again = load(RunConfig.from_file(CONFIGS / "llm.yaml", [*OVERRIDES["llm"], "seed=5"]))
    assert_same(weights(loaded), weights(again))


def test_generate_by_a_weaker_model(run) -> None:
    loaded, weaker = load(run), load(run, step=2)
    settings = {"steps": 2, "num_samples": 3, "guidance": 2.0}
    plain = loaded.generate(**settings | {"guidance": 1.0}).images
    assert torch.equal(loaded.generate(guide=loaded, **settings).images, plain)
    assert not torch.allclose(loaded.generate(guide=weaker, **settings).images, plain)
    with pytest.raises(UserError, match="takes no guide"):
        tiny("llm").generate(guide=loaded)
    other = load(run, overrides=["sample.prediction=noise"])
    with pytest.raises(UserError, match="The guide's sample.prediction is noise, this model's velocity"):
        loaded.generate(guide=other, **settings)
    unsaid = load(run, overrides=["~sample.prediction"])  # its default is what the other says
    assert torch.equal(loaded.generate(guide=unsaid, **settings).images, plain)


def test_generate_takes_the_config_and_overrides(run) -> None:
    loaded = load(run, overrides=["sample.steps=2", "sample.num_samples=3"])
    samples = loaded.generate()
    assert samples.images.shape == (3, 1, 8, 8)
    assert loaded.generate(num_samples=2, guidance=1.0).images.shape[0] == 2
    with pytest.raises(UserError, match="no argument 'guidence'. Did you mean 'guidance'"):
        loaded.generate(guidence=1.0)
    with pytest.raises(UserError, match="no argument 'stepz'"):
        load(run, overrides=["sample.stepz=2"])
    paths = [step.path for step in loaded.inference[""].steps]
    assert paths == ["preprocessor.patches", "preprocessor.condition", "trunk", "head"]


def test_a_checkpoint_is_named_by_its_folder(run) -> None:
    folder = run / "checkpoints" / "step_00000002"
    assert load(folder).step == 2
    with pytest.raises(UserError, match="is the checkpoint of step 2, but step 3 was asked for"):
        load(folder, step=3)


def test_errors(run, tmp_path) -> None:
    with pytest.raises(UserError, match="Did you mean 'sit'"):
        load(run.parent / "sitt")
    with pytest.raises(UserError, match="holds no config.yaml"):
        load(tmp_path)
    with pytest.raises(UserError, match="steps 2, 4"):
        load(run, step=3)
    with pytest.raises(UserError, match="needs a run's directory"):
        load(CONFIGS / "sit.yaml", step=3)
    empty = tmp_path / "empty"
    RunConfig.from_file(CONFIGS / "llm.yaml").save(empty)
    with pytest.raises(UserError, match="no checkpoint"):
        load(empty)
    with pytest.raises(UserError, match="kept no average"):
        load(empty, ema=True)
    with pytest.raises(UserError, match=r"is \[16, 4\] in .* but \[32, 4\]"):
        other = RunConfig.from_file(CONFIGS / "sit.yaml", [*OVERRIDES["sit"], "dim=32"])
        other.save(run)
        load(run)


def test_what_cannot_be_sampled_from(tmp_path) -> None:
    with pytest.raises(UserError, match=r"vit has no sampler .* for ClassAccuracy, Classification. Language models .llm, dllm"):
        tiny("vit").generate()
    with pytest.raises(UserError, match=r"sample = {'steps': 4} .command line.: vit has no sampler"):
        load(CONFIGS / "vit.yaml", overrides=["sample.steps=4"])
