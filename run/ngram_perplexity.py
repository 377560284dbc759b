"""How much do texts of a run look like its data? The perplexity of its samples under an n-gram model of the training text.

    python run/ngram_perplexity.py --runs runs/llm runs/dllm --samples 8 temperature=1

The n-gram model knows nothing of the runs: it is counted from the source of `data.train`. Beside the runs stand held-out text
(`evals.heldout`), unigram samples, and distinct-n, the share of n-grams that are not repetitions: text that repeats itself has
a low perplexity and a low distinct-n. What follows the options are settings of the runs' samplers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PROMPTS = ["ROMEO:\n", "What", "The king ", "[Enter "]


class NGram:
    """Interpolated n-gram model with Witten-Bell smoothing (Witten and Bell, 1991; Chen and Goodman, 1999, section 2.5):
    P(w | h) = (c(h w) + T(h) P(w | shorter h)) / (c(h) + T(h)), T(h) the number of different tokens seen after h.

    Args:
        documents: token arrays [T], each counted apart.
        vocab_size: V; the shortest history is a uniform distribution over it.
        order: n; V^n must fit int64.
    """

    def __init__(self, documents: Sequence[np.ndarray], vocab_size: int, order: int = 5) -> None:
        self.vocab_size, self.order = vocab_size, order
        self.counts: list[tuple[np.ndarray, np.ndarray]] = []
        self.contexts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for n in range(1, order + 1):
            grams, counts = np.unique(np.concatenate([self._grams(doc, n) for doc in documents]), return_counts=True)
            contexts, first = np.unique(grams // vocab_size, return_index=True)
            self.counts.append((grams, counts))
            self.contexts.append((contexts, np.add.reduceat(counts, first), np.diff(np.append(first, len(grams)))))

    def _grams(self, tokens: np.ndarray, n: int) -> np.ndarray:
        """The n-grams of ``tokens`` as numbers in base V, one per place from n - 1 on."""
        windows = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens, dtype=np.int64), n) if len(tokens) >= n else ()
        return np.asarray(windows, dtype=np.int64).reshape(-1, n) @ self.vocab_size ** np.arange(n - 1, -1, -1, dtype=np.int64)

    def probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """P of every token [T] given those before it."""
        chances = np.full(len(tokens), 1.0 / self.vocab_size)
        for n in range(1, min(self.order, len(tokens)) + 1):
            grams = self._grams(tokens, n)
            count = _look_up(grams, *self.counts[n - 1])
            total, types = (_look_up(grams // self.vocab_size, self.contexts[n - 1][0], x) for x in self.contexts[n - 1][1:])
            known = total > 0
            better = (count + types * chances[n - 1 :]) / np.maximum(total + types, 1)
            chances[n - 1 :] = np.where(known, better, chances[n - 1 :])
        return chances

    def perplexity(self, texts: Iterable[tuple[Sequence[int], Sequence[int]]]) -> float:
        """exp of the mean negative log-likelihood per token of continuations, given (what stands before, continuation)."""
        chances = [self.probabilities(np.array([*before, *new], dtype=np.int64))[len(before) :] for before, new in texts]
        return float(np.exp(-np.log(np.concatenate(chances)).mean()))


def _look_up(wanted: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``values`` at ``wanted`` among the sorted ``keys``, 0 where it is not among them."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams of all texts over their number (Li et al., arXiv:1510.03055)."""
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def tokens_of(dataset: Any) -> list[np.ndarray]:
    """The documents of a dataset, tokenized."""
    return [item.data["ids"] for item in dataset.items(0)]


def samples_of(run: str | Path, settings: Mapping[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts, continuations) of a run as token lists."""
    from l3m_like import load

    loaded = load(run)
    texts = loaded.generate(prompts=PROMPTS, end=False, **settings)
    process = loaded.config.instantiate("data.train").process
    return [process.encode(prompt) for prompt in PROMPTS for _ in range(settings["num_samples"])], texts.tokens


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, help="directories of runs on the same data")
    parser.add_argument("--samples", type=int, default=8, help="per prompt (there are four)")
    parser.add_argument("--tokens", type=int, default=128, help="per sample")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of the samplers")
    args = parser.parse_intermixed_args(argv)

    import yaml

    from l3m_like import load

    settings = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in args.settings)}
    cfg = load(args.runs[0]).config
    train = tokens_of(cfg.instantiate("data.train"))
    heldout = [doc[: args.tokens] for doc in tokens_of(cfg.instantiate("evals.heldout.data"))]
    vocab_size = 1 + max(int(doc.max()) for doc in [*train, *heldout])
    ngram = NGram(train, vocab_size)
    count = args.samples * len(PROMPTS)
    unigram = np.bincount(np.concatenate(train), minlength=vocab_size) / sum(map(len, train))
    drawn = np.random.default_rng(0).choice(vocab_size, size=(count, args.tokens), p=unigram).tolist()
    rows = {"held-out text": ([[]] * len(heldout), heldout), "unigram samples": ([[]] * count, drawn)}
    for run in args.runs:
        rows[str(run)] = samples_of(run, {"num_samples": args.samples, "max_new_tokens": args.tokens} | settings)
    print(f"{'':30s} perplexity  distinct-2  distinct-4")
    for name, (before, new) in rows.items():
        perplexity = ngram.perplexity(zip(before, new, strict=True))
        some = [list(text) for text in new[:count]]  # distinct-n falls with the amount of text
        print(f"{name[-30:]:30s} {perplexity:10.2f}  {distinct(some, 2):10.3f}  {distinct(some, 4):10.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
