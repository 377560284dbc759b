"""Encode the pictures of an experiment's dataset once: webdataset shards of latents, which configs/experiment/sit_xl2.yaml reads.

    CONFIG=configs/experiment/sit_xl2_online.yaml
    python run/encode_latents.py --config $CONFIG --flip --out data/imagenet-latents/train flip=false layers=1
    torchrun --nproc-per-node 8 -- run/encode_latents.py --config $CONFIG --data heldout --out data/imagenet-latents/heldout

Mean and standard deviation are kept, so that every epoch can draw other latents. The same command goes on where it was ended.
(`layers=1`: the rest of the model is built too, and not used.) What follows the options are settings of the config.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="PATH", help="an experiment with a frozen autoencoder")
    parser.add_argument("--data", default="train", metavar="NAME", help="train (default), or the name of an evaluation")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="of the shards")
    parser.add_argument("--flip", action="store_true", help="also the mirrored pictures")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the arrays (default: float32)")
    parser.add_argument("--batch", type=int, default=64, help="pictures at a time (default: 64)")
    parser.add_argument("--samples-per-shard", type=int, default=4096, metavar="N", help="(default: 4096)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the file")
    args = parser.parse_intermixed_args(argv)  # settings may stand between options

    from l3m_like.core.errors import UserError

    try:
        return encode(args)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 1


def encode(args: argparse.Namespace) -> int:
    from l3m_like.config import RunConfig
    from l3m_like.distributed.mesh import build_mesh
    from l3m_like.training.encode_latents import encode_latents

    cfg = RunConfig.from_file(args.config, args.overrides)
    place = "data.train" if args.data == "train" else f"evals.{args.data}.data"
    mesh = build_mesh({})
    settings = {"flip": args.flip, "dtype": args.dtype, "batch": args.batch, "shard": args.samples_per_shard}
    count = encode_latents(cfg, place, args.out, mesh, **settings)
    print(f"{args.out}: {count:,} pictures encoded by process {mesh.rank}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
