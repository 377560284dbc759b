"""What run/launcher.py does: one run or a sweep, in one process or as one of several.

python run/launcher.py --config PATH [--check[=model]] [--debug] [-m] [key=value ...]
torchrun --nproc-per-node 8 run/launcher.py --config PATH [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from l3m_like.config.compose import find_config
from l3m_like.config.ranks import Failures, adopt_launcher
from l3m_like.config.run_config import RunConfig
from l3m_like.core.errors import Stopped, UserError, did_you_mean

FLAGS = ("--config", "--check", "--check=model", "--debug", "--multirun", "--help")


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are ours."""

    def error(self, message: str) -> Any:
        raise UserError(f"command line: {message}. Usage: {self.format_usage().removeprefix('usage: ').strip()}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises UserError for a flag that does not exist, with the nearest one."""
    parser = _Parser(prog="launcher.py", description="Train what a config file describes.", allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="PATH", help="the run's YAML file, anywhere")
    parser.add_argument(
        "--check",
        choices=("all", "model"),
        metavar="[=model]",
        help="check everything short of training; model: without the data",
    )
    parser.add_argument(
        "--debug", action="store_true", help="no compile, no workers, no tracker, a folder of its own, full traces"
    )
    parser.add_argument("-m", "--multirun", action="store_true", help="a sweep: a=1,2 b=3,4")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the file (Hydra's syntax)")
    # --check takes its value only after "=", or it would swallow the next override
    args, unknown = parser.parse_known_intermixed_args(["--check=all" if arg == "--check" else arg for arg in argv])
    for arg in unknown:
        raise UserError(
            f"{arg} (command line): there is no such flag. {did_you_mean(arg, FLAGS)} Settings are given as key=value."
        )
    if args.multirun and args.check:
        raise UserError("--check checks one run; leave -m away and give one value per key.")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's). Returns the exit code; with several processes a failure ends
    this one at once."""
    argv = list(sys.argv[1:] if argv is None else argv)
    failures = Failures(0, 1, debug="--debug" in argv)
    try:
        rank, world_size = adopt_launcher()
        if world_size > 1:  # first of all, so that any failure from here on reaches every rank
            from l3m_like.distributed import mesh

            mesh.init_process_group()
            failures = Failures(rank, world_size, debug="--debug" in argv)
        args = parse(argv)
        overrides = [*args.overrides, *(["debug=true"] if args.debug else [])]
        if args.multirun:
            from l3m_like.config.sweep import sweep

            code = sweep(find_config(args.config), overrides, failures)
        elif args.check:
            from l3m_like.training.check import check

            code = check(RunConfig.from_file(args.config, overrides), model_only=args.check == "model")
        else:
            run(RunConfig.from_file(args.config, overrides))
            code = 0
        failures.close()
        return code
    except Stopped as stopped:  # on all ranks
        if failures.rank == 0:
            print(stopped, flush=True)
            if failures.last_words is not None:
                failures.last_words()
        failures.close()
        return 0
    except KeyboardInterrupt:  # before the first step, or the second one
        print("stopped at once; what was saved is in the run's checkpoints.", file=sys.stderr, flush=True)
        os._exit(130)  # threads and other ranks are not waited for
    except Exception as error:
        return failures.fail(error)


def run(cfg: RunConfig) -> dict[str, Any]:
    """Train ``cfg`` on all ranks; the final metrics are kept as `result.json` in the run's directory."""
    import l3m_like
    from l3m_like.distributed import mesh

    metrics = l3m_like.train(cfg)
    rank, _ = mesh.init_process_group()
    if rank == 0:
        (cfg.run_dir / "result.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    return metrics


if __name__ == "__main__":
    sys.exit(main())
