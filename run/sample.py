"""Samples from a run: text on the screen, images as a PNG.

    python run/sample.py --run runs/sit --ema guidance=3 num_samples=100
    python run/sample.py --run runs/llm 'prompts=["To be, "]' temperature=0.7
    torchrun --nproc-per-node 2 -- run/sample.py --run runs/llm --parallel tp=2

(The ``--`` keeps torchrun from reading ``--run`` as one of its own options.)
What follows the options are settings of the run's sampler (the `sample` section), as on the launcher's command line;
docs/generation.md lists them for text.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="the run's directory or RUN/checkpoints/step_N (a config: initial weights)")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument("--ema", action="store_true", help="use the averaged weights")
    parser.add_argument("--guide", help="run (or checkpoint folder) of a weaker model that `guidance` leads away from")
    parser.add_argument("--decode", help="run (or checkpoint folder) of the autoencoder whose latents these are")
    parser.add_argument("--out", type=Path, help="file to write (images default to RUN/samples/)")
    parser.add_argument("--parallel", default="", metavar="AXIS=N,...", help="mesh axes (default: dp_shard takes all processes)")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of the sampler")
    args = parser.parse_intermixed_args(argv)  # settings may stand between options

    from l3m_like.core.errors import UserError

    try:
        return sample(args)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 1


def sample(args: argparse.Namespace) -> int:
    from l3m_like import load
    from l3m_like.distributed.mesh import build_mesh

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    axes = parse_axes(args.parallel)
    mesh = build_mesh(axes) if processes > 1 or axes else None
    loaded = load(args.run, step=args.step, ema=args.ema, overrides=[f"sample.{setting}" for setting in args.settings], mesh=mesh)
    samples = loaded.generate(None if args.guide is None else load(args.guide, ema=args.ema, mesh=mesh))
    if args.decode is not None:
        from l3m_like.generate import decode_latents

        samples = decode_latents(samples, load(args.decode, ema=args.ema).model, generator=loaded.model)
    if mesh is None or mesh.is_main:
        begin = "random weights" if loaded.config.init is None else "initial weights"
        weights = begin if loaded.step is None else f"step {loaded.step}{', averaged weights' if loaded.ema else ''}"
        print(f"{args.run}: {weights}\n\n{samples}\n")
        if args.out is not None or samples.suffix != ".txt":
            print(f"written to {samples.save(args.out or default_path(Path(args.run), loaded.step, loaded.ema, samples.suffix))}")
    return 0


def parse_axes(written: str) -> dict[str, int]:
    """``"dp_shard=2,tp=2"`` -> ``{"dp_shard": 2, "tp": 2}``."""
    from l3m_like.core.errors import UserError, did_you_mean
    from l3m_like.distributed.mesh import AXES

    axes = {}
    for text in written.split(",") if written else ():
        axis, _, size = text.partition("=")
        if axis not in AXES:
            raise UserError(f"--parallel {text}: there is no axis '{axis}'. {did_you_mean(axis, AXES)}")
        if not size.lstrip("-").isdecimal():
            raise UserError(f"--parallel {text}: write a number of processes, e.g. {axis}=2.")
        axes[axis] = int(size)
    return axes


def default_path(run: Path, step: int | None, ema: bool, suffix: str) -> Path:
    name = "random" if step is None else f"step_{step:08d}{'_ema' if ema else ''}"
    run = run.parents[1] if run.name.startswith("step_") else run
    return (run if run.is_dir() else Path("runs")) / "samples" / f"{name}{suffix}"


if __name__ == "__main__":
    sys.exit(main())
