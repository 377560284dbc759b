"""The page about a profile: sums, overlaps and classes from a trace made by hand, and a real one of a CPU."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from l3m_like.benchmarks.profile import STEPS, Recorder, page, shortened, summarize
from l3m_like.kernels import adamw, ema, muon


def event(name: str, start: float, length: float, cat: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": length, "pid": 0, "tid": 7}


NCCL = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
TRACE = [
    event("nvjet_sm90_tst_128x256", 0, 40),
    event(NCCL, 30, 40),  # 30 us of it where nothing else runs
    event("void pytorch_flash::flash_fwd_kernel<Traits<128, cutlass::bfloat16_t>>(Params)", 80, 10),
    event("Memcpy HtoD (Pinned -> Device)", 90, 10, "gpu_memcpy"),
    event("nvjet_sm90_tst_128x256", 100, 20),
    event("cudaLaunchKernel", 0, 500, "cuda_runtime"),
    {"ph": "i", "name": "no duration", "ts": 0},
]


def test_sums_overlaps_and_idle() -> None:
    found = summarize(TRACE, steps=2)
    assert found["of"] == "kernels" and found["span"] == pytest.approx(60e-6)
    assert found["idle"] == pytest.approx(5e-6)  # 70 to 80
    assert found["communication"] == pytest.approx(20e-6) and found["exposed"] == pytest.approx(15e-6)
    assert found["classes"] == pytest.approx({"communication": 20e-6, "copy and cast": 5e-6, "attention": 5e-6, "GEMM": 30e-6})
    assert [(row["name"], row["calls"]) for row in found["kernels"]][:2] == [("nvjet_sm90_tst_128x256", 1.0), (NCCL, 0.5)]
    text = page(found, "a run")
    assert (
        "exposed comm." in text
        and "GEMM: nvjet_sm90_tst_128x256" in text
        and "attention: pytorch_flash::flash_fwd_kernel" in text
    )
    assert summarize([], 1)["of"] == "nothing" and page(summarize([], 1), "a run")


@pytest.mark.parametrize(("name", "kind"), [
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "GEMM"),
    ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>(Params)", "GEMM"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3", "attention"),
    ("triton_tem_fused_flex_attention_0", "attention"),
    ("triton_poi_fused__scaled_dot_product_cudnn_attention_view_3", "elementwise/Triton"),
    ("triton_red_fused__to_copy_add_mean_mul_rsqrt_2", "elementwise/Triton"),
    ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>()", "optimizer"),
    ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(x)::{lambda()#3}>(int)", "copy and cast"),
    ("Memset (Device)", "copy and cast"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(int)", "elementwise/Triton"),
    ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
])  # fmt: skip
def test_classes(name: str, kind: str) -> None:
    assert list(summarize([event(name, 0, 1)], 1)["classes"]) == [kind]


def test_classes_of_kernels_that_step_weights() -> None:
    for module in (adamw, ema, muon):
        kernels = [name for name in vars(module) if name.endswith("_kernel")]
        assert kernels and all(list(summarize([event(name, 0, 1)], 1)["classes"]) == ["optimizer"] for name in kernels)


def test_names_are_shortened() -> None:
    name = "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<Meta<4>, native::FusedAdamMathFunctor<float>>(Meta)"
    assert shortened(name) == "at::native::multi_tensor_apply_kernel [FusedAdamMathFunctor]"
    assert shortened("x" * 200).endswith("...") and len(shortened("x" * 200)) == 90


def test_operators_count_without_what_they_call() -> None:
    events = [
        event("aten::linear", 0, 100, "cpu_op"),
        event("aten::addmm", 10, 80, "cpu_op"),
        event("aten::add", 100, 10, "cpu_op"),
    ]
    found = summarize(events, 1)
    own = {row["name"]: row["seconds"] for row in found["kernels"]}
    assert found["of"] == "operators"
    assert own == pytest.approx({"aten::addmm": 80e-6, "aten::linear": 20e-6, "aten::add": 10e-6})


def test_it_records_as_many_steps_as_it_says(tmp_path: Path) -> None:
    recorder = Recorder(torch.device("cpu"), tmp_path / "trace.json.gz")
    x = torch.ones(8, 8)
    rounds = 0
    while not recorder.boundary():
        torch.mm(x, x)
        rounds += 1
    assert rounds == STEPS + 1
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        assert sum(entry["name"] == "aten::mm" for entry in json.load(file)["traceEvents"] if "name" in entry) == STEPS
    (mm,) = [row for row in recorder.summary()["kernels"] if row["name"] == "aten::mm"]
    assert mm["calls"] == 1 and mm["class"] == "GEMM"
