"""What the quickstart measures, each against a slower or known answer; .ci/run runs the whole of it at a tenth of its steps."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from l3m_like.config import RunConfig
from l3m_like.generate import Images
from l3m_like.training.load import Loaded
from l3m_like.training.load import load as real_load
from tests.generate.tiny import save_run

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "run"))

import quickstart  # noqa: E402
import requirements  # noqa: E402

# ---- the bigram model ----------------------------------------------------------------------------------------------------


def test_bigram_is_the_formula() -> None:
    texts = [np.array([0, 1, 1, 2]), np.array([1, 0])]
    model = quickstart.Bigram(quickstart.pair_counts(texts, 3), k=2.0)
    follow = [1, 2, 1]  # how often each symbol follows another: 0 1, 1 1, 1 2 and 1 0
    single = [(n + 1) / (4 + 3) for n in follow]
    pairs = {(0, 1): 1, (1, 1): 1, (1, 2): 1, (1, 0): 1}
    after = {0: 1, 1: 3, 2: 0}
    for a in range(3):
        for b in range(3):
            wanted = (pairs.get((a, b), 0) + 2.0 * single[b]) / (after[a] + 2.0)
            assert model.chances[a, b] == pytest.approx(wanted)
    assert np.allclose(model.chances.sum(1), 1.0)
    probabilities = [model.chances[2, 1], model.chances[1, 1], model.chances[1, 0]]
    assert model.loss([np.array([2, 1, 1, 0])]) == pytest.approx(-sum(map(math.log, probabilities)) / 3)


def test_bigram_is_no_straw_man() -> None:
    """Fitted to enough text of a known chain it comes close to the chain's own entropy, and its k beats a careless one."""
    generator = np.random.default_rng(0)
    chain = generator.dirichlet(np.full(20, 0.3), size=20)
    cumulative = chain.cumsum(1)

    def text(length: int) -> np.ndarray:
        symbols = [0]
        for draw in generator.random(length):
            symbols.append(min(int(np.searchsorted(cumulative[symbols[-1]], draw)), 19))
        return np.array(symbols)

    train, test = [text(300) for _ in range(40)], [text(3000)]
    model = quickstart.Bigram.fit(train, 20)
    pairs = quickstart.pair_counts(test, 20)
    entropy = -(pairs * np.log(np.maximum(chain, 1e-12))).sum() / pairs.sum()
    assert entropy < model.loss(test) < entropy + 0.03
    assert model.loss(test) < quickstart.Bigram(quickstart.pair_counts(train, 20), k=300.0).loss(test) - 0.05


# ---- the language model ----------------------------------------------------------------------------------------------------


def test_text_is_judged_on_the_same_symbols(tmp_path: Path) -> None:
    """The model's loss is what training reports; every byte but the first of a document and every end counts once."""
    run = save_run(tmp_path / "llm", "llm", precision="fp32")
    loss, bigram, symbols = quickstart.judge_text(run)
    records = map(json.loads, (ROOT / "l3m_like/data/shipped/shakespeare.jsonl").read_text(encoding="utf-8").splitlines())
    assert symbols == sum(len(record["text"].encode()) for record in records if record["split"] == "heldout")
    assert 4 < loss < 9  # a model that knows nothing: about log 257 = 5.5, and more after the perturbation of its weights
    assert 2.4 < bigram < 2.6


def test_text_is_not_judged_on_other_symbols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(tmp_path / "llm", "llm", precision="fp32")
    whole = quickstart.documents
    monkeypatch.setattr(quickstart, "documents", lambda dataset: whole(dataset)[:-1])
    with pytest.raises(RuntimeError, match="not those of the documents"):
        quickstart.judge_text(run)


# ---- the images ------------------------------------------------------------------------------------------------------------


def test_samples_and_their_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes come in turn; the averaged weights of the run are asked for."""
    asked = {}

    def load(run: Path, ema: bool) -> Loaded:
        asked.update(run=run, ema=ema)
        return real_load(ROOT / "configs/experiment/sit.yaml", overrides=["layers=1", "dim=16", "heads=2", "sample.steps=2"])

    monkeypatch.setattr(quickstart.l3m_like, "load", load, raising=False)
    images = quickstart.generate_images(tmp_path / "sit", 100)
    assert asked == {"run": tmp_path / "sit", "ema": True}
    assert images.images.shape == (100, 1, 28, 28)
    assert images.labels.bincount().tolist() == [10] * 10
    path = quickstart.labelled_grid(images, tmp_path / "new" / "samples.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_picture_has_a_row_per_class(tmp_path: Path) -> None:
    """Images of one shade per class: the row of class c has its shade, whatever order they come in."""
    from PIL import Image

    labels = torch.arange(100).flip(0) % 10
    shades = (labels / 9 * 2 - 1).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    path = quickstart.labelled_grid(Images(shades, labels, columns=10), tmp_path / "samples.png")
    pixels = np.asarray(Image.open(path))
    for row in range(10):
        middle = pixels[row * 60 + 28, 110:]  # 28 + 2 pixels a row, drawn twice as large
        assert set(middle.tolist()) <= {round(row / 9 * 255), 255}
    assert (pixels[:, :100] < 128).any()  # the names


def test_classifier_learns_what_is_easy_and_does_not_guess() -> None:
    """Five shades in the upper half, times two in the lower: all right on new ones, and about a tenth on shuffled labels."""
    generator = torch.Generator().manual_seed(0)

    def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(10, (count,), generator=generator)
        images = 0.3 * torch.randn(count, 1, 28, 28, generator=generator)
        images[:, :, :14] += (labels % 5 - 2.0).view(-1, 1, 1, 1)
        images[:, :, 14:] += (labels // 5 * 2 - 1.0).view(-1, 1, 1, 1)
        return images, labels

    network = quickstart.train_classifier(*batch(1000), epochs=3)
    images, labels = batch(500)
    assert quickstart.accuracy(network, images, labels) > 0.95
    assert quickstart.accuracy(network, images, labels[torch.randperm(500, generator=generator)]) < 0.25


def test_real_pictures() -> None:
    cfg = RunConfig.from_file(ROOT / "configs/experiment/sit.yaml")
    images, labels = quickstart.pictures(cfg.instantiate("evals.heldout.data"))
    assert images.shape == (1000, 1, 28, 28)
    assert labels.bincount().tolist() == [100] * 10
    assert -1.0 <= float(images.min()) < -0.99 and 0.99 < float(images.max()) <= 1.0


# ---- what is said, and the exit code -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "text", "images"),
    [((1.7, 2.5, 100, 0.88, 0.9, 500), True, True), ((2.5, 2.5, 100, 0.84, 0.9, 500), False, False)],
)
def test_claims(values: tuple, text: bool, images: bool) -> None:
    claims = quickstart.Claims(*values)
    assert (claims.text_holds, claims.images_hold) == (text, images)
    assert str(claims).count("holds") == text + images
    assert str(claims).count("FAILS") == (not text) + (not images)
    assert not quickstart.Claims(1.7, 2.5, 100, 0.88, 0.79, 500).images_hold


@pytest.mark.parametrize(("scale", "generated", "code"), [("1", 0.9, 0), ("1", 0.7, 1), ("0.5", 0.7, 0)])
def test_exit_code(
    scale: str, generated: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A claim that fails fails the quickstart, at full scale only."""
    images = Images(torch.zeros(500, 1, 28, 28), torch.arange(500) % 10, columns=10)

    class Writer:
        def generate(self, **settings: object) -> str:
            return "To be"

    monkeypatch.setattr(quickstart, "train", lambda experiment, out, scale: out / experiment)
    monkeypatch.setattr(quickstart, "generate_images", lambda run, number: images)
    monkeypatch.setattr(quickstart, "judge_images", lambda run, images, epochs: (0.88, generated))
    monkeypatch.setattr(quickstart.l3m_like, "load", lambda run: Writer(), raising=False)
    monkeypatch.setattr(quickstart, "judge_text", lambda run: (1.7, 2.5, 53_000))
    out = tmp_path / "quickstart"
    assert quickstart.main(["--scale", scale, "--out", str(out)]) == code
    summary = json.loads((out / "claims.json").read_text())
    assert summary["generated_accuracy"] == generated and summary["holds"] == (generated > 0.8)
    said = capsys.readouterr().out
    assert str(out / "samples.png") in said and "report.html" in said and "README.md" in said


def test_every_quickstart_has_a_folder_of_its_own(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        folder = quickstart.new_folder(tmp_path / "quickstart")
        folder.mkdir()
        names.append(folder.name)
    assert names == ["quickstart", "quickstart_2", "quickstart_3"]


def test_training_is_the_launchers_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At full scale the config as it is; a failure (which the launcher has explained) ends the quickstart with its exit code."""
    commands = []

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, returncode=0 if len(commands) < 3 else 3)

    monkeypatch.setattr(quickstart.subprocess, "run", run)
    assert quickstart.train("sit", tmp_path, 1.0) == tmp_path / "sit"
    quickstart.train("llm", tmp_path, 0.1)
    with pytest.raises(SystemExit) as stopped:
        quickstart.train("sit", tmp_path, 0.1)
    assert stopped.value.code == 3
    assert commands[0][1:4] == [str(ROOT / "run/launcher.py"), "--config", str(ROOT / "configs/experiment/sit.yaml")]
    assert not any(word.startswith("steps=") for word in commands[0])
    steps = RunConfig.from_file(ROOT / "configs/experiment/llm.yaml").steps
    assert steps is not None and f"steps={steps // 10}" in commands[1]


@pytest.mark.parametrize("scale", ["0", "-1", "1.5"])
def test_bad_scale(scale: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        quickstart.main(["--scale", scale])
    assert stopped.value.code == 2
    assert "above 0 and at most 1" in capsys.readouterr().err


# ---- the environment ----------------------------------------------------------------------------------------------------------


def test_requirements_are_those_of_setup() -> None:
    assert {"torch", "hydra-core"} <= {name.split(">")[0].split("<")[0] for name in requirements.wanted()}
    assert "pytest" in requirements.wanted("dev")
    assert requirements.missing("dev") == []  # the tests run in such an environment
    with pytest.raises(SystemExit, match="no extra 'devel'"):
        requirements.wanted("devel")


@pytest.mark.parametrize(
    ("requirement", "found", "met"),
    [
        ("torch>=2.11", "2.13.0+cpu", True),
        ("torch>=2.11", "2.9.1", False),
        ("torch>=2.11", "2.11", True),
        ("torch>=2.11", "2.11.0", True),
        ("hydra-core>=1.3.2,<1.4", "1.3.8", True),
        ("hydra-core>=1.3.2,<1.4", "1.4.0", False),
        ("einops", "0.1", True),
        ("einops", None, False),
    ],
)
def test_versions(requirement: str, found: str | None, met: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "version_of", lambda name: found)
    assert requirements.is_met(requirement) is met


def test_an_existing_environment_is_taken_as_it_is(tmp_path: Path) -> None:
    """With PYTHON given nothing is made or installed, and the clone can be imported."""
    where = "import l3m_like; print(l3m_like.__file__)"
    shell = 'source run/environment.sh; environment dev; cd "$1"; exec "$PYTHON" -c "$2"'
    before = {path.name for path in ROOT.iterdir()}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", shell, "bash", str(tmp_path), where],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(ROOT / "l3m_like" / "__init__.py")
    assert {path.name for path in ROOT.iterdir()} <= before | {".venv"}  # (another test or a person may make that one)


def test_an_old_python_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["bash", "run/quickstart.sh"], cwd=ROOT, env={**os.environ, "PYTHON": str(old)}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert str(old) in done.stderr and "3.11" in done.stderr
