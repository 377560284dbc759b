"""Mean and variance of an encoder's latents over the training data, for l3m_like.blocks.NormalizeLatent.

python run/latent_statistics.py --run configs/experiment/rae.yaml --samples 1000 --out latents.safetensors
torchrun --nproc-per-node 8 -- run/latent_statistics.py --run runs/rae --out data/latents.safetensors
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="a run's directory, or a config: the weights it starts from")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--samples", type=int, help="rows of the data (default: all)")
    parser.add_argument("--batch", type=int, default=64, help="rows at a time, per process")
    parser.add_argument("--key", default="image_latent", help="key of the latents")
    args = parser.parse_args(argv)

    from l3m_like.core.errors import UserError

    try:
        return measure(args)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 1


def measure(args: argparse.Namespace) -> int:
    from safetensors.torch import save_file

    from l3m_like import load
    from l3m_like.distributed.mesh import build_mesh
    from l3m_like.generate import latent_statistics

    mesh = build_mesh({}) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    loaded = load(args.run, mesh=mesh)
    data = loaded.config.instantiate("data.train")
    found = latent_statistics(loaded.model, data, samples=args.samples, batch=args.batch, key=args.key, mesh=mesh)
    if mesh is None or mesh.is_main:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        save_file(found, args.out)
        mean, deviation = found["mean"], found["variance"].sqrt()
        print(f"{list(mean.shape)}: mean {mean.mean():.3g}, deviation {deviation.mean():.3g}, written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
