"""muP: what it changes, and the coordinate check (Tensor Programs V, appendix D.1): activations do not grow with the width."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch

from l3m_like.config import RunConfig
from l3m_like.core.errors import UserError
from l3m_like.core.init import Normal
from l3m_like.core.meta_model import MetaModel
from l3m_like.core.wiring import parts_of
from l3m_like.distributed.mesh import build_mesh
from l3m_like.training.build import build_model
from l3m_like.training.init import init_specs, initialize, materialize
from l3m_like.training.optim import build_optimizer
from l3m_like.training.optim.width import width_ratios
from tests.distributed.recorder import ROOT

BASE = 32


@cache
def config(width: int, mup: bool = True, *overrides: str) -> RunConfig:
    """Two layers of four heads, which get wider with the model."""
    sizes = [f"dim={width}", f"head_dim={width // 4}", f"mlp_dim={3 * width}", "heads=4", "kv_heads=2", "tie=null"]
    scaled = [f"mup={{base_width: {BASE}, width: {width}, base_head_dim: {BASE // 4}}}"] if mup else []
    return RunConfig.from_file(ROOT / "configs" / "experiment" / "llm.yaml", [*sizes, *scaled, *overrides])


@cache
def sizes(width: int, mup: bool, steps: int = 2) -> dict[str, float]:
    """The mean size of an entry of each layer's branches, of the trunk's output and of the logits, after ``steps`` of AdamW."""
    cfg = config(width, mup, "model.head.writes=[nll,logits]", "optim.lr=0.01", "optim.weight_decay=0")
    model = build_model(cfg)
    specs = init_specs(model)
    materialize(model, torch.device("cpu"))
    initialize(model, 0, specs=specs)
    trained = dict(model.named_parameters())
    optimizer = build_optimizer(trained, parts_of(model), cfg.optim, build_mesh(cfg.mesh_axes()), "fp32")
    ids = torch.randint(0, 257, (2, 17), generator=torch.Generator().manual_seed(0))
    found: dict[str, float] = {}
    for unit, layer in enumerate(model.trunk.layers):
        for name in ("mixer", "mlp"):
            part = f"{name} {unit}"
            layer.get_submodule(name).register_forward_hook(lambda _, __, out, part=part: found.update({part: size(out)}))
    for step in range(steps + 1):
        data = model({"text_ids": ids[:, :-1], "text_targets": ids[:, 1:]})
        found |= {key: size(data[f"text_{key}"]) for key in ("hidden", "logits")}
        if step < steps:
            data["text_nll"].mean().backward()
            optimizer.step(torch.zeros(()))
            optimizer.zero_grad()
    return found


def size(x: torch.Tensor) -> float:
    return float(x.detach().abs().mean())


def growth(mup: bool, widths: tuple[int, int]) -> dict[str, float]:
    narrow, wide = (sizes(width, mup) for width in widths)
    return {name: wide[name] / narrow[name] for name in narrow}


def check_coordinates(mup: bool, widths: tuple[int, int]) -> None:
    for name, factor in growth(mup, widths).items():
        assert 0.3 < factor < 2, f"{name}: {factor:.2f} times as large at {widths[1] // widths[0]} times the width"


def test_coordinates_do_not_grow_with_the_width() -> None:
    check_coordinates(True, (32, 128))


def test_without_mup_they_do() -> None:
    with pytest.raises(AssertionError, match="times as large"):
        check_coordinates(False, (32, 128))


@pytest.fixture
def uncached() -> Iterator[None]:
    sizes.cache_clear()
    yield
    sizes.cache_clear()


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("fault", ["learning rates", "output"])
def test_a_planted_fault_is_found(fault: str) -> None:
    """One of its rules left out."""
    from l3m_like.blocks import LanguageModelHead
    from l3m_like.training.optim import build

    faults = {
        "learning rates": mock.patch.object(build, "width_ratios", lambda parts: {}),
        "output": mock.patch.object(LanguageModelHead, "set_output_factor", lambda self, factor: None),
    }
    with faults[fault], pytest.raises(AssertionError, match="times as large"):
        check_coordinates(True, (32, 128))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_coordinates_of_every_width() -> None:
    for width in (64, 256, 512):
        check_coordinates(True, (32, width))
    with pytest.raises(AssertionError, match="times as large"):
        check_coordinates(False, (32, 512))


# ---- what it changes -----------------------------------------------------------------------------------------------------


def groups(cfg: RunConfig, model: MetaModel) -> dict[str, tuple[float, float]]:
    """``{parameter: (learning rate, weight decay)}``."""
    trained = dict(model.named_parameters())
    optimizer: Any = build_optimizer(trained, parts_of(model), cfg.optim, build_mesh(cfg.mesh_axes()), "fp32")
    both = getattr(optimizer, "both", (optimizer,))
    all_groups = [group for one in both for group in one.param_groups]
    return {name: (group["peak_lr"], group["weight_decay"]) for group in all_groups for name in group["names"]}


def test_rates_decay_and_deviations() -> None:
    cfg = config(128)
    model = build_model(cfg)
    specs, found = init_specs(model), groups(cfg, model)
    hidden = set(width_ratios(parts_of(model)))
    assert len(hidden) == 2 * 7 and not any("norm" in name or "embed" in name or "head" in name for name in hidden)
    for name, (lr, decay) in found.items():
        assert math.isclose(lr, 4e-3 / 4 if name in hidden else 4e-3), name
        assert math.isclose(decay, 0.1 * 4 if name in hidden else 0.1 if "weight" in name and "norm" not in name else 0.0), name
        if isinstance(specs[name], Normal):
            assert math.isclose(specs[name].std, 0.02 / 2 if name in hidden else 0.02), name
    assert model.head.output_factor == 1 / 4 and model.trunk.layers[0].mixer.query_factor == 1 / 2


@pytest.mark.parametrize(("scale", "factor"), [("rms", 1 / 2), ("spectral", 1.0)])
def test_rates_of_muon(scale: str, factor: float) -> None:
    cfg = config(128, True, "optim.name=muon", f"optim.muon={{scale: {scale}}}")
    model = build_model(cfg).to_empty(device="cpu")
    found = groups(cfg, model)
    assert math.isclose(found["trunk.layers.0.mlp.up.weight"][0], 4e-3 * factor)
    assert math.isclose(found["preprocessor.embed.weight"][0], 4e-3)


def test_at_the_base_width_nothing_changes() -> None:
    cfg, plain = config(BASE), config(BASE, False)
    model, other = build_model(cfg), build_model(plain)
    assert init_specs(model) == init_specs(other) and groups(cfg, model) == groups(plain, other)
    assert model.head.output_factor == model.trunk.layers[0].mixer.query_factor == 1


def test_depth_scaled_init() -> None:
    """What writes to the residual stream starts smaller by sqrt(2 L), and muP's factor comes on top."""
    cfg = config(128, True, "+model.trunk.depth_scaled_init=true", "layers=8")
    specs = init_specs(build_model(cfg))
    for name, spec in specs.items():
        if isinstance(spec, Normal) and name.startswith("trunk"):
            assert math.isclose(spec.std, 0.01 / (4 if "out_proj" in name or "down" in name else 1)), name


def test_a_model_without_a_known_output() -> None:
    cfg = RunConfig.from_file(ROOT / "configs" / "experiment" / "sit.yaml", ["mup={base_width: 32, width: 128}"])
    with pytest.raises(UserError, match="no head that scales its output"):
        build_model(cfg)


def test_layers_that_it_is_not_built_for() -> None:
    cfg = RunConfig.from_file(ROOT / "configs" / "experiment" / "moe.yaml", ["mup={base_width: 32, width: 128}"])
    with pytest.raises(UserError, match="not built for Router"):
        build_model(cfg)
