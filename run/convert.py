"""Weights from Hugging Face folders, and back.

    python run/convert.py from-hf Qwen3-0.6B --config configs/experiment/qwen3_0.6b.yaml --out runs/start
    python run/convert.py to-hf --run runs/llm --out exported --dtype bf16
    python run/convert.py to-hf --run runs/llm --out exported --step 2000 --ema --max-shard-size 2G
    python run/convert.py to-hf --run runs/tuned --out adapter --adapters
    python run/convert.py to-hf --run runs/sit_xl2 --out sit.pt
    python run/convert.py to-hf --run runs/rae_xl --part decoder --out decoder.pt --ema

from-hf is seldom needed: `init.from=FOLDER` in any run reads a folder directly. It may run on many processes (torchrun), each of
which reads and writes its own shards. to-hf runs in one process, reads a checkpoint of any mesh, and holds one tensor at a time.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="from-hf | to-hf")

    back = commands.add_parser("from-hf", help="a folder's weights as the checkpoint of step 0 of a new run's directory")
    back.add_argument("folder", metavar="FOLDER", help="a Hugging Face folder, or the name of a model on its hub")
    back.add_argument("--config", required=True, type=Path, help="the experiment whose model it is")
    back.add_argument("--out", required=True, type=Path, help="the run's directory")
    back.add_argument("settings", nargs="*", metavar="KEY=VALUE", default=[], help="overrides of the config")

    there = commands.add_parser("to-hf", help="a run's weights as a Hugging Face folder that transformers loads")
    there.add_argument("--run", required=True, type=Path, help="the run's directory")
    there.add_argument("--out", required=True, type=Path, help="a new folder, or a new file NAME.pt (SiT, DiT^DH, RAE, AIM)")
    there.add_argument("--step", type=int, metavar="N", help="of the checkpoint (default: the newest)")
    there.add_argument("--ema", action="store_true", help="the averaged weights")
    there.add_argument(
        "--adapters", action="store_true", help="the run's LoRA adapters alone, as PEFT reads them (default: merged)"
    )
    there.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: as in the folder that the run began from, else as saved)"
    )
    there.add_argument("--max-shard-size", default="5G", metavar="BYTES", help="of a file: 500M, 5G (default: 5G)")
    there.add_argument(
        "--family", metavar="NAME", help="a model_type, or my_module.FAMILY (default: that of the folder, else the one that fits)"
    )
    there.add_argument("--part", metavar="PATH", help="of the model, that is written alone (default: the whole model)")
    args, rest = parser.parse_known_args(argv)  # settings may stand behind options, which argparse alone does not allow
    if args.command == "to-hf" or any(word.startswith("-") for word in rest):
        args, rest = parser.parse_args(argv), []
    settings = [*getattr(args, "settings", []), *rest]

    from l3m_like.core.errors import UserError

    try:
        lines = from_hf(args, settings) if args.command == "from-hf" else to_hf(args)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 1
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(lines))
    return 0


def from_hf(args: argparse.Namespace, settings: list[str]) -> list[str]:
    from l3m_like.training.export import import_folder

    return import_folder(args.folder, args.config, args.out, settings)


def to_hf(args: argparse.Namespace) -> list[str]:
    import torch

    from l3m_like.training.export import export, export_adapters

    if args.adapters:
        return export_adapters(args.run, args.out, step=args.step, ema=args.ema, family_name=args.family)
    dtype = getattr(torch, DTYPES[args.dtype]) if args.dtype else None
    most = parse_size(args.max_shard_size)
    return export(
        args.run, args.out, step=args.step, ema=args.ema, dtype=dtype, most=most, family_name=args.family, part=args.part
    )


def parse_size(written: str) -> int:
    """``"5G"`` -> 5_000_000_000 bytes (K, M, G, T, with or without B)."""
    from l3m_like.core.errors import UserError

    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", written.upper())
    if not found or not float(found[1]):
        raise UserError(f"--max-shard-size {written}: write a number of bytes, e.g. 500M or 5G.")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2] or " "))


if __name__ == "__main__":
    sys.exit(main())
