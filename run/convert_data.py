"""Convert data: any indexed source of the library to webdataset shards, or to Megatron's token files.

    python run/convert_data.py data/imagenet out/imagenet --to webdataset --shard-size 256M where.split=train
    python run/convert_data.py 'data/text-{000..127}.jsonl' out/text --to megatron --tokenizer tokenizer.json --vocab-size 128256
    python run/convert_data.py data/pairs.csv out/pairs --to webdataset columns.media=filepath columns.txt=title data_folder=data

OUTPUT is a folder of its own. The same command goes on where it was ended, and makes damaged files again; its result does not
depend on the number of processes. What follows the options are arguments of the source. (docs/data_tools.md)
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="INPUT", help="a file, a pattern or a folder")
    parser.add_argument("output", metavar="OUTPUT", help="a folder: new, or of the same conversion")
    parser.add_argument("--to", required=True, choices=("webdataset", "megatron"), help="what is written")
    parser.add_argument("--from", dest="form", help="what is read (default: by the input's ending): json, csv, images, ...")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--max-bad", type=int, default=0, metavar="N", help="samples that may be left out (default: 0)")
    shards = parser.add_argument_group("webdataset")
    shards.add_argument("--shard-size", metavar="BYTES", help="about so many in a shard (default: 256M)")
    shards.add_argument("--samples-per-shard", type=int, metavar="N", help="instead")
    tokens = parser.add_argument_group("megatron")
    tokens.add_argument("--tokenizer", help="bytes (default), the path of a tokenizer.json, or ids: the samples hold ids")
    tokens.add_argument("--vocab-size", type=int, metavar="V", help="the model's (default with bytes: 257)")
    tokens.add_argument("--field", help="which field is the text (default: text)")
    tokens.add_argument("--end", metavar="TOKEN", help="the end-of-document token (default: the tokenizer's)")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="arguments of the source, e.g. where.split=train")
    args = parser.parse_intermixed_args(argv)  # settings may stand between options

    from l3m_like.core.errors import UserError

    try:
        return convert(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def convert(args: argparse.Namespace) -> int:
    from l3m_like.core.errors import UserError
    from l3m_like.data.convert import Conversion, Input, Progress, parse_settings

    if args.workers < 1 or args.max_bad < 0:
        raise UserError(f"--workers is {args.workers} and --max-bad {args.max_bad}; at least 1 and 0.")
    given = Input.of(args.input, args.form, parse_settings(args.settings))
    conversion = Conversion(given, target(args, given), args.output, max_bad=args.max_bad)
    if conversion.complete:
        print(f"{args.output} is complete: nothing to do")
        return 0
    for name, (found, wanted) in conversion.damaged.items():
        state = "is missing" if found < 0 else f"has {found:,} bytes, not {wanted:,}"
        print(f"{args.output}/{name} {state}: it is made again")
    progress = Progress(conversion)
    if progress.done:
        print(f"going on: {progress.done:,} of {conversion.total:,} samples are done")
    try:
        manifest = conversion.run(args.workers, progress)
    finally:
        progress.close()
    left_out = f", {manifest['left_out']} left out (ledger.jsonl)" if manifest["left_out"] else ""
    size = sum(manifest["files"].values())
    print(f"{args.output}: {manifest['samples']:,} samples in {len(manifest['files'])} files, {size:,} bytes{left_out}")
    return 0


def target(args: argparse.Namespace, given: Any) -> Any:
    """What is written, of the options of its kind.

    Raises:
        UserError: options of the other kind; no vocabulary size.
    """
    from l3m_like.core.errors import UserError
    from l3m_like.data.convert import ToMegatron, ToWebDataset, parse_bytes

    options = {"webdataset": ("shard_size", "samples_per_shard"), "megatron": ("tokenizer", "vocab_size", "field", "end")}
    for kind, names in options.items():
        for name in names:
            if kind != args.to and getattr(args, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} has no meaning with --to {args.to}. Remove it.")
    if args.to == "webdataset":
        size = None if args.shard_size is None else parse_bytes(args.shard_size)
        return ToWebDataset(given.source, args.samples_per_shard, size)
    tokenizer = args.tokenizer or "bytes"
    if args.vocab_size is None and tokenizer != "bytes":
        raise UserError("--vocab-size is missing: the model's, at least the number of tokens.")
    return ToMegatron(tokenizer, args.vocab_size or 257, args.field, args.end)


if __name__ == "__main__":
    sys.exit(main())
