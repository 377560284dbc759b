"""The quickstart: train two tiny models on the shipped data, sample from both, and measure what they have learned.

    bash run/quickstart.sh [--scale 0.1] [--out FOLDER]        (this file, in an environment that it makes)

Two claims are measured on held-out data, and the exit code is 1 if one fails at full scale:
  text    the language model's loss per byte is below that of a smoothed bigram model fitted to the same bytes;
  images  a classifier trained on the same 9,000 images knows >= 85 % of the held-out ones, and gives >= 80 % of the generated
          images the class that they were asked to show.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a clone runs without being installed

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import l3m_like  # noqa: E402
from l3m_like.config import RunConfig  # noqa: E402
from l3m_like.data import Dataset, EvalLoader  # noqa: E402
from l3m_like.generate import Images, grid  # noqa: E402

SAMPLES = 300  # generated images that the classifier judges
PER_CLASS = 10  # of them in the picture
CLASSIFIER_EPOCHS = 5
REAL_AT_LEAST, GENERATED_AT_LEAST = 0.85, 0.80
CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
PROMPTS = ("ROMEO:", "HAMLET:\nTo be")


@dataclass(frozen=True)
class Claims:
    """What was measured. Losses are in nats per symbol; ``symbols`` are the bytes and ends of documents that were predicted."""

    model_loss: float
    bigram_loss: float
    symbols: int
    real_accuracy: float
    generated_accuracy: float
    generated: int

    @property
    def text_holds(self) -> bool:
        return self.model_loss < self.bigram_loss

    @property
    def images_hold(self) -> bool:
        return self.real_accuracy >= REAL_AT_LEAST and self.generated_accuracy >= GENERATED_AT_LEAST

    def __str__(self) -> str:
        verdict = {True: "holds", False: "FAILS"}
        bits = 1 / math.log(2)
        return (
            f"text    {verdict[self.text_holds]}: on the same {self.symbols:,} held-out bytes the model needs "
            f"{self.model_loss:.3f} nats ({self.model_loss * bits:.3f} bits) per byte,\n"
            f"        a smoothed bigram model {self.bigram_loss:.3f} nats ({self.bigram_loss * bits:.3f} bits).\n"
            f"images  {verdict[self.images_hold]}: a classifier knows {self.real_accuracy:.1%} of the 1,000 held-out images "
            f"(needed: {REAL_AT_LEAST:.0%}),\n"
            f"        and sees the wanted class in {self.generated_accuracy:.1%} of {self.generated} generated ones "
            f"(needed: {GENERATED_AT_LEAST:.0%})."
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scale",
        type=float,
        default=float(os.environ.get("QUICKSTART_SCALE", "1")),
        help="of the number of training steps (default: QUICKSTART_SCALE or 1); below 1 the claims are only printed",
    )
    parser.add_argument(
        "--out", type=Path, help="a new folder for the results (default: runs/quickstart, or the next free number)"
    )
    args = parser.parse_args(argv)
    if not 0 < args.scale <= 1:
        parser.error(f"--scale is {args.scale}; it is above 0 and at most 1")
    out = args.out or new_folder(Path("runs") / "quickstart")
    stages = Stages(6)

    stages.begin("Train a tiny image model (a SiT) on 9,000 pictures of clothes")
    sit = train("sit", out, args.scale)
    samples = scaled(SAMPLES, args.scale, at_least=PER_CLASS * len(CLASSES))
    stages.begin(f"Generate {samples} images, each of a given class")
    images = generate_images(sit, samples)
    picture = labelled_grid(images, out / "samples.png")
    print(f"The first {PER_CLASS} of each class: {picture}")
    stages.begin("Train a classifier on the same pictures, to judge the generated ones")
    real_accuracy, generated_accuracy = judge_images(sit, images, epochs=scaled(CLASSIFIER_EPOCHS, args.scale, at_least=1))
    print(f"It knows {real_accuracy:.1%} of the held-out pictures, and {generated_accuracy:.1%} of the generated ones.")

    stages.begin("Train a tiny language model on the bytes of Shakespeare")
    llm = train("llm", out, args.scale)
    stages.begin("Let it write")
    print(l3m_like.load(llm).generate(prompts=list(PROMPTS), max_new_tokens=scaled(300, args.scale, at_least=40)))
    stages.begin("Compare it with a bigram model on held-out text")
    model_loss, bigram_loss, symbols = judge_text(llm)
    claims = Claims(model_loss, bigram_loss, symbols, real_accuracy, generated_accuracy, len(images.labels))
    holds = claims.text_holds and claims.images_hold
    summary = asdict(claims) | {"scale": args.scale, "seconds": stages.seconds(), "holds": holds}
    (out / "claims.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")

    print(f"\n{claims}")
    if args.scale < 1:
        print(f"(At {args.scale:g} of the steps neither is expected.)")
    print(what_next(out, picture))
    return 0 if holds or args.scale < 1 else 1


class Stages:
    """Headlines with the time since the start."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.number = 0
        self.started = time.perf_counter()

    def begin(self, title: str) -> None:
        self.number += 1
        seconds = int(self.seconds())
        print(f"\n[{seconds // 60}:{seconds % 60:02d}] {self.number}/{self.count}  {title}", flush=True)

    def seconds(self) -> float:
        return time.perf_counter() - self.started


def scaled(number: int, scale: float, *, at_least: int) -> int:
    return max(at_least, round(number * scale))


def new_folder(wanted: Path) -> Path:
    """``wanted``, or with the first number behind it that is free: every quickstart is a run of its own."""
    number, folder = 1, wanted
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}_{number}")
    return folder


def train(experiment: str, out: Path, scale: float) -> Path:
    """Train a shipped experiment by the launcher, as anybody would; returns the run's directory."""
    config = ROOT / "configs" / "experiment" / f"{experiment}.yaml"
    overrides = [f"run.dir={out}", "log.every=50"]
    if scale < 1:
        steps = RunConfig.from_file(config).steps
        assert steps is not None
        overrides += [f"steps={scaled(steps, scale, at_least=2)}"]
    command = [sys.executable, str(ROOT / "run" / "launcher.py"), "--config", str(config), *overrides]
    print("$ " + shlex.join(["python", *(os.path.relpath(part) if part.startswith(str(ROOT)) else part for part in command[1:])]))
    sys.stdout.flush()
    status = subprocess.run(command).returncode
    if status:
        sys.exit(status)  # the launcher has said what is wrong
    return out / experiment


# ---- images ------------------------------------------------------------------------------------------------------------


def generate_images(run: Path, number: int) -> Images:
    """``number`` images of the classes 0 .. 9 in turn, by the averaged weights and the run's own sampler."""
    images = l3m_like.load(run, ema=True).generate(num_samples=number, batch=100)
    assert isinstance(images, Images)
    return images


def labelled_grid(images: Images, path: Path) -> Path:
    """A PNG with one row per class, its name on the left."""
    from PIL import Image, ImageDraw, ImageFont

    scale, margin = 2, 110
    order = [int(i) for label in range(len(CLASSES)) for i in (images.labels == label).nonzero().flatten()[:PER_CLASS]]
    pixels = grid(images.images[order], columns=PER_CLASS)[..., 0]
    samples = Image.fromarray(pixels).resize((pixels.shape[1] * scale, pixels.shape[0] * scale), Image.Resampling.NEAREST)
    picture = Image.new("L", (margin + samples.width, samples.height), 255)
    picture.paste(samples, (margin, 0))
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(CLASSES):
        middle = (row + 0.5) * samples.height / len(CLASSES)
        draw.text((margin - 8, middle), name, fill=0, anchor="rm", font=ImageFont.load_default(size=16))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


def judge_images(run: Path, images: Images, epochs: int) -> tuple[float, float]:
    """Fractions that a classifier gives the right class: of the real held-out images, and of the generated ones."""
    cfg = RunConfig.from_file(run / "config.yaml")
    classifier = train_classifier(*pictures(cfg.instantiate("data.train")), epochs=epochs)
    real = accuracy(classifier, *pictures(cfg.instantiate("evals.heldout.data")))
    return real, accuracy(classifier, images.images.clamp(-1, 1), images.labels)


def pictures(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """All of a dataset: images [N, 1, 28, 28] in [-1, 1], labels [N]."""
    batches = [batch for batch, _ in EvalLoader(dataset, batch=1000)]
    return torch.cat([batch["image"] for batch in batches]), torch.cat([batch["image_label"] for batch in batches])


def train_classifier(images: Tensor, labels: Tensor, epochs: int, batch: int = 100) -> nn.Module:
    """A small convolutional network, trained with mirrored copies and a learning rate that rises and falls once."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 64)):  # 28 -> 14 -> 7 -> 3 pixels
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(outputs), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 3 * 3, len(CLASSES)))
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    per_epoch = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=epochs * per_epoch)
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for number in range(per_epoch):
            rows = order[number * batch : (number + 1) * batch]
            flip = torch.rand(batch, 1, 1, 1) < 0.5
            loss = F.cross_entropy(network(torch.where(flip, images[rows].flip(-1), images[rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    right = [network(part).argmax(-1) == wanted for part, wanted in zip(images.split(250), labels.split(250), strict=True)]
    return float(torch.cat(right).double().mean())


# ---- text --------------------------------------------------------------------------------------------------------------


def judge_text(run: Path) -> tuple[float, float, int]:
    """``(the model's loss, the bigram model's, symbols)``: nats per symbol over the same held-out symbols.

    Both predict, in each document, all bytes after the first one and then the end-of-document symbol: as many symbols as the
    document has bytes.
    """
    loaded = l3m_like.load(run, device="cpu")
    train, heldout = loaded.config.instantiate("data.train"), loaded.config.instantiate("evals.heldout.data")
    total, symbols = 0.0, 0
    for batch, _ in EvalLoader(heldout, batch=16):
        logits, targets = loaded(batch)["text_logits"].flatten(0, 1), batch["text_targets"].flatten()
        total += float(F.cross_entropy(logits.double(), targets, ignore_index=-100, reduction="sum"))
        symbols += int((targets != -100).sum())
    bigram = Bigram.fit(documents(train), train.process.tokenizer.vocab_size)
    test = documents(heldout)
    if symbols != sum(len(document) - 1 for document in test):
        raise RuntimeError(f"the model predicted {symbols} symbols, which are not those of the documents")
    return total / symbols, bigram.loss(test), symbols


def documents(dataset: Dataset) -> list[np.ndarray]:
    """Token ids of each document, with its end."""
    return [dataset.item(index).data["ids"] for index in range(len(dataset))]


class Bigram:
    """P(b | a) = (count(a b) + k P(b)) / (count(a) + k), with P(b) = (count(b) + 1) / (total + V): add-k smoothing in which
    the added counts are shared out as the symbols are (MacKay and Peto, 1995)."""

    def __init__(self, pairs: np.ndarray, k: float) -> None:
        """``pairs`` [V, V]: how often each symbol follows each."""
        follow = pairs.sum(0)
        single = (follow + 1) / (follow.sum() + len(follow))
        self.chances = (pairs + k * single) / (pairs.sum(1, keepdims=True) + k)

    @classmethod
    def fit(cls, texts: Sequence[np.ndarray], symbols: int) -> Bigram:
        """Fitted to ``texts``; k is the best for every 10th of them under the model of the others."""
        rest, aside = pair_counts((t for i, t in enumerate(texts) if i % 10), symbols), pair_counts(texts[::10], symbols)
        losses = {k: cls(rest, k).loss_of(aside) for k in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)}
        return cls(rest + aside, min(losses, key=lambda k: losses[k]))

    def loss(self, texts: Iterable[np.ndarray]) -> float:
        """Nats per symbol."""
        return self.loss_of(pair_counts(texts, len(self.chances)))

    def loss_of(self, pairs: np.ndarray) -> float:
        return float(-(pairs * np.log(self.chances)).sum() / pairs.sum())


def pair_counts(texts: Iterable[np.ndarray], symbols: int) -> np.ndarray:
    """[V, V]: how often b follows a within a text."""
    pairs = np.concatenate([text[:-1] * symbols + text[1:] for text in texts])
    return np.bincount(pairs, minlength=symbols**2).reshape(symbols, symbols)


def what_next(out: Path, picture: Path) -> str:
    return f"""
What to look at next
  {picture}
      the generated clothes, one row per class
  {out / "sit" / "report.html"}, {out / "llm" / "report.html"}
      the curves of both runs; the numbers are in metrics.jsonl beside them
  source .venv/bin/activate
      unless an environment of yours was active
  python run/sample.py --run {out / "sit"} --ema guidance=4 num_samples=100
  python run/sample.py --run {out / "llm"} 'prompts=["To be, "]' temperature=0.6
      sample again, with other settings
  python run/launcher.py --config configs/experiment/llm.yaml run.name=wider dim=192 lr=3e-3
      change a knob: the first lines of the YAML are the knobs, and --check shows what they would do
  README.md, docs/configs.md, docs/add_a_block.md
      what else there is, every setting, and how to add a model of your own
"""


if __name__ == "__main__":
    sys.exit(main())
