"""Logits exist for the tokens alone that somebody asks about, and few at a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from l3m_like.data import Tokenize
from l3m_like.generate import Autoregressive, MaskedDiffusion, harness
from l3m_like.training.load import Loaded
from tests.generate.tiny import OVERRIDES, tiny

BYTES = Tokenize("bytes", vocab_size=257)
PROMPTS = ["a" * 150, "b" * 140]
#: the model's width: the output matrix, transposed, is as many rows of V numbers
WIDTH = int(OVERRIDES["llm"][0].removeprefix("dim="))


class Rows(TorchDispatchMode):
    """The most rows of a vocabulary (257 bytes, 258 with a mask) that a tensor has had."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.shape[-1:] in ((257,), (258,)):
                self.most = max(self.most, tensor.numel() // tensor.shape[-1])
        return out


def most(run) -> int:
    with Rows() as rows:
        run()
    return rows.most


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return tiny("llm")


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
def test_of_a_prompt_the_last_token_has_logits(loaded, cache) -> None:
    sampler = Autoregressive(PROMPTS, 2, greedy=True, cache=cache)
    assert most(lambda: sampler.run(loaded.model, process=BYTES)) == WIDTH


@pytest.mark.parametrize("kind", ["dllm", "block_diffusion"])
def test_of_masks_those_of_the_window_have_logits(kind) -> None:
    loaded = tiny(kind)
    sampler = MaskedDiffusion(PROMPTS, 32, 257, block=16, steps=1, into="paired" if kind == "block_diffusion" else None)
    assert most(lambda: sampler.run(loaded.model, process=BYTES)) == 2 * 16


def test_likelihoods_of_long_texts(loaded, monkeypatch) -> None:
    asked = [SimpleNamespace(args=(text,)) for text in PROMPTS]
    asking = harness.Harness(loaded.model, BYTES, max_length=64, batch=2)
    whole = asking.loglikelihood_rolling(asked)
    monkeypatch.setattr(harness, "_TOKENS", 10)
    assert most(lambda: asking.loglikelihood_rolling(asked)) == WIDTH
    assert asking.loglikelihood_rolling(asked) == pytest.approx(whole, rel=1e-12)
