"""Composition, resolution, origins, and the saved config that is the same run again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from l3m_like.config import RunConfig
from l3m_like.config.compose import shipped_configs
from l3m_like.config.run_dir import MAY_CHANGE, first_difference
from l3m_like.config.strict import settings
from l3m_like.config.table import BEGIN, END, replaced, rows
from l3m_like.core.errors import UserError

ROOT = Path(__file__).parents[2]
TOY = Path(__file__).parent / "own" / "toy.yaml"


def test_composed_first_resolved_last() -> None:
    cfg = RunConfig.from_file(TOY, ["dim=512"])
    assert cfg.model["dim"] == 512 and cfg.model["parts"]["first"]["width"] == 512
    cfg = RunConfig.from_file(TOY, ["model.dim=7"])  # one reader overridden, the other still reads the knob
    assert cfg.model["dim"] == 7 and cfg.model["parts"]["first"]["width"] == 8
    assert RunConfig.from_file(TOY, ["model.layers='${dim}'"]).model["layers"] == 8
    assert RunConfig.from_file(TOY, ["model.layers='${batch.global}'"]).model["layers"] == 4
    assert RunConfig.from_file(TOY, ["model.layers='${seed}'"]).model["layers"] == 0  # a default can be read


def test_numbers_are_numbers(tmp_path: Path) -> None:
    """YAML 1.1 calls 1e-5 a string."""
    (tmp_path / "toy.yaml").write_text(TOY.read_text().replace("lr: 1e-3", "lr: 1e-5"))
    (tmp_path / "toy_blocks.py").write_text((TOY.parent / "toy_blocks.py").read_text())
    assert RunConfig.from_file(tmp_path / "toy.yaml").optim.lr == 1e-5
    assert RunConfig.from_file(TOY, ["lr=1e-5"]).optim.lr == 1e-5


def test_knob_rules(tmp_path: Path) -> None:
    # a knob of the file that lost its reader to an override is no mistake; giving both is one
    assert RunConfig.from_file(TOY, ["optim.lr=0.5"]).knobs["lr"] == 0.001
    with pytest.raises(UserError, match="lr = 0.1 .*what read it was overridden"):
        RunConfig.from_file(TOY, ["optim.lr=0.5", "lr=0.1"])
    # a new knob is fine as soon as something reads it
    assert RunConfig.from_file(TOY, ["+wide=3", "model.layers='${wide}'"]).model["layers"] == 3
    with pytest.raises(UserError, match="wide = 3"):
        RunConfig.from_file(TOY, ["+wide=3"])
    # a dict of knobs: every leaf is read
    assert RunConfig.from_file(TOY, ["+size={a: 3}", "model.layers='${size.a}'"]).model["layers"] == 3
    with pytest.raises(UserError, match=r"size\.b = 4"):
        RunConfig.from_file(TOY, ["+size={a: 3, b: 4}", "model.layers='${size.a}'"])


def test_origins() -> None:
    cfg = RunConfig.from_file(TOY, ["dim=16", "optim.eps=1e-6"])
    toy = "toy.yaml:"
    assert cfg.origins["optim.eps"] == "command line"
    assert cfg.origins["optim.weight_decay"] == "default" and cfg.origins["model.part.kind"] == "default"
    assert cfg.origins["steps"].endswith(toy + "5") and cfg.origins["model.part.scale"].endswith(toy + "14")
    assert cfg.origins["model.dim"].endswith("toy.yaml:11 = ${dim} (command line)")
    assert cfg.origins["model.layers"].split(" = ")[1].startswith("${layers} (") and cfg.origins["model.layers"].endswith(
        toy + "2)"
    )
    assert cfg.origins["model.parts.list.0.width"].endswith(toy + "17")
    assert not [path for path in yaml_leaves(cfg.to_dict()) if path not in cfg.origins]


def yaml_leaves(value: object, path: str = "") -> list[str]:
    if isinstance(value, dict) and value:
        return [leaf for key, entry in value.items() for leaf in yaml_leaves(entry, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list) and value:
        return [leaf for i, entry in enumerate(value) for leaf in yaml_leaves(entry, f"{path}.{i}")]
    return [path]


def test_a_later_file_has_the_origin_of_what_it_changes(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(TOY.read_text())
    (tmp_path / "toy_blocks.py").write_text((TOY.parent / "toy_blocks.py").read_text())
    (tmp_path / "big.yaml").write_text("defaults: [base]\ndim: 64\nmodel:\n  parts:\n    list: []\nschedule: {warmup: 0.5}\n")
    cfg = RunConfig.from_file(tmp_path / "big.yaml")
    assert cfg.run.name == "big" and cfg.model["dim"] == 64 and cfg.model["parts"]["list"] == [] and cfg.schedule.warmup == 0.5
    assert cfg.origins["model.dim"].endswith("big.yaml:2)") and "base.yaml:11" in cfg.origins["model.dim"]
    assert cfg.origins["model.parts.list"].endswith("big.yaml:5") and cfg.origins["schedule.name"].endswith("base.yaml:21")


def test_the_saved_config_is_the_same_run(tmp_path: Path) -> None:
    cfg = RunConfig.from_file(
        TOY, ["dim=16", "optim.lr=1e-5", "model.part.kind='${literal}'", "+literal='1e-5'", "ema={decay: 0.99}"]
    )
    cfg.save(tmp_path)
    again = RunConfig.from_file(tmp_path / "config.yaml")
    assert again == cfg and again.to_dict() == cfg.to_dict()
    assert again.model["part"]["kind"] == "1e-5"  # a string stays one
    assert RunConfig.from_dict(cfg.to_dict()) == cfg
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["optim"]["eps"] == 1e-8 and saved["model"]["part"]["shape"] == [1, 2] and "dim" not in saved
    # the origins stay those of the first start
    origins = yaml.safe_load((tmp_path / "config_origins.yaml").read_text())
    assert origins["model.layers"] == cfg.origins["model.layers"] == again.origins["model.layers"]
    assert origins["optim.eps"] == "default" == again.origins["optim.eps"]
    # and another value can be given, except for what the file no longer reads
    assert RunConfig.from_file(tmp_path / "config.yaml", ["steps=9"]).steps == 9
    for override in ("dim=32", "+dim=32", "literal=a"):
        with pytest.raises(UserError, match=r"written out \(model\."):
            RunConfig.from_file(tmp_path / "config.yaml", [override])


def test_a_users_own_folder(tmp_path: Path) -> None:
    (tmp_path / "my_block.py").write_text("from l3m_like.layers import SwiGLU\n\n\nclass MyMLP(SwiGLU):\n    pass\n")
    (tmp_path / "my.yaml").write_text(
        "defaults: [llm]\ndim: 64\nmodel: {trunk: {layer: {mlp: {_target_: my_block.MyMLP}}}}\nsample: null\n"
    )
    cfg = RunConfig.from_file(tmp_path / "my.yaml")
    assert cfg.model["trunk"]["dim"] == 64 and cfg.run.name == "my" and cfg.run.imports == [str(tmp_path)]
    assert str(shipped_configs().name) in cfg.origins["model.trunk.num_layers"]
    assert type(next(m for m in cfg.instantiate("model").modules() if "MLP" in type(m).__name__)).__name__ == "MyMLP"
    sys.path.remove(str(tmp_path))


def test_a_saved_run_finds_the_users_modules(tmp_path: Path) -> None:
    """Relaunched from its saved config, in a process that has never heard of the folder."""
    for file in ("toy.yaml", "toy_blocks.py"):
        (tmp_path / file).write_text((TOY.parent / file).read_text())
    RunConfig.from_file(tmp_path / "toy.yaml").save(tmp_path / "runs" / "my")
    code = (
        f"from l3m_like.config import RunConfig as R; print(R.from_file({str(tmp_path / 'runs/my/config.yaml')!r}).run.imports)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == str([str(tmp_path)]), out.stderr
    sys.path.remove(str(tmp_path))


def test_preset_groups_and_absolute_defaults(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text("defaults:\n  - base\n  - optim: slow\n  - _self_\nseed: 3\n")
    (tmp_path / "base.yaml").write_text(TOY.read_text())
    (tmp_path / "toy_blocks.py").write_text((TOY.parent / "toy_blocks.py").read_text())
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "slow.yaml").write_text("lr: 1e-9\n")
    (tmp_path / "optim" / "fast.yaml").write_text("lr: 1.0\nlrr: 2\n")
    cfg = RunConfig.from_file(tmp_path / "toy.yaml")
    assert cfg.optim.lr == 1e-9 and cfg.origins["optim.lr"].endswith("slow.yaml:1")
    with pytest.raises(UserError, match=r"optim\.lrr = 2 \(.*fast\.yaml:2\)"):
        RunConfig.from_file(tmp_path / "toy.yaml", ["optim=fast"])


def test_from_python() -> None:
    cfg = RunConfig.from_file(TOY)
    tree = cfg.to_dict()
    assert RunConfig.of(cfg) is cfg and RunConfig.of(TOY) == cfg
    assert RunConfig.of(tree | {"steps": "${batch.global}"}).steps == 4
    with pytest.raises(UserError, match=r"optmi\.lr = 3 \(given in Python\).*'optim'"):
        RunConfig.of(tree | {"optmi": {"lr": 3}})


def test_instantiate() -> None:
    cfg = RunConfig.from_file(TOY)
    model = cfg.instantiate("model")
    assert (model.dim, model.layers, model.stream, model.part.width, model.part.scale) == (8, 2, "text", 8, 2.0)
    assert isinstance(model.parts, dict) and isinstance(model.parts["list"], list)  # plain containers
    assert cfg.instantiate("loss")["main"].weight == 1.0
    data = cfg.instantiate("data.train", mesh_rank=3)
    assert (data.rows, data.mesh_rank) == (100, 3)
    assert cfg.evals["heldout"].every == 2 and cfg.instantiate("evals.heldout.data").rows == 10


def test_debug_turns_off_what_hides_errors() -> None:
    given = ["data.workers=4", "parallel.compile=true", "log.tensorboard=true", "log.wandb={}"]
    cfg = RunConfig.from_file(TOY, given)
    assert (cfg.data.workers, cfg.parallel.compile, cfg.log.tensorboard) == (4, True, True)
    cfg = RunConfig.from_file(TOY, [*given, "debug=true"])
    assert (cfg.data.workers, cfg.parallel.compile, cfg.log.tensorboard, cfg.log.wandb) == (0, False, False, None)
    assert cfg.origins["data.workers"] == "debug"


def test_what_may_change_in_a_continued_run() -> None:
    names = settings(RunConfig)
    assert all(name.split(".")[0] in names for name in MAY_CHANGE)
    saved = RunConfig.from_file(TOY)
    same = ["steps=99", "log.every=1", "parallel.tp=2", "batch.global=8", "batch.micro=2", "data.workers=3", "checkpoint.every=1"]
    assert first_difference(saved, RunConfig.from_file(TOY, same)) is None
    for override, path in {
        "optim.lr=1": "optim.lr",
        "data.lanes=2": "data.lanes",
        "seed=1": "seed",
    }.items():
        assert first_difference(saved, RunConfig.from_file(TOY, [override]))[0] == path  # type: ignore[index]
    fewer = first_difference(saved, RunConfig.from_file(TOY, ["model.parts.list=[]"]))
    assert fewer is not None and fewer[0].startswith("model.parts.list")


def test_every_setting_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "configs.md").read_text()
    assert BEGIN in text and END in text
    assert replaced(text) == text, "docs/configs.md is out of date: python -m l3m_like.config.table"
    assert all(doc for _, _, _, doc in rows())


def test_importing_the_package_is_light() -> None:
    """`import l3m_like` stays under 0.2 s because of what it does not import; so does the config package."""
    code = "import sys; before = set(sys.modules); import l3m_like, l3m_like.config; print(*sorted(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = out.stdout.split()
    heavy = {"torch", "numpy", "hydra", "omegaconf", "yaml", "transformers", "timm", "wandb", "PIL"}
    assert not heavy & {name.split(".")[0] for name in loaded}
    assert [name for name in loaded if name.startswith("l3m_like")] == [
        "l3m_like",
        "l3m_like.config",
        "l3m_like.core",
        "l3m_like.core.lazy",
    ]
    # and reading a config needs no torch before a constructor does
    code = "import sys; from l3m_like.config.run_config import RunConfig; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
