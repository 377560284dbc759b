"""Low-rank adapters: what they compute, what is trained, on every mesh, and their way into other libraries."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import l3m_like
from l3m_like.config import RunConfig
from l3m_like.config.schema import Lora, Muon
from l3m_like.core.errors import UserError
from l3m_like.core.wiring import parts_of
from l3m_like.layers import LoRALinear, joint_linear
from l3m_like.pretrained.lora import import_peft, merge
from l3m_like.training.build import build_model
from l3m_like.training.check import examine
from l3m_like.training.checkpoint import load_full
from l3m_like.training.export import export, export_adapters
from l3m_like.training.optim import routes
from tests.distributed.recorder import Record, experiment, recorded, world_size
from tests.distributed.test_parity import compare, one_gradient_halved
from tests.parity.rule import check_values, perturb

#: of both kinds of cuts
LAYERS = ["*.q_proj", "*.v_proj", "*.out_proj", "*.mlp.*"]


def adapted(dtype: torch.dtype = torch.float64, **settings: Any) -> LoRALinear:
    layer = LoRALinear(nn.Linear(6, 10, dtype=dtype), **{"rank": 3, "alpha": 5.0} | settings)
    perturb(layer)
    return layer


# ---- the layer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stabilized", [False, True])
def test_equals_the_formula(stabilized: bool) -> None:
    layer, x = adapted(rank_stabilized=stabilized), torch.randn(4, 6, dtype=torch.float64)
    scaling = 5.0 / (3**0.5 if stabilized else 3)
    check_values(layer(x), x @ (layer.weight + scaling * layer.lora_b @ layer.lora_a).T + layer.bias)
    layer(x).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_a", "lora_b"}


def test_a_joint_product_does_not_bypass_adapters() -> None:
    """With rows enough for one product of all matrices, a layer with an adapter is still called."""
    q, k, v = adapted(), nn.Linear(6, 4, dtype=torch.float64), adapted()
    x = torch.randn(600, 6, dtype=torch.float64)
    for found, layer in zip(joint_linear(x, q, k, v), (q, k, v), strict=True):
        check_values(found, layer(x))
    assert not torch.allclose(joint_linear(x, q, k, v)[0], nn.functional.linear(x, q.weight, q.bias))


def test_dropout_is_on_the_adapter_alone() -> None:
    layer, x = adapted(dropout=1.0), torch.randn(4, 6, dtype=torch.float64)
    check_values(layer.train()(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert not torch.allclose(layer.eval()(x), layer.train()(x))
    with pytest.raises(UserError, match="lora.dropout = 1.0 is not built for tensor parallelism"):
        layer.tp_cuts("colwise")


# ---- on a mesh -----------------------------------------------------------------------------------------------------------


def run(fault: Any = None, **settings: Any) -> list[Record]:
    cfg = experiment("llm", **settings)
    cfg.lora = Lora(layers=LAYERS, rank=4, random_weights=True)
    return recorded(cfg, world_size(settings), fault=fault)


@functools.cache
def reference() -> Record:
    return run()[0]


@pytest.mark.parametrize(
    "settings",
    [{"dp_shard": 2}, {"tp": 2}, {"dp_shard": 2, "tp": 2}, {"checkpoint": "full", "micro": 4}],
    ids=["dp_shard 2", "tp 2", "dp_shard 2 x tp 2", "split"],
)
def test_equals_one_process(settings: dict[str, Any]) -> None:
    assert set(reference().start) == {name for name in reference().start if name.rpartition(".")[2] in ("lora_a", "lora_b")}
    assert len(reference().start) == 2 * 2 * 6
    compare(run(**settings), reference())


@pytest.mark.parametrize("settings", [{"dp_shard": 2}, {"tp": 2}], ids=["dp_shard 2", "tp 2"])
def test_a_planted_fault_is_found(settings: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="against"):
        compare(run(one_gradient_halved, **settings), reference())


# ---- a run ---------------------------------------------------------------------------------------------------------------


def tree(folder: Path, name: str, **settings: Any) -> dict[str, Any]:
    cfg = experiment("llm")
    cfg.model["trunk"]["layer"]["mixer"]["bias"] = False  # as Qwen3
    return cfg.to_dict() | {
        "steps": 3,
        "run": {"dir": str(folder), "name": name},
        "schedule": {},
        **settings,
    }


def saved(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_full(folder / name / "checkpoints")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, and ``tuned`` from it with adapters; ``resumed`` likewise, in two goes."""
    folder = tmp_path_factory.mktemp("runs")
    start = {"init": {"from": str(folder / "base")}, "lora": {"layers": LAYERS, "rank": 4}}
    with mock.patch("l3m_like.training.report.write_report", lambda *args: None):  # a second of matplotlib
        l3m_like.train(tree(folder, "base", steps=1))
        l3m_like.train(tree(folder, "tuned", **start))
        for steps in (2, 3):
            l3m_like.train(tree(folder, "resumed", steps=steps, **start))
    return folder


def test_only_adapters_train(runs: Path) -> None:
    base, tuned = saved(runs, "base"), saved(runs, "tuned")
    model = {name for name in base if name.startswith("model/")}
    added = {name for name in tuned if name.startswith("model/")} - model
    assert len(model) > 20 and len(added) == 24
    for name in model:
        assert torch.equal(base[name], tuned[name]), name
    assert all(tuned[name].abs().max() > 0 for name in added)  # B has left zero
    state = {name.removeprefix("optim/main/").rpartition(".")[0] for name in tuned if name.startswith("optim/")}
    assert state == {name.removeprefix("model/") for name in added}


def test_a_tuned_run_without_its_adapters_is_refused(runs: Path) -> None:
    """It would be the base, and nobody would know."""
    cfg = RunConfig.from_dict(tree(runs, "again", init={"from": str(runs / "tuned")}))
    with pytest.raises(UserError, match="was tuned with adapters"):
        l3m_like.load(cfg)


def test_goes_on_as_if_never_stopped(runs: Path) -> None:
    whole, resumed = saved(runs, "tuned"), saved(runs, "resumed")
    assert set(whole) == set(resumed)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_check_counts_what_trains(runs: Path) -> None:
    cfg = RunConfig.from_dict(tree(runs, "tuned", init={"from": str(runs / "base")}, lora={"layers": LAYERS, "rank": 4}))
    report = examine(cfg)
    tuned = saved(runs, "tuned")
    added = sum(tensor.numel() for name, tensor in tuned.items() if name.startswith("model/") and "lora" in name)
    assert report.code == 0 and report.numbers["trainable"] == added
    assert report.numbers["flops_per_step"] is None and "frozen (lora)" in str(report)


def test_muon_takes_adapters() -> None:
    cfg = experiment("llm")
    cfg.lora = Lora(layers=LAYERS, rank=4)
    model = build_model(cfg)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 24 and {route.to for route in routes(trained, parts_of(model), Muon())} == {"muon"}


IDS = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(3))


def test_merged_is_unmerged(runs: Path) -> None:
    tuned, base = l3m_like.load(runs / "tuned", device="cpu"), l3m_like.load(runs / "base", device="cpu")
    logits = tuned({"text_ids": IDS})["text_logits"]
    assert (logits - base({"text_ids": IDS})["text_logits"]).abs().max() > 1e-3 * logits.abs().max()
    state = merge(tuned.model.state_dict(), scaling=16.0 / 4)
    base.model.load_state_dict(state)
    check_values(base({"text_ids": IDS})["text_logits"], logits)


def test_exports(runs: Path, tmp_path: Path) -> None:
    """A Hugging Face folder with the adapters merged, and a PEFT folder with them alone."""
    tuned = {name.removeprefix("model/"): tensor for name, tensor in saved(runs, "tuned").items() if name.startswith("model/")}
    export(runs / "tuned", tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    merged = merge(tuned, scaling=16.0 / 4)
    assert len(found) == len(merged) == 2 * 11 + 2
    both = {"mixer.q_proj": "self_attn.q_proj", "mixer.k_proj": "self_attn.k_proj", "mlp.down": "mlp.down_proj"}
    for ours, theirs in both.items():
        value = found[f"model.layers.1.{theirs}.weight"]
        assert torch.equal(value, merged[f"trunk.layers.1.{ours}.weight"])
        assert torch.equal(value, tuned[f"trunk.layers.1.{ours}.weight"]) == (ours == "mixer.k_proj")  # without an adapter
    export_adapters(runs / "tuned", tmp_path / "adapters")
    ours = ("mixer.q_proj", "mixer.v_proj", "mixer.out_proj", "mlp.gate", "mlp.up", "mlp.down")
    theirs = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    names = dict(zip(ours, theirs, strict=True))
    paths = {f"trunk.layers.{i}.{a}": f"model.layers.{i}.{b}" for i in range(2) for a, b in names.items()}
    state, settings = import_peft(tmp_path / "adapters", paths)
    assert settings["rank"] == 4 and len(state) == 24
    for name, value in state.items():
        assert torch.equal(value, tuned[name])
    lora = {"layers": LAYERS, "rank": 4, "from": str(tmp_path / "adapters")}
    again = tree(tmp_path, "again", init={"from": str(runs / "base")}, lora=lora)
    for name, value in l3m_like.load(again, device="cpu").model.state_dict().items():
        assert torch.equal(value, tuned[name] if name in tuned else tuned["preprocessor.embed.weight"]), name
    with pytest.raises(UserError, match="lora.rank = 8, but the adapters in .* have 4"):
        l3m_like.load(again | {"lora": lora | {"rank": 8}}, device="cpu")
    with pytest.raises(UserError, match="has no 'trunk.layers.0.mixer.out_proj.lora_a'; lora.layers must name"):
        l3m_like.load(again | {"lora": lora | {"layers": ["*.q_proj"]}}, device="cpu")
    with pytest.raises(UserError, match="has no `lora`"):
        export_adapters(runs / "base", tmp_path / "none")


# ---- errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"layers": ["*.q_porj"]}, "matches no linear layer. Available: head.proj"),
        ({"layers": ["head.proj"]}, "nothing calls 'head.proj'"),
        ({"layers": ["*.q_proj"], "train": ["*.norm_3.weight"]}, "lora.train: the pattern '.*' matches no parameter"),
        ({"layers": ["*.q_proj"], "random_weights": False}, "Give init.from, or say `random_weights: true`"),
    ],
)
def test_errors(lora: dict[str, Any], message: str, tmp_path: Path) -> None:
    from l3m_like.training.train import plan

    cfg = RunConfig.from_dict(tree(tmp_path, "run", lora={"random_weights": True} | lora))
    with pytest.raises(UserError, match=message):
        plan(cfg, 1)
