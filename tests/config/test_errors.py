"""Bad input: each error names the place, the key, the value and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from l3m_like.config import RunConfig
from l3m_like.config.cli import main
from l3m_like.core.errors import UserError

TOY = Path(__file__).parent / "own" / "toy.yaml"

#: override -> what the message must hold
COMMAND_LINE_ERRORS = {
    "optim.lrr=0.1": ["optim.lrr = 0.1", "command line", "Did you mean 'lr'?"],
    "+optim.lrr=0.1": ["optim.lrr = 0.1", "command line", "Did you mean 'lr'?"],
    "++optim.lrr=0.1": ["optim.lrr = 0.1", "command line", "Did you mean 'lr'?"],
    "optmi.lr=0.1": ["optmi.lr = 0.1", "command line", "Did you mean 'optim'?"],
    "+log.wandb.porject=x": ["log.wandb.porject = 'x'", "Did you mean 'project'?"],
    "dmi=16": ["dmi = 16", "command line", "no `${dmi}` reads it", "Did you mean 'dim'?"],
    "model.layrs=3": ["model.layrs = 3", "command line", "Model has no argument 'layrs'", "Did you mean 'layers'?"],
    "model.part.scael=3": ["model.part.scael = 3", "Part has no argument 'scael'", "Did you mean 'scale'?"],
    "model.parts.first.scael=3": ["model.parts.first.scael = 3", "Did you mean 'scale'?"],
    "+model.part._partail_=true": ["model.part._partail_ = true", "Did you mean '_partial_'?"],
    "model.part.scale=wide": ["model.part.scale = 'wide'", "a number is needed"],
    "data.wrokers=2": ["data.wrokers = 2", "Did you mean 'workers'?"],
    "evals.heldout.evrey=2": ["evals.heldout.evrey = 2", "Did you mean 'every'?"],
    "loss.main._target_=toy_blocks.Lss": ["loss.main._target_", "toy_blocks has no 'Lss'", "Did you mean 'Loss'?"],
    "model._target_=toy_block.Model": ["model._target_", "no module 'toy_block'"],
    "model._target_=l3m_like.blocks.Transfomer": ["command line", "Did you mean 'l3m_like.blocks.Transformer'?"],
    "model._target_=l3m_like.block.Transformer": ["Did you mean 'l3m_like.blocks.Transformer'?"],
    "dim=wide": ["width = 'wide'", "toy.yaml:16 = ${dim} (command line)", "a whole number is needed"],
    "optim.lr=fast": ["optim.lr = 'fast'", "command line", "a number is needed, this is a string"],
    "optim.lr='1e-3'": ["optim.lr = '1e-3'", "Write it without quotes"],
    "steps=2.5": ["steps = 2.5", "a whole number or null is needed"],
    "steps=0": ["steps = 0", "at least 1"],
    "epochs=2": ["steps = 4", "toy.yaml:5", "epochs = 2 (command line)", "steps=null"],
    "optim.clip=0": ["optim.clip = 0", "multiply every gradient by 0", "null"],
    "parallel.precision=fp16": ["parallel.precision = 'fp16'", "loss scaler", "bf16"],
    "parallel.precision=bf61": ["parallel.precision = 'bf61'", "Did you mean 'bf16'?"],
    "parallel.checkpoint=some": ["one of none, full, selective"],
    "parallel.offload={kep: 2}": ["parallel.offload.kep", "Did you mean 'keep'?"],
    "parallel.offload.keep=0": ["parallel.offload.keep = 0", "at least 1"],
    "parallel.dp_shard=0": ["parallel.dp_shard = 0", "-1 for what is left"],
    "schedule.name=cosin": ["schedule.name = 'cosin'", "Did you mean 'cosine'?"],
    "schedule.name=wsd": ["schedule.decay", "wsd needs"],
    "optim=3": ["optim = 3", "this is a section"],
    "optim.betas=[0.9]": ["optim.betas = [0.9]", "two numbers"],
    "model.dim=${dmi}": ["model.dim = ${dmi} (command line)", "there is no 'dmi'", "Did you mean 'dim'?"],
    "dim=1,2": ["dim=1,2", "add -m"],
    "dim": ["dim (command line)", "key=value"],
    "hydra.run.dir=x": ["hydra.run.dir=x", "-m"],
    "~model.dim": ["model.dim must be given", "Model", "toy.yaml"],
    "~batch": ["batch must be given"],
    "~data.train": ["data.train must be given"],
    "model.parts.list.x=3": ["addresses a list by a name"],
    "loss.main=3": ["loss.main = 3", "_target_"],
    "updates.gen.terms=[mian]": ["updates.gen.terms", "there is no loss 'mian'", "Did you mean 'main'?"],
    "updates.gen.optim.lrr=1": ["updates.gen.optim.lrr = 1", "Did you mean 'lr'?"],
    "optim.groups.trunk.parms=x": ["optim.groups.trunk.parms = 'x'", "Did you mean 'params'?"],
}


@pytest.mark.parametrize("override", list(COMMAND_LINE_ERRORS))
def test_command_line(override: str) -> None:
    with pytest.raises(UserError) as caught:
        RunConfig.from_file(TOY, [override])
    message = str(caught.value)
    for part in COMMAND_LINE_ERRORS[override]:
        assert part in message, message
    assert len(message) < 600  # one screen


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / "toy_blocks.py").write_text((TOY.parent / "toy_blocks.py").read_text())
    if not (folder / "toy.yaml").exists():
        (folder / "toy.yaml").write_text(TOY.read_text())
    return folder / name


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("defaults: [toy]\noptim:\n  lrr: 1e-3\n", ["optim.lrr = 0.001", "mine.yaml:3", "Did you mean 'lr'?"]),
        ("defaults: [toy]\nmodel:\n  parts:\n    first: {wdith: 1}\n", ["model.parts.first.wdith = 1", "mine.yaml:4", "'width'"]),
        ("defaults: [toy]\ndim: wide\n", ["width = 'wide'", "toy.yaml:16 = ${dim} (", "mine.yaml:2)", "a whole number"]),
        ("defaults: [toy]\ndim: ${model.dim}\n", ["dim (", "Recursive interpolation"]),
        ("defaults: [toy]\ndmi: 3\n", ["dmi = 3", "mine.yaml:2", "Did you mean 'dim'?"]),
        ("defaults: [toy]\nmode:\n  dim: 3\n", ["mode.dim = 3", "mine.yaml:3", "Did you mean 'model'?"]),
        ("defaults: [tyo]\n", ["its defaults name 'tyo'", "Did you mean 'toy'?"]),
        ("defaults: [toy]\noptim: {lr: 1\n", ["mine.yaml is no valid YAML", "line"]),
        ("defaults: [toy]\nsteps: 1\nsteps: 2\n", ["mine.yaml", "duplicate key"]),
        ("- a\n- b\n", ["mine.yaml", "mapping"]),
        ("defaults: [toy]\nrun: {nmae: x}\n", ["run.nmae = 'x'", "mine.yaml:2", "Did you mean 'name'?"]),
        ("defaults: [toy]\nema: {decay: '???'}\n", ["ema.decay = ???", "mine.yaml:2", "must be given"]),
    ],
)
def test_file(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        RunConfig.from_file(write(tmp_path, text))
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file\. Did you mean '.*toy\.yaml'"):
        RunConfig.from_file(TOY.parent / "toi.yaml")
    with pytest.raises(UserError, match="this is a folder"):
        RunConfig.from_file(TOY.parent)


def test_a_constructor_that_raises_is_named_with_its_path() -> None:
    cfg = RunConfig.from_file(TOY, ["model.parts.first.scale=-1.5"])
    with pytest.raises(UserError, match=r"model\.parts\.first .*ValueError: scale = -1\.5 is negative"):
        cfg.instantiate("model")
    with pytest.raises(UserError, match=r"there is no 'trian' in data\. Did you mean 'train'"):
        cfg.instantiate("data.trian")


def test_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, part in {
        ("--config", str(TOY), "--chekc"): "Did you mean '--check'?",
        ("optim.lr=1",): "--config",
        ("--config", str(TOY), "--check", "-m", "dim=1,2"): "--check checks one run",
        ("--config", str(TOY), "--check=data"): "invalid choice",
    }.items():
        assert main(list(argv)) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ") and part in err and "Traceback" not in err


def test_debug_gives_the_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(TOY), "optim.lrr=1", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_right_forms_pass() -> None:
    """The twins of the errors above: what they tell the user to write is accepted."""
    cfg = RunConfig.from_file(
        TOY, ["optim.clip=null", "parallel.precision=bf16", "steps=null", "tokens=1e9", "+seed=3", "log.wandb={}"]
    )
    assert (cfg.optim.clip, cfg.tokens, cfg.seed) == (None, 10**9, 3) and isinstance(cfg.tokens, int)
    assert cfg.log.wandb is not None and cfg.log.wandb.project == "l3m-like"
    cfg = RunConfig.from_file(TOY, ["parallel.checkpoint=2", "optim.groups.trunk.params=trunk.*", "updates.gen.optim.lr=1"])
    assert cfg.parallel.checkpoint == 2 and cfg.optim.groups["trunk"] == {
        "params": ["trunk.*"],
        "lr_scale": 1.0,
        "weight_decay": None,
    }
    assert cfg.updates["gen"].settings(cfg.optim).lr == 1.0 and cfg.updates["gen"].settings(cfg.optim).betas == [0.9, 0.99]
