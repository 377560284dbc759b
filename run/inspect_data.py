"""What the model of a config will see: the first batches of its loader, as a summary and as a page with pictures.

    python run/inspect_data.py --config configs/experiment/llm.yaml --batches 20
    python run/inspect_data.py --config configs/experiment/sit.yaml --set heldout --out heldout.html data.workers=4

The batches are those of a run in one process: same seed, lanes and rows. What follows the options are settings of the config,
as on the launcher's command line. (docs/data_tools.md)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="PATH", help="the run's YAML file")
    parser.add_argument("--batches", type=int, default=16, metavar="N", help="how many (default: 16)")
    parser.add_argument("--set", default="train", metavar="NAME", help="train (default), or the name of an evaluation")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: RUNS/NAME_SET.html)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the file")
    args = parser.parse_intermixed_args(argv)  # settings may stand between options

    from l3m_like.core.errors import UserError

    try:
        return inspect(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def inspect(args: argparse.Namespace) -> int:
    from l3m_like.config import RunConfig
    from l3m_like.core.errors import UserError, did_you_mean
    from l3m_like.data.inspect import inspect_evaluation, inspect_training
    from l3m_like.data.inspect_page import page

    cfg = RunConfig.from_file(args.config, args.overrides)
    rows = cfg.batch.micro or cfg.batch.global_
    if args.set == "train":
        seen = inspect_training(
            cfg.instantiate("data.train"),
            args.batches,
            seed=cfg.seed,
            global_batch=cfg.batch.global_,
            micro_batch=rows,
            lanes=cfg.data.lanes,
            workers=cfg.data.workers,
            epochs=cfg.epochs,
            remainder=cfg.data.remainder,
            most_bad=cfg.data.max_bad_samples,
        )
    elif args.set in cfg.evals and cfg.evals[args.set].data is not None:
        seen = inspect_evaluation(cfg.instantiate(f"evals.{args.set}.data"), args.batches, batch=rows, seed=cfg.seed)
    else:
        known = ["train", *(name for name, evaluation in cfg.evals.items() if evaluation.data is not None)]
        raise UserError(f"--set {args.set}: there is no such data. {did_you_mean(args.set, known)}")
    for name, value in seen.facts().items():
        print(f"{name:<14} {value}")
    out = args.out or Path(cfg.run.dir) / f"{cfg.experiment}_{args.set}.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(seen, f"{cfg.experiment}: {args.set}"), encoding="utf-8")
    print(f"{'page':<14} {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
