"""Run tasks of lm-evaluation-harness (pip install lm_eval) on a run's model.

    python run/harness.py --run runs/llm --tasks hellaswag,arc_easy --max-length 2048
    torchrun --nproc-per-node 2 -- run/harness.py --run runs/llm --tasks lambada_openai --max-length 2048

The harness downloads its tasks' data; tasks of your own lie in --include-path. Every process asks for everything and computes
its share.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="the run's directory (or a config: random weights)")
    parser.add_argument("--tasks", required=True, metavar="NAME,NAME", help="of the harness")
    parser.add_argument("--max-length", type=int, required=True, help="tokens of a window, that of the training")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument("--ema", action="store_true", help="use the averaged weights")
    parser.add_argument("--dtype", default=None, help="of the weights, e.g. bfloat16 (default: as saved)")
    parser.add_argument("--shots", type=int, help="examples before each question (default: the task's)")
    parser.add_argument("--limit", type=int, help="questions of each task (default: all)")
    parser.add_argument("--batch", type=int, default=8, help="windows at a time, per process (default: 8)")
    parser.add_argument("--include-path", help="a folder with tasks of your own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results")
    args = parser.parse_args(argv)

    from l3m_like import load
    from l3m_like.core.errors import UserError
    from l3m_like.distributed.mesh import build_mesh
    from l3m_like.generate.harness import harness_model

    try:
        mesh = build_mesh({}) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
        loaded = load(args.run, step=args.step, ema=args.ema, dtype=args.dtype, mesh=mesh)
        model = harness_model(loaded.model, loaded.processor(), max_length=args.max_length, batch=args.batch, mesh=mesh)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    tasks = TaskManager(include_path=args.include_path)
    found = lm_eval.simple_evaluate(
        model=model, tasks=args.tasks.split(","), num_fewshot=args.shots, limit=args.limit, task_manager=tasks
    )
    if mesh is None or mesh.is_main:
        print(make_table(found))
        if args.json is not None:
            args.json.write_text(json.dumps(found["results"], indent=1, default=str) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
