"""Peers do the same work: equal losses from equal weights, and equal FLOPs. No test is about a time."""

from __future__ import annotations

import contextlib
import json
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from l3m_like.benchmarks import compare as module
from l3m_like.benchmarks import peers, synthetic
from l3m_like.benchmarks.bench import FORWARDS, bench
from l3m_like.benchmarks.compare import REFERENCES, SPENT, Reference, Work, compare, report
from l3m_like.benchmarks.peers import DECODERS, chosen_variants, sizes_of
from l3m_like.benchmarks.synthetic import synthetic_data
from l3m_like.config import RunConfig
from l3m_like.core.errors import UserError
from l3m_like.data import Loader
from l3m_like.distributed.mesh import build_mesh
from l3m_like.training.init import initialize, materialize
from l3m_like.training.train import plan

ROOT = Path(__file__).parents[2]
PLAIN = ["parallel.precision=fp32", "parallel.compile=false", "parallel.checkpoint=none"]
DECODER = ["dim=32", "layers=2", "heads=4", "kv_heads=2", "head_dim=8", "mlp_dim=48", "vocab_size=97", "sequence=256", *PLAIN]
DIFFUSION = ["dim=32", "layers=2", "heads=2", "image_size=8", "classes=10", *PLAIN]
QUIET: Any = lambda text: None  # noqa: E731


@pytest.fixture(autouse=True)
def process_group(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(synthetic, "MEAN", 60)  # several documents in a row of 256
    had_group = dist.is_initialized()
    yield
    if not had_group and dist.is_initialized():
        dist.destroy_process_group()


def config(kind: str, data: str, *overrides: str) -> RunConfig:
    sizes = DIFFUSION if kind == "sit_xl2" else DECODER
    cfg = RunConfig.from_file(ROOT / "configs" / "experiment" / f"{kind}.yaml", [*sizes, *overrides])
    synthetic_data(cfg, data)
    cfg.batch.global_ = cfg.batch.micro = 4
    return cfg


def made(cfg: RunConfig) -> tuple[Work, Any, dict[str, Tensor]]:
    """The work, our model with the same weights, perturbed so that nothing is zero, and one batch."""
    run = plan(cfg, 1)
    sizes = sizes_of(cfg, run)
    materialize(run.model, torch.device("cpu"))
    initialize(run.model, 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in run.model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    work = Work.of(cfg, build_mesh(cfg.mesh_axes()), sizes, 1, 1, QUIET)
    work.weights = {name: parameter.detach() for name, parameter in run.model.named_parameters()}
    loader = Loader(run.dataset, seed=cfg.seed, global_batch=4, micro_batch=4, prefetch=0)
    step = loader.next_step()
    loader.close()
    assert step is not None and all(torch.equal(step.micro[0][key], value) for key, value in work.batches[0].items())
    return work, run.model, step.micro[0]


CASES = [
    ("qwen3_1.7b", "tokens", "eager"),
    ("qwen3_1.7b", "documents", "eager"),
    ("qwen3_1.7b", "documents-padded", "eager"),
    ("llama3_8b", "tokens", "eager"),
    ("sit_xl2", "latents", "timm-eager"),
    ("sit_xl2", "latents", "diffusers-eager"),
]


@pytest.mark.parametrize(("kind", "data", "variant"), CASES)
def test_equal_losses_and_flops(kind: str, data: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work, model, batch = made(config(kind, data))
    assert work.documents == (data in ("documents", "documents-padded"))
    if kind == "sit_xl2":  # their own draws would be others: ours are handed over
        blocks = model.preprocessor
        noised, time, velocity, _ = blocks["noise"].compute(batch["image"], batch["row"])
        drawn = noised, time, blocks["drop"].compute(batch["image_label"], batch["row"]), velocity
        monkeypatch.setattr(peers, "noised_batch", lambda batch, sizes: drawn)
    peer = work.peer(peers.variants_of(work.sizes)[variant])
    forward, count = FORWARDS[type(model.trunk).__name__]
    assert peer.count(work.batches[0]) == count(batch)
    total = torch.tensor(float(count(batch)))
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as ours_counted:
            ours = forward(model, batch) / total
            ours.backward()
        with FlopCounterMode(display=False) as theirs_counted:
            theirs = peer.loss(work.batches[0], total)
            theirs.backward()
    peer.close()
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-5)
    difference = ours_counted.get_total_flops() - theirs_counted.get_total_flops()
    if kind != "sit_xl2" or variant == "timm-eager":
        assert difference == 0
    else:  # every layer embeds the time again
        assert difference < 0


def test_another_model_is_not_equal() -> None:
    work, model, batch = made(config("qwen3_1.7b", "tokens"))
    work.weights = work.weights | {"head.norm.weight": work.weights["head.norm.weight"] * 1.01}
    peer = work.peer(DECODERS["eager"])
    forward, count = FORWARDS["Transformer"]
    total = torch.tensor(float(count(batch)))
    assert peer.loss(work.batches[0], total).item() != pytest.approx((forward(model, batch) / total).item(), rel=1e-5)
    del work.weights["trunk.layers.1.mlp.up.weight"]
    with pytest.raises(RuntimeError, match="'model.layers.1.mlp.up_proj.weight'.* have no value"):
        work.peer(DECODERS["eager"])


SLOW = [pytest.param(*CASES[number], marks=pytest.mark.slow) for number in (1, 4)]


@pytest.mark.parametrize(("kind", "data", "variant"), [CASES[0], *SLOW])
def test_whole_comparison(kind: str, data: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(kind, data)
    result = compare(cfg, 2, warmup=1, micro=[2, 1], rows=2, variants=[variant], rounds=2, say=QUIET)
    assert result["rows"] == 2 and set(result["tried"]) == {"ours", variant}
    assert len(result["ours"]["rounds"]) == len(result["peer"]["rounds"]) == 2
    assert result["ratio"] == pytest.approx(result["ours"]["per_second"] / result["peer"]["per_second"])
    if kind != "sit_xl2":  # there the draws differ
        assert result["ours"]["loss"] == pytest.approx(result["peer"]["loss"], rel=1e-5)
        for found in result["tried"][variant].values():
            assert found["losses"] == pytest.approx(result["tried"]["ours"]["2"]["losses"], rel=1e-5)
    else:
        assert "EMA 0.9999" in result["peer"]["flags"] and result["ours"]["flags"]["ema"]
    assert not result["void"] and result["reference"] is None
    text = report(result)
    assert "no figure is known" in text and "VOID" not in text and result["peer"]["flags"] in text
    json.dumps(result)
    short_of = result | {"void": True, "share_of_reference": 0.5, "reference": {"per_second": 502, "what": "SiT's code"}}
    assert "VOID: the peer reaches less than 95%" in report(short_of) and "50.0% of it" in report(short_of)


@pytest.mark.slow
def test_what_does_not_fit_is_left_out_and_other_failures_of_peers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def ours(cfg: RunConfig, *given: Any, **more: Any) -> dict[str, Any]:
        if cfg.batch.micro == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        ran.append(cfg.batch.micro or 0)
        return bench(cfg, *given, **more)

    monkeypatch.setattr(module, "bench", ours)

    def broken(*given: Any) -> Any:
        raise RuntimeError("a library's own fault\nsecond line")

    monkeypatch.setitem(DECODERS, "broken", peers.Variant("torch", broken))
    cfg = config("qwen3_1.7b", "tokens")
    result = compare(cfg, 1, warmup=1, micro=[1, 2, 4, 8], rows=8, variants=["eager", "broken"], rounds=1, say=QUIET)
    assert ran == [1, 2] and result["tried"]["ours"]["4"] == SPENT and "8" not in result["tried"]["ours"]
    assert result["peer"]["variant"] == "eager"
    assert result["tried"]["broken"]["8"] == "failed: RuntimeError: a library's own fault"
    assert "out of memory" in report(result) and "a library's own fault" in report(result)


def test_what_cannot_be_compared_is_refused() -> None:
    def run(cfg: RunConfig, **changed: Any) -> None:
        given: dict[str, Any] = {"warmup": 1, "micro": [1], "rows": None, "variants": ["eager"], "rounds": 1, "say": QUIET}
        compare(cfg, 1, **(given | changed))

    with pytest.raises(UserError, match="there are peers for"):
        run(config("qwen3_1.7b", "tokens", "model.trunk.mask=full"))
    for other in ("+optim.no_decay=['*embed*']", "optim.name=muon", "optim.layer_decay=0.5"):
        with pytest.raises(UserError, match="there are peers for"):
            run(config("qwen3_1.7b", "tokens", other))
    with pytest.raises(UserError, match="0 rows per step; at least 1"):
        run(config("qwen3_1.7b", "tokens"), rows=0)
    with pytest.raises(UserError, match="no multiple of the micro-batch 3"):
        run(config("qwen3_1.7b", "tokens"), micro=[2, 3], rows=4)
    with pytest.raises(UserError, match="Did you mean 'compiled'"):
        run(config("qwen3_1.7b", "tokens"), variants=["compile"])
    with pytest.raises(UserError, match="at least 1"):
        run(config("qwen3_1.7b", "tokens"), rounds=0)
    with pytest.raises(UserError, match="tokens takes its sizes from the run's knobs"):
        synthetic_data(RunConfig.from_file(ROOT / "configs/experiment/sit.yaml"), "tokens")
    with pytest.raises(UserError, match="Did you mean 'documents'"):
        config("qwen3_1.7b", "document")


def test_a_missing_library_is_skipped_unless_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_installed", lambda package: package != "liger_kernel")
    cfg = config("qwen3_1.7b", "tokens")
    sizes = sizes_of(cfg, plan(cfg, 1))
    chosen, skipped = chosen_variants(sizes, None)
    assert list(chosen) == ["compiled", "stock", "compiled-flash", "layers"] and set(skipped) == {"liger-compiled", "liger"}
    with pytest.raises(UserError, match="liger_kernel is not installed. Install it .pip install liger-kernel., or .* compiled, "):
        chosen_variants(sizes, ["liger"])


def test_what_liger_changes_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3 import modeling_qwen3 as modeling

    before, forward = dict(vars(modeling)), modeling.Qwen3ForCausalLM.forward

    def apply(**settings: bool) -> None:
        assert settings["fused_linear_cross_entropy"] and not settings["cross_entropy"]
        modeling.Qwen3MLP = torch.nn.Identity
        modeling.Qwen3ForCausalLM.forward = None

    fake = types.SimpleNamespace(apply_liger_kernel_to_qwen3=apply)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", fake)
    sys.modules["liger_kernel"].transformers = fake  # type: ignore[attr-defined]
    with contextlib.suppress(ZeroDivisionError), peers._liger("qwen3", modeling, "Qwen3ForCausalLM"):
        assert modeling.Qwen3MLP is torch.nn.Identity
        raise ZeroDivisionError
    assert dict(vars(modeling)) == before and modeling.Qwen3ForCausalLM.forward is forward


def test_reference_figures_are_found_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {(r.parameters, r.sequence) for r in REFERENCES} == {
        (596_049_920, 4096), (1_720_574_976, 4096), (1_720_574_976, 8192), (674_834_720, None),
    }  # fmt: skip
    work, model, _ = made(config("qwen3_1.7b", "tokens"))
    here = Reference("H200", 23_776, 256, 1.0, "this test")
    monkeypatch.setattr(module, "REFERENCES", (here,))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    on_gpu: Any = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"))
    assert module._reference(on_gpu, work, 23_776) is here
    assert module._reference(on_gpu, work, 23_777) is None
    work.documents = True
    assert module._reference(on_gpu, work, 23_776) is None


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "run" / "bench.py"))["main"]
    command = ["--config", str(ROOT / "configs/experiment/qwen3_0.6b.yaml"), "--data", "tokens", *DECODER, "--steps", "1"]
    out = tmp_path / "out"
    assert main([*command, "--compare", "--peer", "eager", "--micro", "1", "--rounds", "1", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "ratio" in said.out and "eager, micro-batch 1: first step" in said.err
    assert {path.name for path in out.iterdir()} == {"result.json", "report.txt", "config.yaml", "config_origins.yaml"}
    for wrong, fix in ((["--micro", "2"], "belongs to --compare"), (["--profile"], "--out DIR"),
                       (["--compare", "--overhead"], "stands alone")):  # fmt: skip
        assert main([*command, *wrong]) == 1
        assert fix in capsys.readouterr().err
