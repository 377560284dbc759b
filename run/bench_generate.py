"""Measure generation beside transformers.generate: the same sizes, weights and prompts, greedy, in turn.

    python run/bench_generate.py --config configs/experiment/qwen3_0.6b.yaml --batch 1,8,64 --prompt 512 --new 256
    python run/bench_generate.py --config configs/experiment/llm.yaml --batch 2 --prompt 16 --new 8 --eager --dtype float32

Ours runs with compile: true, theirs with its compiled static cache; --eager compares both without a compiler.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="PATH", help="the run's YAML file (random weights)")
    parser.add_argument("--batch", default="1,8,64", metavar="N,N", help="rows at a time (default: 1,8,64)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt (default: 512)")
    parser.add_argument("--new", type=int, default=256, help="tokens that are generated (default: 256)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in turn, the best counts (default: 3)")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights (default: bfloat16)")
    parser.add_argument("--eager", action="store_true", help="both sides without a compiler")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything that was measured")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the file")
    args = parser.parse_intermixed_args(argv)

    from l3m_like.benchmarks.generation import bench_generate
    from l3m_like.config import RunConfig
    from l3m_like.core.errors import UserError

    rows = []
    try:
        cfg = RunConfig.from_file(args.config, args.overrides)
        for batch in args.batch.split(","):
            sizes = {"batch": int(batch), "prompt": args.prompt, "new": args.new}
            rows.append(bench_generate(cfg, **sizes, rounds=args.rounds, dtype=args.dtype, compiled=not args.eager))
            row = rows[-1]
            sides = ", ".join(
                f"{name} {row[name]['tokens_per_second']:,.0f} tokens/s (prompt {1000 * row[name]['prompt_seconds']:.1f} ms)"
                for name in ("ours", "transformers")
            )
            print(f"batch {batch}: {sides}; {row['ratio']:.2f}x, {row['agreeing']:.1%} of tokens agree", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
