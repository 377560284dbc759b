"""The n-gram yardstick against its definition, and a tiny diffusion model and its autoregressive twin measured by it."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest

import l3m_like
from l3m_like.config import RunConfig

ROOT = Path(__file__).parents[2]


def script():
    spec = importlib.util.spec_from_file_location("ngram_perplexity", ROOT / "run" / "ngram_perplexity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NGRAMS = script()


def by_definition(documents: list[list[int]], vocab_size: int, history: list[int], token: int) -> float:
    """Witten-Bell, from the longest history to none."""
    n = len(history)
    after = [doc[i + n] for doc in documents for i in range(len(doc) - n) if doc[i : i + n] == history]
    shorter = by_definition(documents, vocab_size, history[1:], token) if history else 1 / vocab_size
    return (after.count(token) + len(set(after)) * shorter) / (len(after) + len(set(after))) if after else shorter


def test_ngram_model_is_its_definition() -> None:
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, 4, size=n).tolist() for n in (30, 2, 17)]
    ngram = NGRAMS.NGram([np.array(doc) for doc in documents], 5, order=3)
    text = draw.integers(0, 5, size=20).tolist()
    expected = [by_definition(documents, 5, text[max(0, i - 2) : i], token) for i, token in enumerate(text)]
    assert np.allclose(ngram.probabilities(np.array(text)), expected, rtol=1e-12)
    chances = [ngram.probabilities(np.array([1, 2, token]))[-1] for token in range(5)]
    assert abs(sum(chances) - 1) < 1e-12
    perplexity = np.exp(-np.log(expected[5:]).mean())
    assert abs(ngram.perplexity([(text[:5], text[5:])]) - perplexity) < 1e-9
    assert NGRAMS.distinct([[1, 1, 1, 1], [1, 2]], 2) == 2 / 4


#: a document is written in one of these alphabets
ALPHABETS = ("ab", "cd", "ef", "gh", "ij", "kl")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Letters of the document's alphabet: what to write follows from any of the tokens that are known."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = ["".join(draw.choices(draw.choice(ALPHABETS), k=31)) for _ in range(240)]
    splits = ["heldout" if i % 6 == 0 else "train" for i in range(240)]
    path.write_text("".join(json.dumps({"text": t, "split": s}) + "\n" for t, s in zip(lines, splits, strict=True)))
    return path


@pytest.mark.timeout(300)  # ten seconds of one core
@pytest.mark.slow
def test_tiny_diffusion_model_writes_as_well_as_its_autoregressive_twin(texts, tmp_path, monkeypatch, capsys) -> None:
    """Same blocks, data and steps; full size: docs/diffusion_lm.md."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("l3m_like.training.report.write_report", lambda *args: None)  # a second of matplotlib
    size = ["dim=48", "heads=2", "kv_heads=1", "head_dim=24", "mlp_dim=96", "sequence=32", "lr=1e-2", f"text={texts}"]
    quiet = ["log.console=false", "checkpoint.every=null", "evals.heldout.every=null", "evals.heldout.samples=1"]
    for name, steps in (("llm", 40), ("dllm", 120)):
        l3m_like.train(RunConfig.from_file(ROOT / "configs" / "experiment" / f"{name}.yaml", [*size, *quiet, f"steps={steps}"]))
    capsys.readouterr()
    monkeypatch.setattr(NGRAMS, "PROMPTS", ["ab", "jiji"])
    settings = ["--samples", "3", "--tokens", "24", "temperature=1", "top_p=null"]
    assert NGRAMS.main(["--runs", "runs/llm", "runs/dllm", *settings]) == 0
    rows = {line[:30].strip(): float(line.split()[-3]) for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows["held-out text"] < 3 and rows["unigram samples"] > 50
    assert rows["runs/dllm"] <= 2 * rows["runs/llm"] and rows["runs/dllm"] <= 0.3 * rows["unigram samples"]
