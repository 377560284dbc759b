"""What lm-evaluation-harness asks for, against one plain forward per request."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from l3m_like.core import UserError
from l3m_like.data import Tokenize
from l3m_like.distributed.mesh import build_mesh
from l3m_like.generate.harness import Harness
from tests.distributed.pool import run as on_ranks
from tests.generate.tiny import tiny

BYTES = Tokenize("bytes", vocab_size=257)
PAIRS = [("To be, or not", " to be"), ("ROMEO: ", "what"), ("", "a"), ("x" * 30, "y" * 5), ("A", " horse, a horse")]
TEXTS = ["But soft, what light through yonder window breaks", "ab", "exactly twenty bytes", ""]
WINDOW = 20


def asked(harness: Harness) -> tuple[list, list]:
    pairs = [SimpleNamespace(args=pair) for pair in PAIRS]
    return harness.loglikelihood(pairs), harness.loglikelihood_rolling([SimpleNamespace(args=(text,)) for text in TEXTS])


def on_mesh(axes: dict[str, int]) -> tuple[list, list]:
    return asked(Harness(tiny("llm").model, BYTES, max_length=WINDOW, batch=2, mesh=build_mesh(axes)))


@pytest.fixture(scope="module")
def loaded():
    return tiny("llm")


def plain(loaded, given: list[int], new: list[int]) -> tuple[float, bool]:
    """Of ``new`` behind as much of ``given`` as fits into a window."""
    row = [*given, *new][-(WINDOW + 1) :]
    logs = loaded({"text_ids": torch.tensor([row[:-1]])})["text_logits"][0].log_softmax(-1)[-len(new) :]
    return float(logs[range(len(new)), new].sum()), logs.argmax(-1).tolist() == new


def test_likelihoods(loaded) -> None:
    harness = Harness(loaded.model, BYTES, max_length=WINDOW, batch=2)
    found, rolling = asked(harness)
    for (context, text), (score, greedy) in zip(PAIRS, found, strict=True):
        stripped = context.rstrip()
        given, new = BYTES.encode(stripped) or [256], BYTES.encode(context[len(stripped) :] + text)
        assert (score, greedy) == (pytest.approx(plain(loaded, given, new)[0], rel=1e-10), plain(loaded, given, new)[1])
    for text, score in zip(TEXTS, rolling, strict=True):
        tokens = [256, *BYTES.encode(text)]
        windows = harness.windows(tokens[1:])
        assert [token for _, new in windows for token in new] == tokens[1:]  # each once
        assert all(len(given) + len(new) - 1 == min(WINDOW, len(tokens) - 1) for given, new in windows)
        assert score == pytest.approx(sum(plain(loaded, given, new)[0] for given, new in windows), rel=1e-10)
    best = loaded({"text_ids": torch.tensor([BYTES.encode("To be")])})["text_logits"][0, -1].argmax()
    if best < 128:  # the likeliest token, where it is a text
        assert harness.loglikelihood([SimpleNamespace(args=("To be", chr(best)))])[0][1]


def test_ranks_share_the_work(loaded) -> None:
    expected = asked(Harness(loaded.model, BYTES, max_length=WINDOW, batch=3))
    for likelihoods, rolling in on_ranks(2, on_mesh, {"dp_shard": 2}):
        for (a, greedy), (b, same) in zip(likelihoods, expected[0], strict=True):
            assert a == pytest.approx(b, rel=1e-10) and greedy == same
        assert rolling == pytest.approx(expected[1], rel=1e-10)


def test_continuations() -> None:
    loaded = tiny("llm")
    with torch.no_grad():
        for parameter in loaded.model.trunk.parameters():
            parameter *= 3  # smaller weights say one word for ever
    harness = Harness(loaded.model, BYTES, max_length=64, batch=2)
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False}
    free = harness.generate_until([SimpleNamespace(args=(text, settings)) for text in ("To be", "A", "O")])
    stop = free[1][2]
    cut = settings | {"until": [stop]}
    mixed = [SimpleNamespace(args=args) for args in (("To be", settings), ("A", cut), ("O", settings))]
    assert harness.generate_until(mixed) == [free[0], free[1].partition(stop)[0], free[2]]
    assert len(set(free)) == 3 and 0 < len(free[1].partition(stop)[0]) < len(free[1])


def test_what_does_not_fit(loaded) -> None:
    with pytest.raises(UserError, match="processor with a tokenizer"):
        Harness(loaded.model, None, max_length=8)
    with pytest.raises(UserError, match="max_length is 1"):
        Harness(loaded.model, BYTES, max_length=1)
    with pytest.raises(UserError, match="no token of a prompt is left"):
        Harness(loaded.model, BYTES, max_length=8)._texts(["a"], {"max_gen_toks": 8})
