"""Processors of conversations, pictures, video and sound: what they make, what they refuse, what their draws depend on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from l3m_like.core.errors import UserError
from l3m_like.data import Chat, Dataset, JsonLines, PromptResponse, Stack, Visit

VISIT = Visit("x#1", 0, 0)

# ---- draws -------------------------------------------------------------------------------------------------------------


def test_draws_are_fixed_for_ever() -> None:
    """The same numbers on every machine and version: a change here changes every augmented run."""
    draws = Visit("a#1", 2, 3).draws("crop")
    assert [draws.integer(1000) for _ in range(4)] == [159, 975, 292, 314]
    assert draws.uniform() == 0.20046405147675167


def test_draws_depend_on_purpose_sample_epoch_and_seed() -> None:
    visits = [Visit(name, epoch, seed) for name in ("a", "b") for epoch in range(3) for seed in range(3)]
    assert len({visit.draws(purpose).uniform() for visit in visits for purpose in ("crop", "flip")}) == 36
    draws = VISIT.draws("many")
    values = [draws.uniform(2.0, 4.0) for _ in range(2000)]
    assert 2 < min(values) < 2.01 and 3.99 < max(values) < 4 and abs(np.mean(values) - 3) < 0.05
    faces = np.bincount([draws.integer(6) for _ in range(6000)], minlength=6)
    assert len(faces) == 6 and faces.min() > 850
    assert sorted(draws.permutation(7)) == list(range(7))
    assert len({tuple(draws.permutation(3)) for _ in range(100)}) == 6


# ---- conversations -----------------------------------------------------------------------------------------------------

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi, Zoë! 你好"},
    {"role": "assistant", "content": " Héllo.\n"},
    {"role": "tool", "content": "{}"},
    {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "now?"}]},
    {"role": "assistant", "content": "Bye 👋"},
]
QWEN = (
    "{%- if messages[0]['role'] == 'system' %}\n    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
    "{%- else %}\n    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}\n{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) or message.role == 'assistant' %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "    {%- elif message.role == 'tool' %}\n"
    "        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}\n"
    "    {%- endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)
#: leaves out what the assistant thought once others have spoken, as reasoning models do
FORGETFUL = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{- message.content + '<|im_end|>\n' }}{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer as Qwen's, trained on the shipped text, and its tokenizer_config.json."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    source = JsonLines("shipped:shakespeare.jsonl", {"split": "heldout"})
    made.train_from_iterator((source.read(index)["text"] for index in range(len(source))), trainer)
    path = tmp_path_factory.mktemp("model")
    made.save(str(path / "tokenizer.json"))
    config = {"chat_template": QWEN, "eos_token": {"content": "<|im_end|>", "special": True}, "pad_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def chat(folder: Path, **arguments) -> Chat:
    return Chat(str(folder / "tokenizer.json"), vocab_size=700, **arguments)


def said(shown: list[tuple[str, bool]]) -> list[str]:
    return [text for text, flag in shown if flag]


def written(name: str, source: str, folder: Path) -> str:
    (folder / name).write_text(source)
    return str(folder / name)


@pytest.mark.parametrize("tokenizer", ["bytes", "file"])
def test_chatml_trains_on_what_the_assistant_says(tokenizer: str, folder: Path) -> None:
    process = Chat("bytes", vocab_size=257) if tokenizer == "bytes" else chat(folder)
    process.check()
    sample = {"messages": CONVERSATION}
    shown = process.show(sample)
    for text, flag in shown:
        print(f"{'TRAINED' if flag else '       '} {text!r}")
    assert [text for text, _ in shown if text] == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi, Zoë! 你好<|im_end|>\n<|im_start|>assistant\n",
        " Héllo.\n<|im_end|>",
        "\n<|im_start|>tool\n{}<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n",
        "Bye 👋<|im_end|>",
        "\n",
    ]
    assert [flag for text, flag in shown if text] == [False, True, False, True, False]
    made = process(sample, VISIT)
    assert made["ids"].dtype == np.int64 and made["trained"].dtype == bool and made["ids"].shape == made["trained"].shape
    if tokenizer == "file":
        tokens = made["ids"][made["trained"]]
        assert (tokens == process.end_id).sum() == 2 and process.tokenizer.id_of("<|im_start|>") not in tokens
        assert process.decode(tokens) == " Héllo.\nBye 👋"
    else:
        assert made["ids"][-1] == 256 and shown[-1] == ("", False)  # the newline before it is not said
        assert bytes(made["ids"][:-1].tolist()).decode() == "".join(text for text, _ in shown)
        assert bytes(made["ids"][made["trained"]].tolist()).decode() == " Héllo.\n<|im_end|>Bye 👋<|im_end|>"


def test_the_templates_of_this_library() -> None:
    sample = {"messages": CONVERSATION}
    plain = Chat("bytes", vocab_size=257, template="plain").show(sample)
    text = "".join(text for text, _ in plain)
    assert text.startswith("System: Be brief.\nUser: Hi, Zoë! 你好\nAssistant:  Héllo.\n\nTool: {}\n")
    assert said(plain) == ["  Héllo.\n\n", " Bye 👋\n", ""]  # and the end of the document
    llama = Chat("bytes", vocab_size=257, template="llama3").show(sample)
    assert said(llama) == ["Héllo.<|eot_id|>", "Bye 👋<|eot_id|>", ""]
    system = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    assert llama[0][0].startswith(system + "<|start_header_id|>user<|end_header_id|>\n\nHi")


def test_train_on_and_system(folder: Path) -> None:
    sample = {"messages": CONVERSATION[1:]}
    assert said(chat(folder, train_on="last").show(sample)) == ["Bye 👋<|im_end|>"]
    assert chat(folder, train_on="all")(sample, VISIT)["trained"].all()
    rhyme = chat(folder, system="Rhyme.")
    assert rhyme.show(sample)[0][0].startswith("<|im_start|>system\nRhyme.<|im_end|>\n<|im_start|>user\nHi")
    assert rhyme.show({"messages": CONVERSATION}) == chat(folder).show({"messages": CONVERSATION})
    only_user = {"messages": CONVERSATION[:2]}
    with pytest.raises(UserError, match="nothing to train on"):
        chat(folder)(only_user, VISIT)
    assert chat(folder, train_on="all")(only_user, VISIT)["trained"].all()


def test_a_token_across_a_border_is_not_trained_on(tmp_path: Path) -> None:
    """A vocabulary in which the header's newline and the first letter are one token."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(set("<|im_start|>assistant\nuser<|im_end|>ab"))
    vocabulary = {letter: number for number, letter in enumerate([*letters, "\na", "<end>"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("\n", "a")]))
    made.save(str(tmp_path / "tokenizer.json"))
    process = Chat(str(tmp_path / "tokenizer.json"), vocab_size=len(vocabulary), end="<end>")
    messages = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "ab"}]
    assert said(process.show({"messages": messages})) == ["b<|im_end|>"]
    messages[1]["content"] = "ba"
    assert said(process.show({"messages": messages})) == ["ba<|im_end|>"]


@pytest.mark.parametrize("kind", ["config", "jinja", "marked"])
def test_ids_are_those_of_transformers(kind: str, folder: Path) -> None:
    from l3m_like.pretrained.torchvision_ops import allow_torchvision

    allow_torchvision()
    transformers = pytest.importorskip("transformers")
    source = MARKED if kind == "marked" else QWEN
    path = str(folder / "tokenizer_config.json") if kind == "config" else written(f"{kind}.jinja", source, folder)
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), chat_template=source, eos_token="<|im_end|>"
    )
    messages = [m if isinstance(m["content"], str) else {**m, "content": "And now?"} for m in CONVERSATION]
    stripped = [{**message, "content": message["content"].strip()} for message in messages]
    for sample in (messages, messages[1:], stripped[1:3], [*stripped, {"role": "user", "content": "?"}]):
        wanted = {"return_dict": True, "return_assistant_tokens_mask": kind == "marked"}
        expected = reference.apply_chat_template(sample, tokenize=True, **wanted)
        process = chat(folder, template=path)
        made = process({"messages": sample}, VISIT)
        assert made["ids"].tolist() == expected["input_ids"]
        turns = [m["content"] + "<|im_end|>" for m in sample if m["role"] == "assistant"]
        assert said(process.show({"messages": sample})) == turns
        assert said(chat(folder, template=path, train_on="last").show({"messages": sample})) == turns[-1:]
        if kind == "marked" and not any(turn.startswith(" ") for turn in turns):  # there its spans lose the space
            assert made["trained"].astype(int).tolist() == expected["assistant_masks"]
    asked = reference.apply_chat_template(messages[1:2], tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert kind == "marked" or chat(folder, template=path).encode(messages[1]["content"]) == asked
    assert process.end_id == reference.eos_token_id


def test_the_chatml_of_this_library_is_that_of_a_template(folder: Path) -> None:
    simple = "{% for m in messages %}{{'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n'}}{% endfor %}"
    simple += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    other = chat(folder, template=written("simple.jinja", simple, folder))
    for key, value in chat(folder)({"messages": CONVERSATION}, VISIT).items():
        assert np.array_equal(value, other({"messages": CONVERSATION}, VISIT)[key])
    assert chat(folder).encode("Hi") == other.encode("Hi")


def test_templates_whose_turns_cannot_be_told_apart(folder: Path) -> None:
    messages = CONVERSATION[1:3] + CONVERSATION[4:]
    path = written("forgetful.jinja", FORGETFUL, folder)
    with pytest.raises(UserError, match=r"up to message 1 differently when more follows.*\{% generation %\}"):
        chat(folder, template=path).show({"messages": messages})
    last = chat(folder, template=path, train_on="last")
    assert said(last.show({"messages": messages})) == ["<think>\n\n</think>\n\nBye 👋<|im_end|>"]
    no_header = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    with pytest.raises(UserError, match="message 1 as '<|im_start|>assistant.*not its content alone"):
        chat(folder, template=written("no_header.jinja", no_header, folder)).show({"messages": messages})
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('users begin') }}{% endif %}"
    with pytest.raises(UserError, match="refuses 6 messages: users begin"):
        chat(folder, template=written("strict.jinja", strict, folder)).show({"messages": CONVERSATION})
    with pytest.raises(UserError, match="not a Jinja template"):
        chat(folder, template=written("broken.jinja", "{% if %}", folder)).show({"messages": messages})
    with pytest.raises(UserError, match="U\\+FDD0"):
        chat(folder, template=path).show({"messages": [{"role": "user", "content": "\ufdd0"}]})


def test_a_jinja_file_without_its_special_tokens(folder: Path, tmp_path: Path) -> None:
    source = "{{ bos_token }}" + MARKED
    with pytest.raises(UserError, match=r"writes \['bos_token'\]; put its tokenizer_config.json beside it"):
        chat(folder, template=written("bos.jinja", source, tmp_path)).show({"messages": CONVERSATION})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}))
    process = chat(folder, template=str(tmp_path / "bos.jinja"))
    assert process.show({"messages": CONVERSATION})[0][0].startswith("<|endoftext|><|im_start|>system")
    with pytest.raises(UserError, match="has no `chat_template`"):
        chat(folder, template=str(tmp_path / "tokenizer_config.json")).check()


def test_the_end_token(folder: Path) -> None:
    sample = {"messages": CONVERSATION}
    end = chat(folder).tokenizer.id_of("<|endoftext|>")
    plain = chat(folder, template="plain")
    made = plain(sample, VISIT)
    assert made["ids"][-1] == plain.end_id == end and made["trained"][-1]
    assert not plain({"messages": CONVERSATION[:-1]}, VISIT)["trained"][-1]  # the user had the last word
    assert chat(folder, end="<|im_end|>")(sample, VISIT)["ids"].tolist() == chat(folder)(sample, VISIT)["ids"].tolist()
    assert chat(folder, end="<|endoftext|>")(sample, VISIT)["ids"][-1] == end
    with pytest.raises(UserError, match=r"ends turns with '<\|eot_id\|>', which .*tokenizer.json does not have"):
        chat(folder, template="llama3").check()


def test_what_chat_refuses(folder: Path) -> None:
    with pytest.raises(UserError, match="train_on: 'assistent'. Did you mean 'assistant'"):
        chat(folder, train_on="assistent")
    with pytest.raises(UserError, match="'chatlm' is neither.*Did you mean 'chatml'"):
        chat(folder, template="chatlm")
    process = chat(folder)
    for sample, message in (
        ({"text": "a"}, r"has \['text'\]; it needs 'messages'"),
        ({"messages": [{"role": "user"}]}, "message 0 is .*needs 'role' and 'content'"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "role 'usr'. Did you mean 'user'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"parts of type \['image'\]"),
        ({"messages": [{"role": "user", "content": 5}]}, "the content 5"),
        ({"messages": [{"role": "assistant", "content": None}]}, "has no text"),
        ({"messages": CONVERSATION, "tools": [{}]}, "no place for them"),
    ):
        with pytest.raises(UserError, match=message):
            process(sample, VISIT)


def test_prompt_response(folder: Path) -> None:
    process = PromptResponse(chat(folder), prompt="{instruction}\n\n{input}", response="output")
    record = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
    messages = [{"role": "user", "content": "Add.\n\n1 + 1"}, {"role": "assistant", "content": "2"}]
    assert process(record, VISIT)["ids"].tolist() == chat(folder)({"messages": messages}, VISIT)["ids"].tolist()
    with pytest.raises(UserError, match="no field 'input'"):
        process({"instruction": "Add.", "output": "2"}, VISIT)
    assert process.keys() == chat(folder).keys() and process.end_id == chat(folder).end_id
    with pytest.raises(UserError, match="Stack needs samples of one size"):
        Dataset(JsonLines("x.jsonl"), process, Stack())
