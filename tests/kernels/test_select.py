"""The choice of kernels: from the config to the layer, and what cannot run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from l3m_like.config import RunConfig
from l3m_like.core import random
from l3m_like.core.errors import UserError
from l3m_like.kernels import launch
from l3m_like.kernels.rms_norm import rms_norm
from l3m_like.kernels.select import AUTO, in_use, selected, selecting
from l3m_like.layers import RMSNorm

LLM = Path(__file__).parents[2] / "configs" / "experiment" / "llm.yaml"


def test_layers_keep_what_was_chosen_when_they_were_built() -> None:
    assert selected("rms_norm") == "auto"
    with pytest.raises(ZeroDivisionError), selecting({"rms_norm": "torch"}):
        assert RMSNorm(4).backend == "torch" and selected("rope") == "auto"
        _ = 1 / 0
    assert RMSNorm(4).backend == "auto"


def test_the_config_chooses() -> None:
    with torch.device("meta"):
        model = RunConfig.from_file(LLM, ["kernels.rms_norm=torch", "kernels.rope=triton"]).instantiate("model")
    layer = model.trunk.layers[0]
    assert layer.norm_2.backend == "torch" and layer.mixer.rope_backend == "triton" and layer.mlp.backend == "auto"
    with pytest.raises(UserError, match="kernels.swiglu = 'tritom'"):
        RunConfig.from_file(LLM, ["kernels.swiglu=tritom"])


@pytest.mark.parametrize(("version", "takes"), [("torch", False), ("triton", True), ("auto", True)])
def test_the_config_chooses_how_a_gpu_draws(version: str, takes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "_HAS_TRITON", True)
    monkeypatch.setattr(random, "_version", "auto")
    RunConfig.from_file(LLM, [f"kernels.random={version}"]).instantiate("loss")
    on_a_gpu: Any = SimpleNamespace(is_cuda=True)
    assert random._has_kernel(on_a_gpu) is takes and not random._has_kernel(torch.zeros(1))


def test_a_choice_that_cannot_run_is_an_error() -> None:
    x, weight = torch.ones(2, 4), torch.ones(4)
    with pytest.raises(UserError, match="kernels.rms_norm = triton: it needs an NVIDIA GPU"):
        rms_norm(x, weight, 1e-6, backend="triton")
    with pytest.raises(UserError, match="Did you mean 'triton'"):
        rms_norm(x, weight, 1e-6, backend="tritom")
    assert rms_norm(x.to("meta"), weight.to("meta"), 1e-6, backend="triton").shape == x.shape  # only shapes are wanted
    for kind in (x, x.double()):
        assert rms_norm(kind, weight.double(), 0.0, backend="triton").dtype == torch.float64
    assert torch.equal(rms_norm(x.double(), weight.double(), 0.0, backend="triton"), x.double())  # float64 has the reference


def test_the_line_at_the_start() -> None:
    choices = dict.fromkeys([*AUTO, "attention", "linear_cross_entropy"], "auto")
    assert in_use(choices, "cpu", "fp32") == (
        "kernels: rms_norm=torch modulated_norm=torch rope=torch gelu=torch swiglu=torch embedding=torch random=torch "
        "linear_cross_entropy=torch"
    )
    with pytest.raises(UserError, match="kernels.swiglu = triton"):
        in_use(choices | {"swiglu": "triton"}, "cpu", "bf16")
    with pytest.raises(UserError, match="kernels.linear_cross_entropy = triton"):
        in_use(choices | {"linear_cross_entropy": "triton"}, "cpu", "bf16")


def test_loads_ahead_fit_into_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three iterations under way are two in shared memory: of wide rows on a small device, fewer, down to none."""
    gpu = torch.device("cuda")
    assert launch.TUNED["modulated_norm"].stages == 3
    fits = partial(launch.stages_that_fit, "modulated_norm", device=gpu)
    for room, found in ((232_448, [3, 3, 2, 1]), (101_376, [3, 2, 1, 1])):
        launch._shared_memory.cache_clear()
        device = SimpleNamespace(shared_memory_per_block_optin=room)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda which, device=device: device)
        assert [fits(moved) for moved in (4_608, 90_000, 200_000, 300_000)] == found
        for moved in (4_608, 90_000, 200_000):
            assert (fits(moved) - 1) * moved <= room
    launch._shared_memory.cache_clear()
    assert launch.stages_that_fit("modulated_norm", 1 << 30, torch.device("cpu")) == 3  # the interpreter has no such memory
