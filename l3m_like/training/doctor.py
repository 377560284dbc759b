"""What a machine can do for this library, what will not work, and how to repair it. Users send its output with a bug report."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

#: optional package -> what it is for
OPTIONAL = {
    "transformers": "parity tests against published language models",
    "diffusers": "parity tests against published image models",
    "timm": "image backbones",
    "torchvision": "timm, and parts of transformers",
    "datasets": "Hugging Face data sources",
    "webdataset": "webdataset tools (reading tars needs none)",
    "wandb": "log.wandb",
    "tensorboard": "log.tensorboard",
    "aim": "log.aim",
    "flash-attn": "faster attention on NVIDIA GPUs",
    "flash-attn-4": "faster attention on Hopper and sm_100",
    "liger-kernel": "faster losses and norms on NVIDIA GPUs",
    "flash-linear-attention": "linear-attention mixers",
}
NEEDED = ("numpy", "hydra-core", "omegaconf", "safetensors", "tokenizers", "pillow", "rich", "matplotlib", "einops")
MIN_PYTHON, MIN_TORCH = (3, 11), (2, 11)
MIN_DISK = 5e9

_SELF_TEST = """
import sys, torch, torch.distributed as dist
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:" + sys.argv[2], rank=rank, world_size=2)
x = torch.full((4,), float(rank + 1))
dist.all_reduce(x)
assert x.tolist() == [3.0] * 4, x
dist.destroy_process_group()
"""


@dataclass(frozen=True)
class Finding:
    """One line: ``state`` is ok, info, warning (slower, or a feature is missing) or error (something will not work)."""

    state: str
    name: str
    found: str
    fix: str = ""


def examine(runs: str | Path = "runs") -> list[Finding]:
    """Look at everything. A check that itself fails is an error with its message, and the others go on."""
    checks: list[Callable[[], Iterable[Finding]]] = [
        python,
        torch_build,
        accelerators,
        packages,
        torchvision_build,
        process_group,
        lambda: folder(Path(runs)),
        threads,
    ]
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:
            name = getattr(check, "__name__", "check")
            findings.append(Finding("error", name, f"{type(error).__name__}: {error}", "report this"))
    return findings


def report(findings: Iterable[Finding]) -> str:
    """As text."""
    findings = list(findings)
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:8} {finding.name:{width}}  {finding.found}")
        if finding.fix:
            lines.append(f"{'':8} {'':{width}}  -> {finding.fix}")
    errors = sum(finding.state == "error" for finding in findings)
    warnings = sum(finding.state == "warning" for finding in findings)
    return "\n".join([*lines, "", f"errors: {errors}, warnings: {warnings}"])


def main(runs: str = "runs") -> int:
    """Print the report; 0, or 1 if there is an error."""
    findings = examine(runs)
    print(report(findings))
    return int(any(finding.state == "error" for finding in findings))


# ---- the checks ----------------------------------------------------------------------------------------------------


def python() -> list[Finding]:
    version = f"{platform.python_version()} ({sys.executable}), {platform.platform()}"
    if sys.version_info < MIN_PYTHON:
        return [Finding("error", "python", version, "use Python 3.11 or newer")]
    return [Finding("ok", "python", version)]


def torch_build() -> list[Finding]:
    if importlib.util.find_spec("torch") is None:
        return [Finding("error", "torch", "not installed", "pip install -e . -c constraints.txt")]
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    found = f"{torch.__version__}, built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU'}"
    if version < MIN_TORCH:
        return [Finding("error", "torch", found, "pip install -e . -c constraints.txt (torch 2.11 or newer)")]
    return [Finding("ok", "torch", found)]


def accelerators() -> list[Finding]:
    import torch

    driver = nvidia_driver()
    if not torch.cuda.is_available():
        if driver and torch.version.cuda is None:
            fix = "install a CUDA build of torch: https://pytorch.org/get-started/locally"
            return [Finding("error", "gpu", f"driver {driver} is there, but torch is a CPU build", fix)]
        if driver:
            fix = f"the driver is older than CUDA {torch.version.cuda} needs, or CUDA_VISIBLE_DEVICES hides the GPUs"
            return [Finding("error", "gpu", f"driver {driver} is there, but torch cannot use it", fix)]
        return [Finding("info", "gpu", "none: runs on the CPU (gloo)")]
    findings = [Finding("ok", "driver", f"{driver or 'unknown'}, CUDA {torch.version.cuda}")]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        found = f"{card.name}, {card.total_memory / 1e9:.0f} GB, compute capability {card.major}.{card.minor}"
        if card.major < 8:
            findings.append(Finding("warning", f"gpu {index}", found, "no bf16 in hardware: parallel.precision=fp32"))
        else:
            findings.append(Finding("ok", f"gpu {index}", found))
    import torch.distributed as dist

    if dist.is_nccl_available():
        findings.append(Finding("ok", "nccl", ".".join(map(str, torch.cuda.nccl.version()))))
    else:
        fix = "install a torch build with NCCL" if torch.cuda.device_count() > 1 else ""
        findings.append(Finding("error" if fix else "info", "nccl", "not in this build of torch", fix))
    triton = _version("triton")
    fix = "" if triton else "pip install triton (torch.compile and our kernels need it on a GPU)"
    findings.append(Finding("ok" if triton else "warning", "triton", triton or "not installed", fix))
    return findings


def nvidia_driver() -> str | None:
    """The driver's version, without torch."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    out = subprocess.run(
        [tool, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=30, check=False
    )
    return out.stdout.strip().split("\n")[0] or None if out.returncode == 0 else None


def packages() -> list[Finding]:
    findings = []
    missing = [name for name in NEEDED if _version(name) is None]
    if missing:
        fix = "pip install -e . -c constraints.txt"
        findings.append(Finding("error", "needed packages", f"missing: {', '.join(missing)}", fix))
    else:
        findings.append(Finding("ok", "needed packages", ", ".join(f"{name} {_version(name)}" for name in NEEDED)))
    for name, purpose in OPTIONAL.items():
        version = _version(name)
        findings.append(Finding("ok" if version else "info", name, f"{version or 'not installed'} (optional: {purpose})"))
    return findings


def torchvision_build() -> list[Finding]:
    """A torchvision whose compiled operators are for another torch stops timm, diffusers and parts of transformers."""
    version = _version("torchvision")
    if version is None or importlib.util.find_spec("torch") is None:
        return []
    code = "import torchvision, torch; torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    if out.returncode == 0:
        return [Finding("ok", "torchvision build", f"{version} fits torch")]
    import torch

    why = (out.stderr.strip().split("\n") or ["?"])[-1][:160]
    fix = f"install the torchvision that belongs to torch {torch.__version__}, from the same index (our tests work around it)"
    return [Finding("warning", "torchvision build", f"{version} is for another torch: {why}", fix)]


def process_group() -> list[Finding]:
    """Two processes that add a tensor over gloo, as every run of several processes does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", _SELF_TEST]
    ranks = [
        subprocess.Popen([*command, str(rank), str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = []
    for rank in ranks:
        try:
            _, err = rank.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            rank.kill()
            err = "no answer in 90 s"
        if rank.returncode != 0:
            errors.append((err.strip().split("\n") or ["?"])[-1][:160])
    if errors:
        fix = "processes must reach each other: see the firewall, /etc/hosts (the host's own name), and GLOO_SOCKET_IFNAME=lo"
        return [Finding("error", "gloo, 2 processes", errors[0], fix)]
    return [Finding("ok", "gloo, 2 processes", "all-reduce works")]


def folder(runs: Path) -> list[Finding]:
    """May we write where runs live, and is there room?"""
    place = runs.absolute()
    nearest = next(path for path in (place, *place.parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=nearest):
            pass
    except OSError as error:
        fix = "give a folder of yours: run.dir=/path/to/runs"
        return [Finding("error", "run directory", f"{nearest} is not writable: {error.strerror}", fix)]
    free = shutil.disk_usage(nearest).free
    found = f"{place}: writable, {free / 1e9:.0f} GB free"
    if free < MIN_DISK:
        fix = "a checkpoint of 1 B weights takes 12 GB: free some, or run.dir=/another/disk, checkpoint.keep_last=1"
        return [Finding("warning", "run directory", found, fix)]
    return [Finding("ok", "run directory", found)]


def threads() -> list[Finding]:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS")
    found = f"{torch.get_num_threads()} threads on {usable} cores, OMP_NUM_THREADS {asked or 'not set'}"
    if torch.get_num_threads() > usable:
        return [Finding("warning", "threads", found, f"more threads than cores make the CPU slower: OMP_NUM_THREADS={usable}")]
    return [Finding("ok", "threads", found)]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
