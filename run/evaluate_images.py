"""Metrics of generated pictures against real ones: FID, sFID, inception score, precision and recall.

    python run/evaluate_images.py runs/sit runs/sit:heldout --ema num_samples=1000 guidance=1
    python run/evaluate_images.py samples/ imagenet.npz --extractor inception --weights pt_inception-2015-12-05-6726825d.pth
    torchrun --nproc-per-node 2 -- run/evaluate_images.py runs/sit runs/sit:train --samples 10000
    python run/evaluate_images.py runs/sit:train:gaussians runs/sit:heldout --judge runs/vit

Each of the two sets is a run's directory (its samples), RUN:NAME or CONFIG.yaml:NAME (pictures of its dataset `train` or of its
evaluation NAME; with `:gaussians`, independent pixels with the mean and deviation that they have in each class, as a baseline),
a folder of pictures, or an .npz file of uint8 [N, H, W, 3]. What follows the options are settings of the run's sampler. A judge
is the run of a classifier, which says how many of the generated pictures show their class. Published FIDs are of 50,000 samples
with `--extractor inception`; those of other extractors compare with each other.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed

EXTRACTORS = {"inception": "Inception", "efficientnet-lite0": "EfficientNetLite0"}
METRICS = ("fid", "sfid", "inception_score", "precision", "recall")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("made", metavar="GENERATED", help="the set that is judged")
    parser.add_argument("real", metavar="REAL", help="the set that it is compared with")
    parser.add_argument("--extractor", choices=EXTRACTORS, default="efficientnet-lite0", help="(default: efficientnet-lite0)")
    parser.add_argument("--weights", metavar="FILE", help="of the extractor (default: of an installed package)")
    parser.add_argument("--random-weights", action="store_true", help="an extractor without weights; the result says so")
    parser.add_argument("--metrics", default=",".join(METRICS), metavar="NAME,...", help="(default: all)")
    parser.add_argument("--samples", type=int, metavar="N", help="pictures of each set at most (of a run: how many it makes)")
    parser.add_argument("--step", type=int, help="of a run's checkpoint (default: the newest)")
    parser.add_argument("--ema", action="store_true", help="a run's averaged weights")
    parser.add_argument("--judge", metavar="RUN", help="of a classifier (or its RUN/checkpoints/step_N): adds class_accuracy")
    parser.add_argument("--batch", type=int, default=64, help="pictures at a time (default: 64)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON too")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of a run's sampler")
    args = parser.parse_intermixed_args(argv)  # settings may stand between options

    from l3m_like.core.errors import UserError

    try:
        return evaluate(args)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 1


def evaluate(args: argparse.Namespace) -> int:
    from l3m_like import evaluations
    from l3m_like.core.errors import UserError
    from l3m_like.distributed.mesh import build_mesh
    from l3m_like.evaluations.image_sets import Statistics, compare
    from l3m_like.evaluations.judge import Judge, JudgedAccuracy
    from l3m_like.evaluations.sample_quality import collect_statistics

    mesh = build_mesh({})
    extractor = getattr(evaluations, EXTRACTORS[args.extractor])(args.weights, random_weights=args.random_weights)
    extractor.check()
    metrics = args.metrics.split(",")
    Statistics(metrics)
    named(args.real)  # a mistake is found before pictures are made
    generated = pictures(args.made, args, mesh)
    accuracy = None
    if args.judge is not None:
        if generated.label is None:
            raise UserError(f"--judge: the classes of {args.made} are not known; those of a run's samples and of datasets are.")
        accuracy = JudgedAccuracy(Judge(args.judge), generated.label)
        accuracy.judge.check()
    batches = generated.batches if accuracy is None else accuracy.watch(generated.batches)
    made = collect_statistics(batches, extractor, Statistics(metrics, generated.count), mesh)
    others = pictures(args.real, args, mesh)  # not before: two models need not be in memory
    real = collect_statistics(others.batches, extractor, Statistics(metrics, others.count), mesh)
    values = compare(real, made, metrics, 3, mesh)
    result = {**values, "generated": made.count, "real": real.count, "extractor": extractor.name}
    if accuracy is not None:
        result |= {"class_accuracy": accuracy.result(mesh), "judge": accuracy.judge.name}
    if max(made.count, real.count) > made.most and made.keeps:
        result["features held"] = made.most
    if mesh.is_main:
        for name, value in result.items():
            print(f"{name:<16} {value:.4f}" if isinstance(value, float) else f"{name:<16} {value}")
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def named(written: str) -> tuple[str, str, str]:
    """(path, name of the data, kind) of a word of the command line."""
    from l3m_like.core.errors import UserError

    path, *words = written.split(":")
    name, kind, *more = (*words, "", "") if len(words) < 2 else words
    if any(more):
        raise UserError(f"{written}: it has {len(words) + 1} parts; write PATH, PATH:NAME or PATH:NAME:gaussians.")
    if kind and not name:
        raise UserError(f"{written}: the name of the data is missing; write {path}:NAME:{kind}.")
    if kind not in ("", "gaussians"):
        raise UserError(f"{written}: after the name of the data stands nothing or 'gaussians', not '{kind}'.")
    if not Path(path).exists():
        raise UserError(f"{written}: there is no {path}. Give a run, a folder of pictures or an .npz file.")
    return path, name, kind


def pictures(written: str, args: argparse.Namespace, mesh: Any) -> Any:
    """The set of pictures that a word of the command line names."""
    from l3m_like import load
    from l3m_like.config import RunConfig
    from l3m_like.core.errors import UserError, did_you_mean
    from l3m_like.evaluations.pictures import Pictures, of_dataset, of_files, of_gaussians

    path, name, kind = named(written)
    config = Path(path) / "config.yaml" if Path(path).is_dir() else Path(path)
    if name:
        cfg = RunConfig.from_file(config)
        places = {"train": "data.train"} | {n: f"evals.{n}.data" for n, e in cfg.evals.items() if e.data is not None}
        if name not in places:
            raise UserError(f"{written}: there is no such data. {did_you_mean(name, places)}")
        make = of_gaussians if kind else of_dataset
        return make(cfg.instantiate(places[name]), args.batch, mesh, args.samples)
    if not config.is_file() or config.suffix != ".yaml":
        return of_files(Path(path), args.batch, mesh, args.samples)
    overrides = [f"sample.{setting}" for setting in args.settings]
    overrides += [] if args.samples is None else [f"sample.num_samples={args.samples}"]
    loaded = load(path, step=args.step, ema=args.ema, overrides=overrides, mesh=mesh)
    sampler = loaded.config.instantiate("sample")
    if not hasattr(sampler, "chunks"):
        raise UserError(f"{written}: its sampler, {type(sampler).__name__}, makes no pictures.")
    label = None if getattr(sampler, "embeddings", None) else getattr(sampler, "label", None)  # else numbers of texts
    return Pictures(sampler.num_samples, sampler.chunks(loaded.model, mesh), label)


if __name__ == "__main__":
    sys.exit(main())
