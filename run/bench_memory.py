"""Measure what keeping, recomputing or offloading activations costs for a config: a table of modes.

    python run/bench_memory.py --config configs/experiment/llm.yaml --steps 5
    python run/bench_memory.py --config configs/experiment/qwen3_0.6b.yaml --modes "none; full; offload" --json modes.json

What follows the options are settings of the config, as on the launcher's command line.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="PATH", help="the run's YAML file")
    parser.add_argument("--modes", default="", metavar="A;B", help="which, separated by semicolons (default: all)")
    parser.add_argument("--steps", type=int, default=10, help="how many are timed per mode (default: 10)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything that was measured")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the file")
    args = parser.parse_intermixed_args(argv)  # settings may stand between options

    from l3m_like.benchmarks.memory import bench_memory, table
    from l3m_like.config import RunConfig
    from l3m_like.config.ranks import Failures, adopt_launcher
    from l3m_like.distributed.mesh import init_process_group

    failures = Failures(0, 1)
    try:
        rank, world_size = adopt_launcher()
        if world_size > 1:
            init_process_group()
            failures = Failures(rank, world_size)
        cfg = RunConfig.from_file(args.config, args.overrides)
        modes = [name.strip() for name in args.modes.split(";") if name.strip()]
        result = bench_memory(cfg, modes, steps=args.steps, warmup=args.warmup)
        if rank == 0:
            print(table(result))
            if args.json is not None:
                args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        failures.close()
    except Exception as error:
        return failures.fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
