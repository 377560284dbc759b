"""Text generation: the cache changes nothing, and neither do padding and the rest of the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from l3m_like.core import MetaModel, ReadWriteBlock, UserError
from l3m_like.data import Tokenize
from l3m_like.distributed import compiled
from l3m_like.generate import Autoregressive, autoregressive
from l3m_like.generate.autoregressive import Endings, draw, probabilities
from l3m_like.training.load import Loaded
from tests.generate.tiny import PROMPTS, tiny

BYTES = Tokenize("bytes", vocab_size=257)


class Recording(Autoregressive):
    """Keeps the logits of every step, by row."""

    def run(self, *args, **kwargs):
        self.seen: dict[int, list[Tensor]] = {}
        return super().run(*args, **kwargs)

    def _draw(self, logits: Tensor, row: Tensor, position: Tensor) -> Tensor:
        for number, one in zip(row.tolist(), logits, strict=True):
            self.seen.setdefault(number, []).append(one)
        return super()._draw(logits, row, position)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return tiny("llm")


def record(loaded: Loaded, **settings) -> tuple[list[list[int]], dict[int, Tensor]]:
    sampler = Recording(PROMPTS, 12, end=False, **settings)
    tokens = sampler.run(loaded.model, process=BYTES).tokens
    return tokens, {row: torch.stack(steps) for row, steps in sampler.seen.items()}


@pytest.mark.parametrize("draws", [{"greedy": True}, {"temperature": 0.8, "top_p": 0.95, "top_k": 50}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("other", [{"cache": False}, {"batch": 1}, {"batch": 3}], ids=["no cache", "alone", "in threes"])
def test_cache_and_batch_change_nothing(loaded, draws, other) -> None:
    tokens, logits = record(loaded, **draws)
    tokens_other, logits_other = record(loaded, **draws, **other)
    assert tokens == tokens_other
    for row in range(len(PROMPTS)):
        assert float((logits[row] - logits_other[row]).abs().max()) < 1e-10 * max(1.0, float(logits[row].abs().max()))


def test_logits_are_those_of_the_whole_text(loaded) -> None:
    """Against one plain forward per row, without cache, padding or document ids."""
    tokens, logits = record(loaded)
    for row, prompt in enumerate(PROMPTS):
        ids = BYTES.encode(prompt) + tokens[row]
        whole = loaded({"text_ids": torch.tensor([ids])})["text_logits"][0]
        expected = whole[len(ids) - 13 : -1]  # the token at place p is drawn from the logits at p - 1
        assert float((logits[row] - expected).abs().max()) < 1e-10
        wrong = whole[len(ids) - 12 :]  # a shift by one place would be seen
        assert float((logits[row] - wrong).abs().max()) > 1e-3


@pytest.mark.parametrize("window", [1, 5], ids="window {}".format)
def test_windows_with_a_cache_are_exact(window) -> None:
    model = tiny("llm", f"+model.trunk.layer.mixer.window={window}")
    tokens, logits = record(model, greedy=True)
    tokens_other, logits_other = record(model, greedy=True, cache=False)
    assert tokens == tokens_other
    for row, steps in logits.items():
        assert float((steps - logits_other[row]).abs().max()) < 1e-10
    assert tokens != record(tiny("llm"), greedy=True)[0]


def test_a_step_is_one_graph_for_all_tokens_and_batches(loaded, monkeypatch) -> None:
    """Traced by the compiler and run as it is (the code that it would make is no matter of shapes)."""
    made = []

    class Kept(compiled.Graphs):
        def __init__(self, limit: int | None) -> None:
            super().__init__(limit=1, backend="eager")
            made.append(self)

    monkeypatch.setattr(autoregressive, "Graphs", Kept)
    prompts = ["ROMEO:", "To be, or not", "a", "Thou art"]
    expected = Autoregressive(prompts, 12, end=False, batch=2).run(loaded.model, process=BYTES).tokens
    sampler = Autoregressive(prompts, 12, end=False, batch=2, compile=True)
    for _ in range(2):
        assert sampler.run(loaded.model, process=BYTES).tokens == expected
    assert made[0].counts == {"TransformerLayer": {"training": 0, "evaluation": 1}}
    assert all("forward" not in vars(unit) for unit in loaded.model.trunk.layers)


def test_greedy_tokens_are_those_of_transformers() -> None:
    """Four prompts of unequal length, with the weights of a Qwen3 of the same size."""
    loaded = tiny("llm")
    with torch.no_grad():
        for parameter in loaded.model.trunk.parameters():
            parameter *= 3  # smaller weights say one word for ever
    from l3m_like.core.torchvision_ops import allow_torchvision
    from l3m_like.pretrained import NameMap, export_state
    from l3m_like.pretrained.decoder import NAMES

    allow_torchvision()
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, rms_norm_eps=1e-6, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    theirs = Qwen3ForCausalLM(config).eval()
    names = NameMap.of(NAMES, loaded.model)
    theirs.load_state_dict(export_state(names, dict(loaded.model.named_parameters())), strict=False)
    prompts = [BYTES.encode(prompt) for prompt in PROMPTS]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    seen = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = theirs.generate(ids, attention_mask=seen, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    found = Autoregressive(PROMPTS, 16, greedy=True, end=False).run(loaded.model, process=BYTES)
    assert found.tokens == out[:, longest:].tolist()
    assert len({tuple(tokens) for tokens in found.tokens}) == 4 and max(len(set(tokens)) for tokens in found.tokens) > 4


def test_padding_would_be_seen_without_document_ids(loaded) -> None:
    ids = torch.tensor([[0, 0, *BYTES.encode("a cat")]])
    place = (torch.arange(7) - 2).clamp(min=0).view(1, -1)
    plain = loaded({"text_ids": ids[:, 2:]})["text_logits"][:, -1]
    for padding, same in ((-1, True), (0, False)):
        documents = torch.tensor([[padding, padding, 0, 0, 0, 0, 0]], dtype=torch.int32)
        padded = loaded({"text_ids": ids, "text_positions": place, "text_document_ids": documents})["text_logits"][:, -1]
        assert (float((padded - plain).abs().max()) < 1e-10) is same


def test_draws_depend_on_seed_and_row(loaded) -> None:
    one = Autoregressive(["a", "a"], 16, end=False, seed=0).run(loaded.model, process=BYTES).tokens
    assert one[0] != one[1]
    assert one != Autoregressive(["a", "a"], 16, end=False, seed=1).run(loaded.model, process=BYTES).tokens
    assert one == Autoregressive(["a"], 16, end=False, num_samples=2).run(loaded.model, process=BYTES).tokens


def test_the_model_is_left_as_it_was(loaded) -> None:
    loaded.model.train()
    Autoregressive(["a"], 2).run(loaded.model, process=BYTES)
    assert all(module.training for module in loaded.model.modules())
    assert all(p.requires_grad and p.grad is None for p in loaded.model.parameters())
    with pytest.raises(UserError):
        Autoregressive(["a"], 2, stream="speech").run(loaded.model, process=BYTES)
    assert loaded.model.training
    loaded.model.eval()


# ---- drawing ---------------------------------------------------------------------------------------------------------


def test_filters_are_those_of_transformers() -> None:
    from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(64, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    for top_k, top_p, min_p in (
        (None, 0.9, None), (7, None, None), (20, 0.5, None), (None, 1e-9, None), (1, None, None),
        (None, None, 0.05), (50, 0.9, 0.1), (None, None, 1.0), (None, None, 0.0),
    ):  # fmt: skip
        expected = logits / 0.7
        if top_k is not None:
            expected = TopKLogitsWarper(top_k)(None, expected)
        if top_p is not None:
            expected = TopPLogitsWarper(top_p)(None, expected)
        if min_p is not None:
            expected = MinPLogitsWarper(min_p)(None, expected)
        found = probabilities(logits, 0.7, top_k, top_p, min_p)
        assert torch.equal(found > 0, expected > -torch.inf)
        assert torch.allclose(found, expected.softmax(-1), rtol=1e-12, atol=0)


def test_draws_have_the_right_frequencies() -> None:
    chances = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0], dtype=torch.float64)
    count = 10_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    found = draw(chances.expand(count, -1), uniform).bincount(minlength=6) / count
    assert torch.allclose(found.double(), chances, atol=1.5 / count)
    edges = torch.tensor([2.0**-54, 1.0], dtype=torch.float64)
    assert draw(torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64), edges).tolist() == [1, 1]


# ---- where a row ends ------------------------------------------------------------------------------------------------


class Successor(ReadWriteBlock):
    """The next token is the last one plus 1."""

    outputs = ("logits",)

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.calls = 0

    def compute(self, ids: Tensor, document_ids: Tensor) -> Tensor:
        self.calls += 1
        return torch.nn.functional.one_hot((ids + 1) % 257, 257) * self.scale


def test_a_row_ends_at_the_end_token() -> None:
    model = MetaModel(head=Successor(), stream="text")
    texts = Autoregressive([[250], [254], [10]], 20, greedy=True, cache=False).run(model, process=BYTES)
    assert texts.tokens == [[251, 252, 253, 254, 255], [255], list(range(11, 31))]
    assert model.head.calls == 20
    Autoregressive([[250], [254]], 20, greedy=True, cache=False).run(model, process=BYTES)
    assert model.head.calls == 26  # all rows had ended after six steps
    on = Autoregressive([[254]], 5, greedy=True, cache=False, end=False).run(model, process=BYTES)
    assert on.tokens == [[255, 256, 0, 1, 2]]


def test_a_row_ends_at_a_stop_text() -> None:
    model = MetaModel(head=Successor(), stream="text")
    texts = Autoregressive(["a", "k"], 20, greedy=True, cache=False, stop=["ef", "op"]).run(model, process=BYTES)
    assert texts.texts == ["bcd", "lmn"]
    assert texts.tokens == [[98, 99, 100, 101, 102], [108, 109, 110, 111, 112]]
    assert str(texts).splitlines()[0] == "abcd"
    assert model.head.calls == 5


def test_stop_texts_are_found_wherever_the_host_looks() -> None:
    """Across the border of two looks, inside of characters of several bytes, and far from the beginning."""
    text = "x" * 50 + "ä€ stöp and on"
    tokens = BYTES.encode(text)
    for look in (1, 3, 16, 200):
        endings = Endings(1, None, ["stöp"], BYTES)
        left = [endings.left([tokens[start : start + look]]) for start in range(0, len(tokens), look)]
        first = next(number for number, rows in enumerate(left) if rows == 0)
        end = len(text[: text.index("stöp") + 4].encode())
        assert first == (end - 1) // look
        assert endings.cut(tokens) == tokens[:end]


def test_looking_seldom_changes_nothing(loaded, monkeypatch) -> None:
    settings = {"end": True, "stop": ["b", "e"], "seed": 3}
    expected = Autoregressive(PROMPTS, 20, **settings).run(loaded.model, process=BYTES)
    assert len({len(tokens) for tokens in expected.tokens}) > 1
    for every in (7, 50):
        monkeypatch.setattr(autoregressive, "look_every", lambda device, every=every: every)
        assert Autoregressive(PROMPTS, 20, **settings).run(loaded.model, process=BYTES) == expected


def test_token_ids_without_a_tokenizer() -> None:
    model = MetaModel(head=Successor(), stream="text")
    texts = Autoregressive([[1, 2]], 3, greedy=True, cache=False).run(model)
    assert texts.tokens == [[3, 4, 5]] and texts.texts == [None] and str(texts) == "3 4 5"


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompts": "ROMEO:"}, "it is a list"),
        ({"prompts": []}, "it is a list"),
        ({"prompts": [""]}, "has no token"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": 0.0}, "greedy: true"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"min_p": 2.0}, "min_p is 2"),
        ({"compile": True, "cache": False}, "compile needs cache"),
        ({"stream": "txt"}, "Did you mean 'txt_ids'|reads 'text_ids'"),
    ],
)
def test_bad_settings(loaded, settings, words) -> None:
    with pytest.raises(UserError, match=words):
        Autoregressive(**({"prompts": ["a"], "max_new_tokens": 1} | settings)).run(loaded.model, process=BYTES)


def test_what_does_not_fit(loaded) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        Autoregressive(["a"], 1).run(loaded.model)
    with pytest.raises(UserError, match="cache: false"):
        Autoregressive(["a"], 1).run(MetaModel(head=Successor(), stream="text"), process=BYTES)
    with pytest.raises(UserError, match="text_logits"):
        Autoregressive(["a"], 1, cache=False).run(MetaModel(loaded.model.preprocessor, loaded.model.trunk), process=BYTES)
