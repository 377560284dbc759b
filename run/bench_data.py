"""Measure the loader beside others on the same files: reading and tokenizing text from tar shards, in turn.

    python run/bench_data.py --rounds 3
    python run/bench_data.py --rounds 5 --megabytes 64 --workers 2 --json rates.json

Each side reads every document once and tokenizes it with the same tokenizer.json; a side whose package is not installed is left
out and named. webdataset and torchdata read the same tars; MosaicML Streaming reads the same documents in its own format.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="times that each side runs (default: 3)")
    parser.add_argument("--megabytes", type=int, default=24, help="text to read (default: 24)")
    parser.add_argument("--workers", type=int, default=2, help="threads or processes of each side (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every rate")
    args = parser.parse_args(argv)

    from l3m_like.data.bench import SIDES, make_files, megatron_rate

    with tempfile.TemporaryDirectory() as folder:
        files = make_files(Path(folder), args.megabytes)
        print(f"{files.documents} documents, {files.tokens} tokens, {len(files.tars)} tars, {args.workers} workers", flush=True)
        rates: dict[str, list[float]] = {}
        missing: dict[str, str] = {}
        for _ in range(args.rounds):
            for name, side in SIDES.items():
                if name in missing:
                    continue
                try:
                    rates.setdefault(name, []).append(side(files, args.workers))
                except ImportError as error:
                    missing[name] = str(error)
        megatron = [megatron_rate(files) for _ in range(args.rounds)]
    ours = statistics.median(rates["l3m_like"])
    for name, found in rates.items():
        if found:
            median, each = statistics.median(found), [round(rate / 1e6, 2) for rate in found]
            print(f"{name:20} {median / 1e6:6.2f} M tokens/s   ours / theirs {ours / median:.2f}   {each}")
    for name, why in missing.items():
        print(f"{name:20} not installed: {why}")
    print(f"{'Megatron .bin':20} {statistics.median(megatron) / 1e6:6.2f} M tokens/s")
    if args.json:
        args.json.write_text(json.dumps({"rates": rates, "megatron": megatron, "missing": missing}, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
