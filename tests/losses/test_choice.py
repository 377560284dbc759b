"""Multiple choice and perplexity: against likelihoods by hand and of transformers, and the same for every split."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from l3m_like.config import RunConfig
from l3m_like.core import UserError
from l3m_like.core.wiring import Program, check_wiring
from l3m_like.data import Dataset, JsonLines, MultipleChoice, Stack, Tokenize, Visit
from l3m_like.data.loader import EvalLoader
from l3m_like.data.processors.multiple_choice import continuation
from l3m_like.data.tokenizer import TextTokenizer
from l3m_like.distributed.mesh import build_mesh
from l3m_like.losses import ChoiceAccuracy, Perplexity
from l3m_like.training.evaluate import evaluate
from tests.distributed.pool import run as on_ranks
from tests.generate.tiny import CONFIGS, tiny

BYTES = TextTokenizer("bytes", 257)
VISIT = Visit("", 0, 0)
PER = ("choice", "token", "byte")


def questions(path: Path) -> list[dict]:
    """HellaSwag's fields; sizes of choices that differ, also between bytes and tokens of no one."""
    made = [
        {"ctx": "To be, or not to", "endings": ["be", "sleep", "é"], "label": "0"},
        {"ctx": "ROMEO:", "endings": ["But soft", "what", "light through yonder", "x"], "label": 2},
        {"ctx": "A horse ", "endings": ["a horse", "my"], "label": 1},
        {"ctx": "It is", "endings": ["the east", "and", "Juliet"], "label": 1},
        {"ctx": "O", "endings": ["Romeo", "wherefore art"], "label": 0},
    ]
    path.write_text("".join(json.dumps(question) + "\n" for question in made), encoding="utf-8")
    return made


def dataset(path: Path, **settings) -> Dataset:
    return Dataset(JsonLines(str(path)), MultipleChoice(vocab_size=257, length=128, **settings), Stack())


def by_hand(logits_of, made: list[dict], prefix: str = "") -> dict[str, float]:
    """Accuracies with one forward per choice."""
    right = dict.fromkeys(PER, 0)
    for question in made:
        likelihoods = []
        for choice in question["endings"]:
            context = BYTES.encode((prefix + question["ctx"]).rstrip(" "))
            text = BYTES.encode((prefix + question["ctx"])[len(context) :] + " " + choice)
            ids = torch.tensor([*context, *text])
            logs = logits_of(ids[None, :-1])[0].log_softmax(-1)
            likelihoods.append(
                (float(sum(logs[len(context) - 1 + i, t] for i, t in enumerate(text))), len(text), len(choice.encode()))
            )
        for per, size in zip(PER, ((lambda t: 1), (lambda t: t[1]), (lambda t: t[2])), strict=True):
            scores = [entry[0] / size(entry) for entry in likelihoods]
            right[per] += scores.index(max(scores)) == int(question["label"])
    return {per: n / len(made) for per, n in right.items()}


def accuracies(path: Path, axes: dict[str, int] | None, rows: int, seed: int = 0, **settings) -> dict[str, float]:
    mesh = build_mesh(axes or {})
    model = tiny("llm", seed=seed).model
    losses = {per: ChoiceAccuracy(per, stream="text") for per in PER}
    data = dataset(path, **settings)
    graphs = check_wiring([Program("it", {"": model}, losses)], data.keys(), ()).graphs["it"]
    return evaluate({"": model}, graphs, losses, EvalLoader(data, batch=rows, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size), mesh)


def test_accuracy_is_that_of_one_forward_per_choice_however_it_is_split(tmp_path) -> None:
    path = tmp_path / "questions.jsonl"
    made = questions(path)
    seen = set()
    for seed in (0, 1, 2):
        loaded = tiny("llm", seed=seed)
        expected = by_hand(lambda ids, loaded=loaded: loaded({"text_ids": ids})["text_logits"], made)
        seen.add(tuple(expected.values()))
        assert accuracies(path, None, 2, seed) == pytest.approx(expected, abs=1e-12)
    assert len(seen) > 1 and any(len(set(values)) > 1 for values in seen)
    for found in on_ranks(2, accuracies, path, {"dp_shard": 2}, 2, 2):  # three batches on two ranks
        assert found == pytest.approx(expected, abs=1e-12)


def test_shots_stand_before_every_question(tmp_path) -> None:
    path = tmp_path / "questions.jsonl"
    questions(path)
    shots = MultipleChoice(vocab_size=257, length=400, shots=2, shots_from=str(path))
    row = shots({"ctx": "Q", "endings": ["yes", "no"], "label": 1}, VISIT)
    text = BYTES.decode(row["text_ids"][row["text_document_ids"] == 1])
    assert text == "To be, or not to be\n\nROMEO: light through yonder\n\nQ n"  # the last letter is only predicted
    assert BYTES.decode([t for t in row["text_targets"] if t >= 0]) == " yes no"
    assert row["text_choice_bytes"].tolist() == [3, 2, 0, 0] and row["text_answer"] == 1
    with pytest.raises(UserError, match="has 5 records"):
        MultipleChoice(vocab_size=257, length=400, shots=9, shots_from=str(path)).check()


def test_fields_of_arc() -> None:
    process = MultipleChoice(
        vocab_size=257, length=99, context="Question: {question}\nAnswer:", choices="choices.text", answer="answerKey",
        labels="choices.label",
    )  # fmt: skip
    record = {"question": "2 + 2?", "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "B"}
    assert process.question(record) == ("Question: 2 + 2?\nAnswer:", ["3", "4"], 1)
    for change, words in (
        ({"answerKey": "C"}, "none of the labels"),
        ({"choices": {"texts": []}}, "Did you mean 'texts'"),
        ({"choices": {"text": ["1"] * 5, "label": []}}, "5 choices"),
        ({"question": "x" * 99}, "raise process.length"),
    ):
        with pytest.raises(UserError, match=words):
            process(record | change, VISIT)


def test_a_continuation_begins_where_its_own_tokens_do() -> None:
    given, new = continuation(BYTES, "a ", "b")
    assert (given.tolist(), new.tolist()) == ([97], [32, 98])
    assert continuation(BYTES, "", "b")[0].tolist() == [256]


def test_perplexity_per_token_byte_and_word() -> None:
    text = "To be  or\nnot\u00e9 be"
    ids = torch.tensor([[*Tokenize(vocab_size=257).encode(text), 256]])
    data = {"text_ids": ids[:, :-1], "text_targets": ids[:, 1:], "text_nll": torch.full(ids[:, 1:].shape, 0.5)}
    total = 0.5 * (ids.shape[1] - 1)
    # the first letter is no target, and so the first word does not begin in one
    counts = {"token": ids.shape[1] - 1, "byte": len(text.encode()) - 1, "word": 4}
    for per, count in counts.items():
        metric = Perplexity(per, stream="text", tokenizer=BYTES)
        value, _ = metric.term(data, float(count))
        assert int(metric.count_of(data)) == count and float(value) == pytest.approx(total)
        assert metric.shown(float(value) / count) == pytest.approx(math.exp(total / count))
    bits = Perplexity("byte", bits=True, stream="text", tokenizer=BYTES)
    assert bits.shown(total / counts["byte"]) == pytest.approx(total / math.log(2) / counts["byte"])
    with pytest.raises(UserError, match="needs the tokenizer"):
        Perplexity("word")
    with pytest.raises(UserError, match="Did you mean 'byte'"):
        ChoiceAccuracy("bytes")


def test_bytes_of_tokens(tmp_path) -> None:
    """Of a byte-level vocabulary and of one of pieces: the bytes of a text's tokens are the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    text = "naïve cafés, tabs\tand 雪\n  two  spaces"
    level = Tokenizer(models.BPE())
    level.pre_tokenizer, level.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    level.train_from_iterator(
        [text] * 3, trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    )
    pieces = (
        {"<eos>": 0, "<unk>": 1}
        | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
        | {"\u2581": 258, "a": 259, "\u2581a": 260}
    )
    fallback = Tokenizer(models.BPE(vocab=pieces, merges=[("\u2581", "a")], byte_fallback=True, unk_token="<unk>"))
    fallback.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    fallback.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    fallback.add_special_tokens(["<eos>"])
    for number, tokenizer in enumerate((level, fallback)):
        tokenizer.save(str(tmp_path / f"{number}.json"))
        ours = TextTokenizer(str(tmp_path / f"{number}.json"), 400)
        table = ours.token_bytes()
        assert b"".join(table[token] for token in ours.encode(text)) == text.encode()
        assert len(table) == 400 and table[ours.end_id] == b"" and table[399] == b""


def test_the_metric_against_log_likelihoods() -> None:
    """Numbers chosen by hand: the longest wins by its tokens, the one of most bytes by its bytes; an absent choice never."""
    nll = torch.tensor([[1.0, 9.0, 2.0, 2.0, 1.5, 1.5, 1.5, 0.0]])
    documents = torch.tensor([[0, 1, 1, 1, 2, 2, 2, -1]])
    targets = torch.tensor([[1, -100, 1, 1, 1, 1, 1, -100]])
    sizes = torch.tensor([[1, 9, 3, 0]])  # 1.0, 4.0, 4.5 nats in 1, 2, 3 tokens and 1, 9, 3 bytes
    for per, right in (("choice", 0), ("token", 0), ("byte", 1)):
        metric = ChoiceAccuracy(per)
        for answer in range(4):
            value = metric.compute(nll, targets, documents, sizes, torch.tensor([answer]))
            assert float(value) == (answer == right), per
    longer = nll.clone()
    longer[0, 0] = 1.6
    assert float(ChoiceAccuracy("token").compute(longer, targets, documents, sizes, torch.tensor([2]))) == 1


@pytest.mark.slow
def test_a_trained_model_knows_what_comes_next(tmp_path, monkeypatch) -> None:
    """The true continuation of held-out Shakespeare among three from elsewhere: chance is 1 in 4."""
    from l3m_like import train
    from l3m_like.data.paths import resolve

    monkeypatch.chdir(tmp_path)
    (path,) = resolve("shipped:shakespeare.jsonl")
    texts = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    held = "".join(text["text"] for text in texts if text["split"] == "heldout").replace("\n", " ")
    starts = range(0, 400 * 100, 100)
    with (tmp_path / "next.jsonl").open("w", encoding="utf-8") as file:
        for number, start in enumerate(starts):
            ends = [held[(start + 40 + shift) % (len(held) - 20) :][:20] for shift in (0, 5_000, 10_000, 15_000)]
            right = number % 4
            ends[0], ends[right] = ends[right], ends[0]
            file.write(json.dumps({"ctx": held[start : start + 40], "endings": ends, "label": right}) + "\n")
    process = {"_target_": "l3m_like.data.MultipleChoice", "vocab_size": 257, "length": 256, "before": ""}
    data = {
        "_target_": "l3m_like.data.Dataset",
        "source": {"_target_": "l3m_like.data.JsonLines", "path": str(tmp_path / "next.jsonl")},
        "process": process,
        "pack": {"_target_": "l3m_like.data.Stack"},
    }
    metric = {"_target_": "l3m_like.losses.ChoiceAccuracy", "stream": "text"}
    token = {"_target_": "l3m_like.losses.Perplexity", "stream": "text"}
    cfg = RunConfig.from_file(CONFIGS / "llm.yaml", ["steps=150", "log.every=50"])
    tree = cfg.to_dict()
    tree["evals"] = {
        "next": {"data": data, "loss": {"accuracy": metric}},
        "heldout": tree["evals"]["heldout"] | {"loss": {"perplexity": token}},
    }
    final = train(tree)
    chance, deviation = 0.25, (0.25 * 0.75 / 400) ** 0.5
    assert final["next/accuracy"] > chance + 3 * deviation
    assert 4 < final["heldout/perplexity"] < 20
