"""Processors of conversations, pictures, video and sound: what they make, what they refuse, what their draws depend on."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from l3m_like.core.errors import UserError
from l3m_like.data import (
    Audio,
    CaptionedImage,
    Chat,
    ChatImages,
    ClassImage,
    ClassVideo,
    ColorJitter,
    Dataset,
    FillInTheMiddle,
    JsonLines,
    MiddleCrop,
    Pixels,
    PromptResponse,
    RandAugment,
    RandomResizedCrop,
    Stack,
    Tokenize,
    Video,
    Visit,
    WebDataset,
)
from l3m_like.data.augmentations import _operations
from l3m_like.data.processors.pixels import decode

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
    # with bytes an end token follows the conversation, and what leads to it is said too
    last = ["Bye 👋<|im_end|>\n"] if tokenizer == "bytes" else ["Bye 👋<|im_end|>", "\n"]
    assert [text for text, _ in shown if text] == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi, Zoë! 你好<|im_end|>\n<|im_start|>assistant\n",
        " Héllo.\n<|im_end|>",
        "\n<|im_start|>tool\n{}<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n",
        *last,
    ]
    assert [flag for text, flag in shown if text] == [False, True, False, True, False][: 3 + len(last)]
    made = process(sample, VISIT)
    assert made["ids"].dtype == np.int64 and made["trained"].dtype == bool and made["ids"].shape == made["trained"].shape
    if tokenizer == "file":
        tokens = made["ids"][made["trained"]]
        assert (tokens == process.end_id).sum() == 2 and process.tokenizer.id_of("<|im_start|>") not in tokens
        assert process.decode(tokens) == " Héllo.\nBye 👋"
    else:
        assert made["ids"][-1] == 256 and shown[-1] == ("", True)
        assert bytes(made["ids"][:-1].tolist()).decode() == "".join(text for text, _ in shown)
        assert bytes(made["ids"][made["trained"]].tolist()[:-1]).decode() == " Héllo.\n<|im_end|>Bye 👋<|im_end|>\n"


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
    assert said(process.show({"messages": messages})) == ["b<|im_end|>\n", ""]
    messages[1]["content"] = "ba"
    assert said(process.show({"messages": messages})) == ["ba<|im_end|>\n", ""]


@pytest.mark.parametrize("kind", ["config", "jinja", "marked"])
def test_ids_are_those_of_transformers(kind: str, folder: Path) -> None:
    from l3m_like.core.torchvision_ops import allow_torchvision

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
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"parts of type \['image'\].*`image`"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, r"parts of type \['video'\]"),
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


# ---- filling gaps ------------------------------------------------------------------------------------------------------

MARKS = {"prefix": "<fim_prefix>", "middle": "<fim_middle>", "suffix": "<fim_suffix>"}


def test_fill_in_the_middle(folder: Path) -> None:
    tokenize = Tokenize(str(folder / "tokenizer.json"), vocab_size=700)
    process = FillInTheMiddle(tokenize, MARKS, rate=0.6, spm_rate=0.25)
    process.check()
    prefix, middle, suffix = (tokenize.tokenizer.id_of(MARKS[name]) for name in ("prefix", "middle", "suffix"))
    sample = {"text": "To be, or not to be: that is the question."}
    document = tokenize(sample, VISIT)["ids"].tolist()
    plain, suffix_first, cuts = 0, 0, set()
    for epoch in range(1000):
        made = process(sample, Visit("a", epoch, 0))["ids"]
        assert made.dtype == np.int64
        ids = made.tolist()
        if ids == document:
            plain += 1
            continue
        assert ids[0] == prefix and ids[-1] == document[-1] and len(ids) == len(document) + 3
        at_suffix, at_middle = ids.index(suffix), ids.index(middle)
        # in order and nothing lost; SPM: the prefix stands before the middle, not before the suffix
        assert ids[1:at_suffix] + ids[at_middle + 1 : -1] + ids[at_suffix + 1 : at_middle] == document[:-1]
        suffix_first += at_suffix == 1
        cuts.add((at_suffix, at_middle))
    assert 350 < plain < 450 and len(cuts) > 100
    empty = 1 - ((len(document) - 1) / len(document)) ** 2  # a PSM whose prefix is empty looks like SPM
    assert abs(suffix_first / (1000 - plain) - (0.25 + 0.75 * empty)) < 0.05
    assert process(sample, VISIT)["ids"].tolist() == process(sample, VISIT)["ids"].tolist()
    assert FillInTheMiddle(tokenize, MARKS, rate=0.0)(sample, VISIT)["ids"].tolist() == document
    assert FillInTheMiddle(tokenize, MARKS, rate=1.0)({"text": ""}, VISIT)["ids"].tolist()[-1] == process.end_id


def test_what_fill_in_the_middle_refuses(folder: Path) -> None:
    tokenize = Tokenize(str(folder / "tokenizer.json"), vocab_size=700)
    with pytest.raises(UserError, match="'bytes' does not have"):
        FillInTheMiddle(Tokenize(vocab_size=257), MARKS)
    with pytest.raises(UserError, match=r"tokens has \['prefix'\]; it needs"):
        FillInTheMiddle(tokenize, {"prefix": "a"})
    with pytest.raises(UserError, match="rate is 2"):
        FillInTheMiddle(tokenize, MARKS, rate=2)
    with pytest.raises(UserError, match=r"no token '<mid>' \(middle\)"):
        FillInTheMiddle(tokenize, MARKS | {"middle": "<mid>"}).check()


# ---- pictures ----------------------------------------------------------------------------------------------------------


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


@pytest.fixture(scope="module")
def cat() -> Image.Image:
    """A photograph, 451 x 300."""
    data = pytest.importorskip("skimage.data")
    return Image.fromarray(data.chelsea())


def test_modes_decode_to_what_is_seen() -> None:
    red = np.zeros((4, 6, 4), np.uint8)
    red[..., 0], red[..., 3] = 255, 255
    red[:, 3:, 3] = 0  # the right half is transparent, hence white
    seen = np.full((4, 6, 3), 255, np.uint8)
    seen[:, :3] = (255, 0, 0)
    rgba = Image.fromarray(red)
    for picture, options in ((rgba, {}), (rgba.quantize(4), {})):
        assert np.array_equal(np.asarray(decode(encoded(picture, **options), 3)), seen)
    assert np.array_equal(np.asarray(decode(encoded(rgba, "WEBP", lossless=True), 3)), seen)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert np.asarray(decode(encoded(palette, transparency=1), 3)).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    deep = Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16))
    assert np.asarray(decode(encoded(deep), 1)).tolist() == [[0, 1, 128, 255]]
    assert np.asarray(decode(encoded(deep), 3))[0, 2].tolist() == [128, 128, 128]
    cmyk = Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK")
    assert np.abs(np.asarray(decode(encoded(cmyk, "JPEG", quality=100), 3)).astype(int) - [200, 40, 90]).max() <= 4
    bilevel = Image.fromarray(np.array([[True, False]]))
    assert np.asarray(decode(encoded(bilevel), 1)).tolist() == [[255, 0]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, cat: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = decode(encoded(cat, exif=exif), 3)
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # what a viewer does: PIL's Transpose numbers
    expected = cat if orientation == 1 else cat.transpose(Image.Transpose(back[orientation]))
    assert turned.size == expected.size and np.array_equal(np.asarray(turned), np.asarray(expected))


def test_corrupt_pictures_say_what_is_wrong(cat: Image.Image) -> None:
    jpeg = encoded(cat, "JPEG")
    process = ClassImage(8)
    for content, message in (
        (b"", "UnidentifiedImageError"),
        (b"not a picture", "UnidentifiedImageError: cannot identify image file"),
        (jpeg[: len(jpeg) // 2], "image file is truncated"),
        (encoded(cat)[:5000], "cannot be decoded: .*truncated|cannot be decoded: .*broken"),
    ):
        with pytest.raises(UserError, match=message):
            process({"jpg": content, "cls": b"1"}, VISIT)


def test_random_resized_crop(cat: Image.Image) -> None:
    crop = RandomResizedCrop((0.25, 0.5), (0.5, 2.0))
    boxes = [crop.box(400, 300, Visit("a", epoch, 0).draws("crop")) for epoch in range(800)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 400 and 0 <= top < bottom <= 300
        area, ratio = (right - left) * (bottom - top), (right - left) / (bottom - top)
        assert 0.245 < area / 120000 < 0.505 and 0.49 < ratio < 2.03
    assert len(set(boxes)) > 790 and min(box[0] for box in boxes) == 0 and max(box[2] for box in boxes) == 400
    assert abs(np.mean([(r - x) * (b - y) for x, y, r, b in boxes]) / 120000 - 0.375) < 0.02
    assert RandomResizedCrop((1.0, 1.0), (1.0, 1.0)).box(400, 100, VISIT.draws("crop")) == (150, 0, 250, 100)  # its middle
    # what is made is that part of the picture
    sample, process = {"png": encoded(cat), "cls": b"0"}, ClassImage(64, crop=crop)
    box = crop.box(*cat.size, VISIT.draws("crop"))
    part = np.asarray(cat.resize((64, 64), Image.Resampling.BICUBIC, box=box), np.float32).transpose(2, 0, 1)
    assert np.allclose((process(sample, VISIT)["image"] + 1) * 127.5, part, atol=1e-4)
    with pytest.raises(UserError, match=r"scale is \[0.0, 1.0\]"):
        RandomResizedCrop((0.0, 1.0))


def test_middle_crop(cat: Image.Image) -> None:
    assert MiddleCrop(0.875).box(320, 256, VISIT.draws("crop")) == (48, 16, 272, 240)
    whole, middle = (
        ClassImage(48, crop=crop)({"png": encoded(cat), "cls": b"0"}, VISIT)["image"] for crop in (None, MiddleCrop(1.0))
    )
    assert np.allclose(whole, middle, atol=0.02)
    with pytest.raises(UserError, match="part is 0"):
        MiddleCrop(0.0)


def test_color_jitter(cat: Image.Image) -> None:
    draws = [Visit("a", epoch, 0).draws("augment/0") for epoch in range(6)]
    jittered = [ColorJitter(0.4, 0.4, 0.4, 0.1)(cat, one) for one in draws]
    assert len({one.tobytes() for one in jittered}) == 6 and all(one.size == cat.size and one.mode == "RGB" for one in jittered)
    assert ColorJitter(0.4, 0.4, 0.4, 0.1)(cat, Visit("a", 3, 0).draws("augment/0")).tobytes() == jittered[3].tobytes()
    grey = Image.new("L", (4, 4), 100)
    levels = [np.asarray(ColorJitter(brightness=0.5)(grey, Visit("a", epoch, 0).draws("x")))[0, 0] for epoch in range(300)]
    assert 50 <= min(levels) < 53 and 147 < max(levels) <= 150
    red, turn = Image.new("RGB", (1, 1), (255, 0, 0)), ColorJitter(hue=0.5)
    hues = {turn(red, Visit("a", epoch, 0).draws("x")).getpixel((0, 0)) for epoch in range(60)}
    assert len(hues) > 40 and all(max(hue) >= 254 and min(hue) <= 1 for hue in hues)  # saturated as it was
    with pytest.raises(UserError, match="no saturation and no hue"):
        ColorJitter(hue=0.1)(grey, VISIT.draws("x"))
    with pytest.raises(UserError, match="one is above 0"):
        ColorJitter()
    some = [ColorJitter(brightness=0.5, probability=0.8)(grey, Visit("a", epoch, 0).draws("x")) for epoch in range(600)]
    assert abs(np.mean([one.tobytes() != grey.tobytes() for one in some]) - 0.8) < 0.05
    with pytest.raises(UserError, match="probability is 0"):
        ColorJitter(brightness=0.5, probability=0.0)


def test_rand_augment_is_what_torchvision_does(cat: Image.Image) -> None:
    """Every operation at magnitude 9 of 30, with both signs."""
    from l3m_like.core.torchvision_ops import allow_torchvision

    allow_torchvision()
    pytest.importorskip("torchvision")
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.autoaugment import _apply_op

    names = {"saturation": "Color", "autocontrast": "AutoContrast"}
    amounts = {"shear": 0.09, "translate_x": 150 / 331 * 451 * 0.3, "translate_y": 150 / 331 * 300 * 0.3, "rotate": 9.0}
    amounts |= dict.fromkeys(["brightness", "saturation", "contrast", "sharpness"], 0.27)
    amounts |= {"posterize": 7, "solarize": round(255 * 0.7)}
    for name, operation in _operations(0.3, cat.size).items():
        for sign in (1.0, -1.0):
            other = names.get(name, "".join(part.capitalize() for part in name.split("_")))
            amount = next((value for key, value in amounts.items() if name.startswith(key)), 0.0)
            if name not in ("posterize", "solarize"):
                amount *= sign
            expected = _apply_op(cat, other, amount, InterpolationMode.NEAREST, None)
            ours = operation(cat, -sign if name.startswith("translate") else sign)
            different = np.abs(np.asarray(ours).astype(int) - np.asarray(expected)).max(-1) > 1
            assert different.mean() < 0.02, (name, sign)
    made = {RandAugment(2, 9)(cat, Visit("a", epoch, 0).draws("x")).tobytes() for epoch in range(20)}
    assert len(made) > 14 and RandAugment()(cat, VISIT.draws("x")).tobytes() == RandAugment()(cat, VISIT.draws("x")).tobytes()
    assert RandAugment(3, 30)(cat.convert("L"), VISIT.draws("x")).mode == "L"


def test_augmented_samples_depend_on_the_visit_alone(cat: Image.Image) -> None:
    arguments = {"flip": True, "crop": RandomResizedCrop(), "augment": [ColorJitter(0.4, 0.4, 0.4, 0.1), RandAugment()]}
    sample, visits = {"png": encoded(cat), "cls": b"0"}, [Visit("a", epoch, seed) for epoch in range(3) for seed in range(2)]
    made = [ClassImage(48, **arguments)(sample, visit)["image"] for visit in visits]
    again = [ClassImage(48, **arguments)(sample, visit)["image"] for visit in reversed(visits)][::-1]
    assert all(np.array_equal(one, other) for one, other in zip(made, again))
    assert len({one.tobytes() for one in made}) == len(visits)
    # another augmentation behind it changes none of the draws before it
    longer = ClassImage(48, flip=True, crop=RandomResizedCrop(), augment=[ColorJitter(brightness=0.4)])(sample, VISIT)["image"]
    shorter = ClassImage(48, flip=True, crop=RandomResizedCrop())(sample, VISIT)["image"]
    ratio = (longer + 1).mean() / (shorter + 1).mean()
    assert 0.5 < ratio < 1.5 and np.corrcoef(longer.flatten(), shorter.flatten())[0, 1] > 0.97


def test_augmented_shipped_images_make_a_batch() -> None:
    process = ClassImage(28, 1, flip=True, crop=RandomResizedCrop((0.5, 1.0)), augment=[RandAugment()])
    dataset = Dataset(WebDataset("shipped:fashion_mnist.tar.gz", {"split": "heldout"}), process, Stack())
    assert dataset.check()["image"].shape == (1, 1, 28, 28)
    items = [dataset.item(index).data["image"] for index in range(50)]
    assert all(item.dtype == np.float32 and item.flags.c_contiguous and item.min() >= -1.01 for item in items)


@pytest.mark.parametrize(("wrong", "message"), [({}, None), ({"flp": True}, "no argument 'flp'. Did you mean 'flip'")])
def test_processors_are_written_in_yaml(wrong: dict, message: str | None, cat: Image.Image) -> None:
    from l3m_like.config.targets import check, instantiate

    node = {
        "_target_": "l3m_like.data.CaptionedImage",
        "size": 32,
        "vocab_size": 257,
        "max_tokens": 8,
        "flip": True,
        "crop": {"_target_": "l3m_like.data.RandomResizedCrop", "scale": [0.5, 1.0]},
        "augment": [{"_target_": "l3m_like.data.ColorJitter", "hue": 0.1}, {"_target_": "l3m_like.data.RandAugment"}],
    }
    if message is not None:
        with pytest.raises(UserError, match=message):
            check(node | wrong, "process")
        return
    process = instantiate(check(node, "process"), "process")
    assert isinstance(process.crop, RandomResizedCrop) and isinstance(process.augment[1], RandAugment)
    assert process({"png": encoded(cat), "txt": b"a cat"}, VISIT)["image"].shape == (3, 32, 32)


def test_padding_of_captions() -> None:
    padded = CaptionedImage(8, "bytes", vocab_size=257, max_tokens=4, pad=1).padded([5, 6])
    assert padded["text_ids"].tolist() == [5, 6, 1, 1] and padded["text_mask"].tolist() == [True, True, False, False]
    with pytest.raises(UserError, match="pad is 257"):
        CaptionedImage(8, "bytes", vocab_size=257, max_tokens=4, pad=257)


def test_captioned_image(cat: Image.Image, folder: Path) -> None:
    picture = encoded(cat, "JPEG")
    process = CaptionedImage(32, vocab_size=257, max_tokens=8, flip=True)
    made = process({"jpg": picture, "txt": "Zoë".encode()}, VISIT)
    assert made["text_ids"].tolist() == [*"Zoë".encode(), 256, 0, 0, 0]
    assert made["text_mask"].tolist() == [True] * 5 + [False] * 3
    assert made["image"].shape == (3, 32, 32)
    cut = process({"jpg": picture, "txt": "a long caption"}, VISIT)
    assert cut["text_ids"].tolist() == [*b"a long ", 256] and cut["text_mask"].all()
    path = str(folder / "tokenizer.json")
    started = CaptionedImage(32, path, vocab_size=700, max_tokens=12, start="<|im_start|>", end="<|im_end|>", field="caption")
    started.check()
    ids = started({"jpg": picture, "caption": "The cat."}, VISIT)["text_ids"]
    marks = [started.tokenizer.id_of(token) for token in ("<|im_start|>", "<|im_end|>")]
    assert ids[0] == marks[0] and started.tokenizer.decode(ids[1 : ids.tolist().index(marks[1])]) == "The cat."
    with pytest.raises(UserError, match="has no token '<start>'"):
        CaptionedImage(32, path, vocab_size=700, max_tokens=8, start="<start>").check()
    with pytest.raises(UserError, match="needs a text 'txt'"):
        process({"jpg": picture}, VISIT)
    with pytest.raises(UserError, match="max_tokens is 1"):
        CaptionedImage(32, vocab_size=257, max_tokens=1)
    keys = Dataset(WebDataset("x.tar"), process, Stack()).keys()
    assert keys["text_ids"].shape(B=2) == (2, 8) and keys["text_mask"].dtype == torch.bool


def test_a_conversation_with_images(cat: Image.Image, folder: Path) -> None:
    image = "<|im_start|><fim_middle><|im_end|>"  # stand for the model's vision tokens
    talk = chat(folder, image=image)
    process = ChatImages(talk, Pixels(16), "<fim_middle>", tokens_per_image=5)
    process.check()
    parts = [{"type": "image", "image": "b.png"}, {"type": "text", "text": "Which?"}, {"type": "image", "image": "a.jpg"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Both."}]
    members = {"a.jpg": encoded(cat, "JPEG"), "b.png": encoded(Image.new("RGB", (16, 16), (255, 0, 0)))}
    made = process({"json": json.dumps({"messages": messages}).encode(), **members}, VISIT)
    assert made["images"].shape == (2, 3, 16, 16) and made["images"][0, :, 0, 0].tolist() == [1, -1, -1]
    text = talk({"messages": [{**messages[0], "content": f"{image}Which?{image}"}, messages[1]]}, VISIT)
    pad = talk.tokenizer.id_of("<fim_middle>")
    assert (made["ids"] == pad).sum() == 10 and len(made["ids"]) == len(text["ids"]) + 8
    assert made["ids"][made["ids"] != pad].tolist() == text["ids"][text["ids"] != pad].tolist()
    at = np.flatnonzero(made["ids"] == pad)
    assert np.diff(at).tolist().count(1) == 8 and not made["trained"][at].any()
    assert talk.decode(made["ids"][made["trained"]]) == "Both."
    assert not ChatImages(chat(folder, image=image, train_on="all"), Pixels(16), "<fim_middle>", 5)(
        {"messages": messages, **members}, VISIT
    )["trained"][at].any()
    none = process({"messages": CONVERSATION}, VISIT)
    assert none["images"].shape == (0, 3, 16, 16) and none["images"].dtype == np.float32
    with pytest.raises(UserError, match="2 images, but <fim_middle> stands 3 times"):
        process({"messages": [*messages, {"role": "user", "content": "a <fim_middle> b"}], **members}, VISIT)
    with pytest.raises(UserError, match=r"the image 'b.png' is not in the sample.*a.jpg"):
        process({"messages": messages, "a.jpg": b""}, VISIT)
    with pytest.raises(UserError, match="does not name its picture"):
        process({"messages": [{"role": "user", "content": [{"type": "image"}]}, messages[1]]}, VISIT)
    with pytest.raises(UserError, match="holds '<fim_prefix>' 0 times"):
        ChatImages(talk, Pixels(16), "<fim_prefix>", 5)
    with pytest.raises(UserError, match="no token '<pad>'"):
        ChatImages(chat(folder, image="<pad>"), Pixels(16), "<pad>", 5).check()


# ---- video and sound ---------------------------------------------------------------------------------------------------


def film(count: int, *, fps: int = 10, codec: str = "libx264", kind: str = "mp4", turned: int = 0) -> bytes:
    """Frames of 64 x 48; frame k is grey of level 8 * k + 4, and its left third black. ``turned`` when it is shown, degrees."""
    av = pytest.importorskip("av")
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.bit_rate = 8, 4_000_000
        if turned:
            stream.set_display_rotation(turned)
        for k in range(count):
            picture = np.full((48, 64, 3), 8 * k + 4, np.uint8)
            picture[:, :21] = 0
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def numbers_of(video: np.ndarray) -> list[int]:
    """Which frame of ``film`` each is."""
    levels = (video[:, :, 8:24, 20:28].mean((1, 2, 3)) + 1) * 127.5
    return [round((level - 4) / 8) for level in levels]


@pytest.mark.parametrize(("codec", "kind"), [("libx264", "mp4"), ("mpeg4", "mp4"), ("libvpx", "webm")])
def test_which_frames_are_taken(codec: str, kind: str) -> None:
    sample = {kind: film(30, codec=codec, kind=kind)}
    made = Video(5, 32)(sample, VISIT)["video"]
    assert made.shape == (5, 3, 32, 32) and made.dtype == np.float32 and numbers_of(made) == [3, 9, 15, 21, 27]
    assert numbers_of(Video(30, 32, channels=1)(sample, VISIT)["video"]) == list(range(30))
    starts = set()
    for epoch in range(12):
        numbers = numbers_of(Video(4, 32, stride=6)(sample, Visit("a", epoch, 0))["video"])
        assert np.diff(numbers).tolist() == [6, 6, 6] and 0 <= numbers[0] <= 11
        starts.add(numbers[0])
        numbers = numbers_of(Video(4, 32, fps=2.5)(sample, Visit("a", epoch, 0))["video"])
        assert np.diff(numbers).tolist() == [4, 4, 4] and numbers[-1] <= 29
    assert len(starts) > 4
    twice = numbers_of(Video(4, 32, fps=20)(sample, VISIT)["video"])  # more than the file has: each is shown twice
    assert len(set(twice)) in (2, 3) and twice[-1] - twice[0] in (1, 2)


def test_frames_are_changed_alike() -> None:
    sample = {"mp4": film(12)}
    plain, process = Video(4, 32)(sample, VISIT)["video"], Video(4, 32, flip=True)
    flipped = [process(sample, Visit("a", epoch, 0))["video"] for epoch in range(12)]
    assert all(np.array_equal(one, plain) or np.array_equal(one, plain[..., ::-1]) for one in flipped)
    assert len({one.tobytes() for one in flipped}) == 2
    cropped = Video(4, 32, crop=RandomResizedCrop((0.2, 0.9)))(sample, VISIT)["video"]
    borders = (cropped + 1 > (cropped + 1).max((1, 2, 3), keepdims=True) / 2).mean((1, 2, 3))
    assert 0.2 < borders.min() <= borders.max() < 0.99 and borders.max() - borders.min() < 0.05


def test_a_video_is_turned_as_players_show_it() -> None:
    av = pytest.importorskip("av")
    if not hasattr(av.video.stream.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write a rotation")
    plain = Video(2, 48)({"mp4": film(20)}, VISIT)["video"]
    for turned in (90, 180, -90):
        content = film(20, turned=turned)
        with av.open(io.BytesIO(content)) as container:
            counterclockwise = next(container.decode(video=0)).rotation // 90
        assert counterclockwise
        shown = Video(2, 48)({"mp4": content}, VISIT)["video"]
        assert np.abs(shown - np.rot90(plain, counterclockwise, axes=(2, 3))).max() < 0.05


def test_videos_that_cannot_be_taken() -> None:
    sample = {"mp4": film(10)}
    with pytest.raises(UserError, match="has 10 frames; 11 frames with stride 1 need 11"):
        Video(11, 32)(sample, VISIT)
    with pytest.raises(UserError, match="has 10 frames; 4 frames with stride 4 need 13"):
        Video(4, 32, stride=4)(sample, VISIT)
    with pytest.raises(UserError, match=r"is 1.00 s long; 4 frames at fps 2.5 need more than 1.20 s"):
        Video(4, 32, fps=2.5)(sample, VISIT)
    with pytest.raises(UserError, match="give one of them"):
        Video(4, 32, fps=2.5, stride=2)
    with pytest.raises(UserError, match="cannot be decoded: .*Invalid data"):
        Video(4, 32)({"mp4": b"nothing" * 99}, VISIT)
    webm = film(30, codec="libvpx", kind="webm")
    broken = webm[: len(webm) // 2] + bytes(len(webm) // 2)
    with pytest.raises(UserError, match="cannot be decoded|has .* frames"):
        Video(30, 32)({"webm": broken}, VISIT)
    with pytest.raises(UserError, match="no video stream"):
        Video(4, 32)({"mp4": wave(100)}, VISIT)
    with pytest.raises(UserError, match=r"has \['txt'\]"):
        Video(4, 32)({"txt": b""}, VISIT)


def test_class_video() -> None:
    process = ClassVideo(3, 16)
    made = process({"mp4": film(6), "cls": b"9"}, VISIT)
    assert int(made["video_label"]) == 9 and made["video"].min() >= -1
    assert Dataset(WebDataset("x.tar"), process, Stack()).keys()["video"].shape(B=2) == (2, 3, 3, 16, 16)
    with pytest.raises(UserError, match="needs 'cls'"):
        process({"mp4": film(6)}, VISIT)


def wave(samples: int, *, rate: int = 16000, codec: str = "pcm_s16le", kind: str = "wav", tone: float = 440.0) -> bytes:
    """A tone of amplitude 0.5 on the left, and the same on the right."""
    av = pytest.importorskip("av")
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate, layout="stereo")
        sound = np.sin(2 * np.pi * tone * np.arange(samples) / rate) * 0.5 * 32767
        both = np.repeat(sound.astype(np.int16), 2).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(both, format="s16", layout="stereo")
        frame.sample_rate = rate
        resampler = av.AudioResampler(stream.format, "stereo", rate, frame_size=stream.frame_size or None)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode())
    return out.getvalue()


SOUNDS = [("pcm_s16le", "wav", 16000), ("flac", "flac", 44100), ("libmp3lame", "mp3", 44100)]


@pytest.mark.parametrize(("codec", "kind", "rate"), SOUNDS)
def test_sound_is_resampled_and_mixed(codec: str, kind: str, rate: int) -> None:
    made = Audio(8000, 0.5)({kind: wave(rate, rate=rate, codec=codec, kind=kind)}, VISIT)
    audio = made["audio"]
    assert audio.shape == (4000,) and audio.dtype == np.float32 and int(made["audio_length"]) == 4000
    assert np.abs(np.fft.rfft(audio)).argmax() == 220  # 440 Hz in half a second
    assert abs(np.abs(audio[500:-500]).max() - 0.5) < 0.04


def test_sound_parts_and_padding() -> None:
    sample = {"wav": wave(1600)}
    whole = Audio(16000, 0.1)(sample, VISIT)["audio"]
    assert np.allclose(whole, np.sin(2 * np.pi * 440 * np.arange(1600) / 16000) * 0.5, atol=1e-4)
    short = Audio(16000, 0.2)(sample, VISIT)
    assert int(short["audio_length"]) == 1600 and np.array_equal(short["audio"][:1600], whole) and not short["audio"][1600:].any()
    for epoch in range(8):
        part = Audio(16000, 0.03)(sample, Visit("a", epoch, 0))["audio"]
        places = [k for k in range(1600 - 480 + 1) if np.array_equal(whole[k : k + 480], part)]
        assert places
    first = Audio(16000, 0.03)(sample, Visit("a", 0, 0))["audio"]
    assert not np.array_equal(first, part) and np.array_equal(first, Audio(16000, 0.03)(sample, Visit("a", 0, 0))["audio"])
    with pytest.raises(UserError, match="sound cannot be decoded"):
        Audio(16000, 0.1)({"wav": b"nothing" * 99}, VISIT)
    with pytest.raises(UserError, match="has no sound"):
        Audio(16000, 0.1)({"m4a": film(4)}, VISIT)
    with pytest.raises(UserError, match="less than one sample"):
        Audio(16000, 0)
