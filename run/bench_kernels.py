"""Measure the fused kernels on this GPU: forward and backward, beside torch.compile of the reference, and Liger where installed.

    python run/bench_kernels.py --json kernels.json
    python run/bench_kernels.py --sweep
    python run/bench_kernels.py --muon

``--sweep`` times our kernels with other tile sizes instead, ``--muon`` the parts of a Muon step.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything that was measured")
    parser.add_argument("--sweep", action="store_true", help="other tile sizes, one setting at a time")
    parser.add_argument("--muon", action="store_true", help="the parts of a Muon step, at the sizes of Qwen3-1.7B")
    args = parser.parse_args(argv)

    import torch

    if not torch.cuda.is_available():
        print("bench_kernels: an NVIDIA GPU is needed.")
        return 1

    from l3m_like.kernels.bench import measure, muon_line, muon_rows, sweep, table

    if args.sweep:
        for line in sweep():
            print(line, flush=True)
        return 0
    if args.muon:
        for row in muon_rows():
            print(muon_line(row), flush=True)
        return 0
    rows = measure()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16")
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
