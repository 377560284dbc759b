"""A conversation to token ids, and which of them the model is trained to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.keys import KeySpec
from l3m_like.data.chat_templates import TEMPLATES, JinjaTemplate, Template
from l3m_like.data.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from l3m_like.data.dataset import Visit

TRAIN_ON = ("assistant", "last", "all")


class Chat:
    """``{"messages": [{"role", "content"}, ..]}`` -> ``ids`` int64 [T], ``trained`` bool [T]: this token is a target.

    The whole conversation is written as one text and tokenized at once, as transformers' ``apply_chat_template`` does. A
    content is a text, or a list of ``{"type": "text", "text": ..}`` (and of ``{"type": "image"}``, with ``image``), which are
    put together. ``tools`` of the sample goes to a Jinja template.

    Args:
        tokenizer, vocab_size: see ``TextTokenizer``.
        template: ``"chatml"`` (Qwen and others), ``"llama3"``, ``"plain"`` (``User: ..``, ``Assistant: ..``, a line each); or the
            path of a Jinja file or of a ``tokenizer_config.json`` (see ``JinjaTemplate``).
        train_on: ``"assistant"``: all that the assistant says and the end-of-turn tokens; ``"last"``: only its last turn;
            ``"all"``: every token, headers too. A token with a character outside is not trained on. With ``"plain"`` the space
            after ``Assistant:`` belongs to what is said, since tokenizers join it with the first word.
        system: the system message of a conversation that does not begin with one.
        end: the token at which the assistant stops, by its text; None: the template's. Bytes and ``"plain"`` have no such
            token: there the end-of-document token is put after the conversation, as is an ``end`` that the template does not
            write.
        image: what is written for an image, e.g. ``<|vision_start|><|image_pad|><|vision_end|>``; None: images are refused.

    Raises:
        UserError: an unknown template or ``train_on``; messages that are none; a conversation without the assistant; a token of
            the template that the tokenizer does not have; see ``TextTokenizer`` and ``JinjaTemplate``.
    """

    def __init__(
        self,
        tokenizer: str = "bytes",
        *,
        vocab_size: int,
        template: str = "chatml",
        train_on: str = "assistant",
        system: str | None = None,
        end: str | None = None,
        image: str | None = None,
    ) -> None:
        if train_on not in TRAIN_ON:
            raise UserError(f"train_on: '{train_on}'. {did_you_mean(train_on, TRAIN_ON)}")
        if template not in TEMPLATES and not template.endswith((".json", ".jinja", ".jinja2", ".j2")):
            raise UserError(
                f"template: '{template}' is neither a template of this library nor the path of a .jinja or .json file. "
                f"{did_you_mean(template, TEMPLATES)}"
            )
        self.tokenizer = TextTokenizer(tokenizer, vocab_size, end)
        self.template: Template = TEMPLATES[template] if template in TEMPLATES else JinjaTemplate(template)
        self.train_on = train_on
        self.system = system
        self.image = image

    def keys(self) -> dict[str, KeySpec]:
        return {
            "ids": KeySpec(torch.int64, ("T",), sequence_dim=0, meaning="tokens of one conversation"),
            "trained": KeySpec(torch.bool, ("T",), sequence_dim=0, meaning="whether the token is a target"),
        }

    def check(self) -> None:
        """Read the files of tokenizer and template, and compare them."""
        _ = self.end_id, self._ends, self.encode("a")

    def __call__(self, sample: Mapping[str, Any], visit: Visit) -> dict[str, np.ndarray]:
        ids, trained, _, _ = self._tokens(sample)
        return {"ids": ids, "trained": trained}

    def show(self, sample: Mapping[str, Any]) -> list[tuple[str, bool]]:
        """The conversation as text, cut where it changes between trained on and not; a last ``""`` is an end token after it."""
        _, trained, spans, text = self._tokens(sample)
        flags = np.zeros(len(text), dtype=bool)
        for (first, last), flag in zip(spans, trained, strict=False):
            flags[first:last] = flag
        runs = [(flag, [place for place, _ in run]) for flag, run in groupby(enumerate(flags), key=lambda pair: bool(pair[1]))]
        shown = [(text[run[0] : run[-1] + 1], flag) for flag, run in runs]
        return shown + [("", bool(flag)) for flag in trained[len(spans) :]]

    def encode(self, text: str) -> list[int]:
        """A prompt: the user says ``text``, and the assistant's turn begins."""
        messages = self._messages({"messages": [{"role": "user", "content": text}]})
        return self.tokenizer.encode(self.template.prompt(messages)).tolist()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; the end token gives nothing, broken UTF-8 the replacement character."""
        return self.tokenizer.decode(ids)

    @cached_property
    def end_id(self) -> int:
        """The id of the token at which the assistant stops."""
        stop = self.template.stop if self.tokenizer.end is None else None
        if stop is None or self.tokenizer.is_bytes:
            return self.tokenizer.end_id
        token = self.tokenizer.id_of(stop)
        if token is None:
            raise UserError(
                f"template: it ends turns with '{stop}', which {self.tokenizer.path} does not have. Take the template of this "
                "tokenizer's model, or name the end token in `end`."
            )
        return token

    @cached_property
    def _ends(self) -> bool:
        """Whether the end token is put after the conversation: the template does not write it."""
        if self.tokenizer.is_bytes or self.template is TEMPLATES["plain"]:
            return True
        end = self.tokenizer.end
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        return end is not None and not any(end in text for text, _ in self.template.segments(probe, last=True))

    def _tokens(self, sample: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
        """ids [T], trained [T], the characters of all tokens but an end token after the conversation [T or T - 1, 2], text."""
        segments = self.template.segments(self._messages(sample), sample.get("tools"), last=self.train_on == "last")
        if self._ends and segments and any(said for _, said in segments):
            # what only closes the last turn is said with it, up to the end token
            *others, (closing, said) = segments
            if not said and not closing.strip() and others[-1][1]:
                segments = [*others, (closing, True)]
        text = "".join(part for part, _ in segments)
        ids, spans = self.tokenizer.encode_spans(text)
        flags = np.concatenate([np.full(len(part), said) for part, said in segments])
        before = np.concatenate([[0], np.cumsum(flags)])  # how many characters before a place are said
        first, last = spans.T
        trained = (before[last] - before[first] == last - first) & (last > first)
        if self.train_on == "all":
            trained[:] = True
        elif not trained.any():
            raise UserError("the assistant says nothing in this conversation, so there is nothing to train on. Leave it out.")
        if self._ends:
            ids = np.append(ids, np.int64(self.end_id))
            trained = np.append(trained, self.train_on == "all" or segments[-1][1])
        return ids, trained, spans, text

    def _messages(self, sample: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The conversation with contents of text, and with the system message."""
        messages = sample.get("messages")
        if not isinstance(messages, list) or not messages:
            raise UserError(f"the sample has {sorted(sample)}; it needs 'messages', a list of {{role, content}}.")
        for place, message in enumerate(messages):
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise UserError(f"message {place} is {message!r:.80}; it needs 'role' and 'content'.")
        plain = [{**message, "content": self._text(message["content"], place)} for place, message in enumerate(messages)]
        if self.system is not None and plain[0]["role"] != "system":
            plain.insert(0, {"role": "system", "content": self.system})
        return plain

    def _text(self, content: Any, place: int) -> str | None:
        """The text of a content; None of a message that only calls tools."""
        if content is None or isinstance(content, str):
            return content
        if not isinstance(content, list) or not all(isinstance(part, Mapping) and "type" in part for part in content):
            raise UserError(f"message {place} has the content {content!r:.80}; it is a text, or a list of {{type, ..}}.")
        media = sorted({part["type"] for part in content} - ({"text"} if self.image is None else {"text", "image"}))
        if media:
            hint = " Name what is written for an image in `image`." if media == ["image"] else ""
            raise UserError(f"message {place} has parts of type {media}; Chat takes text.{hint}")
        return "".join(part["text"] if part["type"] == "text" else str(self.image) for part in content)
