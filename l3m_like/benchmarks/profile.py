"""Where a step's time goes on the device: a profile of a few steps, and one page about it.

Read from the trace that torch.profiler writes. On a GPU the page is about kernels and copies; on a CPU, where there are none,
about operators by their own time (without those that they call).
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

#: steps that are recorded, after one that only warms the profiler up
STEPS = 3
#: kernels on the page
SHOWN = 20
#: classes of kernels, the first that matches the name
CLASSES = {
    "communication": r"nccl|gloo|c10d::|_c10d_functional|all_?gather(?!_copy)|reduce_?scatter|all_?reduce",
    "copy and cast": r"^memcpy|^memset|copykernel|copyfunctor|foreach_copy|direct_copy|sizes_copy|chunk_cat|aten::(_to_)?copy_?",
    "attention": r"flash|fmha|sdpa|attention|attn|dot_do_o",
    "GEMM": r"gemm|nvjet|cutlass|splitk|gemv|cublas|xmma|triton_tem.*mm|aten::(addmm|mm|bmm|linear|matmul)\b|mkldnn_linear",
    "optimizer": r"multi_tensor_apply|adam|aten::_foreach|lerp|^_(muon|ema|squares)_",
    "elementwise/Triton": r"",
}


@dataclass(frozen=True)
class Kernel:
    """A kernel, a copy or (on a CPU) an operator: microseconds."""

    name: str
    start: float
    end: float
    #: without what runs inside it
    own: float

    @property
    def kind(self) -> str:
        if re.match(r"triton_(?!tem)", self.name):  # the compiler names a fused kernel for all that it once was
            return "elementwise/Triton"
        return next(kind for kind, pattern in CLASSES.items() if re.search(pattern, self.name, re.IGNORECASE))


class Recorder:
    """Records ``STEPS`` steps; call ``boundary`` where a step ends and the next begins, until it says True.

    Args:
        device: the run's.
        trace: where the Chrome trace is written (``.json.gz``).
    """

    def __init__(self, device: torch.device, trace: Path) -> None:
        self.device, self.trace = device, trace
        cuda = [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
        self._profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, *cuda],
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=STEPS, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(trace)),
        )
        self._passed = 0

    def boundary(self) -> bool:
        """Go on by one step. True: all are recorded, and the trace is written."""
        if self._passed in (1, 1 + STEPS) and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # no kernel of another step is in the trace, and none of these is missing
        if self._passed == 0:
            self._profiler.start()
        else:
            self._profiler.step()
        self._passed += 1
        if self._passed < 2 + STEPS:
            return False
        self._profiler.stop()
        return True

    def summary(self) -> dict[str, Any]:
        """What the trace says (see ``summarize``)."""
        with gzip.open(self.trace, "rt", encoding="utf-8") as file:
            return summarize(json.load(file)["traceEvents"], STEPS)


def summarize(events: Iterable[Mapping[str, Any]], steps: int) -> dict[str, Any]:
    """The kernels of ``events`` (of a Chrome trace) over so many ``steps``.

    Returns:
        JSON values, seconds per step: ``span`` (from the first kernel's start to the last one's end), ``idle`` (nothing runs),
        ``classes`` ({class: seconds of its kernels}), ``communication`` and ``exposed`` (of it, while nothing else runs),
        ``kernels`` (costliest first: name, class, calls per step, seconds per step), and ``of``: "kernels", or "operators" of a
        CPU.
    """
    events = [event for event in events if event.get("ph") == "X"]
    device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    on_device = [Kernel(e["name"], e["ts"], e["ts"] + e["dur"], e["dur"]) for e in device]
    kernels = on_device or _operators([e for e in events if e.get("cat") == "cpu_op"])
    if not kernels:
        return {"of": "nothing", "span": 0.0, "idle": 0.0, "classes": {}, "communication": 0.0, "exposed": 0.0, "kernels": []}
    span = max(k.end for k in kernels) - min(k.start for k in kernels)
    communication = _union([k for k in kernels if k.kind == "communication"])
    work = _union([k for k in kernels if k.kind != "communication"])
    busy = _length(_union(kernels))
    classes: dict[str, float] = defaultdict(float)
    totals: dict[str, list[Any]] = {}
    for kernel in kernels:
        classes[kernel.kind] += kernel.own
        row = totals.setdefault(kernel.name, [kernel.kind, 0, 0.0])
        row[1] += 1
        row[2] += kernel.own
    per_step = 1e-6 / steps
    return {
        "of": "kernels" if on_device else "operators",
        "span": span * per_step,
        "idle": (span - busy) * per_step,
        "classes": {name: classes[name] * per_step for name in CLASSES if name in classes},
        "communication": _length(communication) * per_step,
        "exposed": (busy - _length(work)) * per_step,
        "kernels": [
            {"name": name, "class": kind, "calls": calls / steps, "seconds": own * per_step}
            for name, (kind, calls, own) in sorted(totals.items(), key=lambda item: -item[1][2])
        ],
    }


def page(profile: Mapping[str, Any], title: str) -> str:
    """``summarize``'s answer as a page of text. Shares are of the span; kernels of several streams may run at once."""
    span = profile["span"] or 1.0

    def ms(seconds: float) -> str:
        return f"{1e3 * seconds:9.2f} {100 * seconds / span:6.1f}%"

    lines = [
        f"{title}: {STEPS} profiled steps, {1e3 * profile['span']:.1f} ms per step from the first of the {profile['of']} to the "
        "last (the profiler slows the host, so idle is an upper bound)",
        "",
        f"  {'':20}{'ms/step':>9} {'share':>7}",
        *(f"  {name:20}{ms(seconds)}" for name, seconds in profile["classes"].items()),
        f"  {'idle':20}{ms(profile['idle'])}",
    ]
    if profile["communication"]:
        lines.append(f"  {'exposed comm.':20}{ms(profile['exposed'])}  of {1e3 * profile['communication']:.2f} ms communication")
    lines += ["", f"  {'ms/step':>9} {'share':>7} {'calls':>7}  class and name"]
    for row in profile["kernels"][:SHOWN]:
        lines.append(f"  {ms(row['seconds'])} {row['calls']:7.1f}  {row['class']}: {shortened(row['name'])}")
    rest = profile["kernels"][SHOWN:]
    if rest:
        lines.append(f"  {ms(sum(r['seconds'] for r in rest))} {sum(r['calls'] for r in rest):7.1f}  {len(rest)} others")
    return "\n".join(lines)


def shortened(name: str, most: int = 90) -> str:
    """A kernel's name without C++'s return type, arguments and template parameters, but for the functor that it applies."""
    functors = re.findall(r"\w+(?:[Ff]unctor|_kernel_cuda)\b", name)
    name = re.sub(r"^void ", "", name)
    while (shorter := re.sub(r"<[^<>]*>", "", name)) != name:
        name = shorter
    name = re.sub(r"\(anonymous namespace\)::", "", name)
    name = name.partition("(")[0] or name
    if functors and functors[0] not in name:
        name += f" [{functors[0]}]"
    return name if len(name) <= most else name[: most - 3] + "..."


def _operators(events: Sequence[Mapping[str, Any]]) -> list[Kernel]:
    """A CPU's operators, each with the time that it does not spend in another."""
    kernels = []
    threads: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        threads[event.get("pid"), event.get("tid")].append(event)
    for thread in threads.values():
        open_ones: list[list[Any]] = []  # [name, start, end, own]
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            start, end = event["ts"], event["ts"] + event["dur"]
            while open_ones and open_ones[-1][2] <= start:
                kernels.append(Kernel(*open_ones.pop()))
            if open_ones:
                open_ones[-1][3] -= event["dur"]
            open_ones.append([event["name"], start, end, event["dur"]])
        kernels += [Kernel(*entry) for entry in open_ones]
    return kernels


def _union(kernels: Iterable[Kernel]) -> list[tuple[float, float]]:
    """The times at which at least one of them runs, as intervals that do not touch."""
    out: list[tuple[float, float]] = []
    for start, end in sorted((k.start, k.end) for k in kernels):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


def _length(intervals: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in intervals)
