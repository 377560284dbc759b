"""Measure a config's training step: its time and where that goes, throughput, MFU, HFU, memory.

    python run/bench.py --config configs/experiment/llm.yaml --steps 20
    python run/bench.py --config configs/experiment/llm.yaml --overhead batch.global=32 batch.micro=32
    python run/bench.py --config configs/experiment/qwen3_1.7b.yaml --data tokens --profile --out profiles/qwen batch.global=8
    python run/bench.py --config configs/experiment/qwen3_1.7b.yaml --data tokens --compare --micro 2,4,8
    torchrun --nproc-per-node 8 -- run/bench.py --config configs/experiment/llama3_8b.yaml --json llama3_8b.json

``--overhead`` runs the same training written by hand in turn with ours, and prints the ratio of the two steps; ``--compare`` what
other libraries make of the same work, each side at its best micro-batch. ``--data`` replaces the training data by synthetic data
of the run's sizes. What follows the options are settings of the config, as on the launcher's command line.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed


def numbers(text: str) -> list[int]:
    """Of ``--micro``."""
    from l3m_like.core.errors import UserError

    try:
        return [int(size) for size in text.split(",")]
    except ValueError:
        raise UserError(f"--micro {text}: it takes numbers of rows, such as 1,2,4.") from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="PATH", help="the run's YAML file")
    parser.add_argument("--data", metavar="KIND", help="synthetic data: tokens, documents, documents-padded or latents")
    parser.add_argument("--steps", type=int, default=20, help="how many are timed (default: 20)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them (default: 5)")
    parser.add_argument("--keep-ema", action="store_true", help="keep the config's average of weights")
    parser.add_argument("--profile", action="store_true", help="profile three more steps: a page, and a Chrome trace in --out")
    parser.add_argument("--overhead", action="store_true", help="compare with a loop written by hand (one process, fp32)")
    parser.add_argument("--compare", action="store_true", help="compare with other libraries on the same work (one process)")
    parser.add_argument(
        "--micro", metavar="N,N", help="with --compare: micro-batches to try (default: 1,2,4,8,16; images 32,64,128)"
    )
    parser.add_argument("--rows", type=int, help="with --compare: rows per optimizer step (default: the largest micro-batch)")
    parser.add_argument("--peer", metavar="NAME,NAME", help="with --compare: variants of the peer to try (default: all)")
    parser.add_argument("--rounds", type=int, default=2, help="with --compare: rounds in turn, ours and theirs (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything that was measured")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a folder for result.json, config.yaml, the page and the trace")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the file")
    args = parser.parse_intermixed_args(argv)  # settings may stand between options

    from l3m_like.benchmarks.bench import Progress, bench, table
    from l3m_like.benchmarks.profile import page
    from l3m_like.benchmarks.synthetic import synthetic_data
    from l3m_like.config import RunConfig
    from l3m_like.config.ranks import Failures, adopt_launcher
    from l3m_like.core.errors import UserError
    from l3m_like.distributed.mesh import init_process_group

    failures = Failures(0, 1)
    code = 0
    try:
        rank, world_size = adopt_launcher()
        if world_size > 1:
            init_process_group()
            failures = Failures(rank, world_size)
        if args.profile and args.out is None:
            raise UserError("--profile writes a trace; say where: --out DIR.")
        for option in ("micro", "rows", "peer"):
            if getattr(args, option) is not None and not args.compare:
                raise UserError(f"--{option} belongs to --compare; add it, or set batch.micro and batch.global.")
        if args.compare and (args.overhead or args.profile):
            raise UserError("--compare stands alone: run --overhead and --profile in a run of their own.")
        if args.json is not None and not args.json.parent.is_dir():
            raise UserError(f"--json {args.json}: there is no folder {args.json.parent}; make it first.")
        cfg = RunConfig.from_file(args.config, args.overrides)
        if args.data is not None:
            synthetic_data(cfg, args.data)
        if args.out is not None and rank == 0:
            cfg.save(args.out)
        say = Progress(silent=rank != 0)
        if args.compare:
            from l3m_like.benchmarks.compare import compare, report

            result: dict[str, Any] = compare(
                cfg,
                args.steps,
                warmup=args.warmup,
                micro=numbers(args.micro) if args.micro else None,
                rows=args.rows,
                variants=args.peer.split(",") if args.peer else None,
                rounds=args.rounds,
                say=say,
            )
            text = report(result)
            code = 1 if result["void"] else 0
        else:
            trace = args.out / "trace.json.gz" if args.profile else None
            result = bench(
                cfg, args.steps, warmup=args.warmup, overhead=args.overhead, keep_ema=args.keep_ema, profile=trace, say=say
            )
            text = table(result)
            if trace is not None and rank == 0:
                text += "\n\n" + page(result["profile"], f"{result['config']} on {result['facts']['device']}")
        if rank == 0:
            print(text)
            for path in [path for path in (args.json, args.out / "result.json" if args.out else None) if path is not None]:
                path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            if args.out is not None:
                (args.out / "report.txt").write_text(text + "\n", encoding="utf-8")
        failures.close()
    except Exception as error:
        return failures.fail(error)
    return code


if __name__ == "__main__":
    sys.exit(main())
