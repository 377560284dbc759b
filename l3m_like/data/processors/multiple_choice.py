"""Questions with several answers of which one is right (HellaSwag, ARC): all answers of a question in one row."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.keys import KeySpec
from l3m_like.data.packing import IGNORED, PADDING
from l3m_like.data.paths import resolve
from l3m_like.data.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from l3m_like.data.dataset import Visit


class MultipleChoice:
    """A question -> a row of ``length`` tokens: document c is the context with choice c, and its targets are the choice's tokens.

    Since a question never leaves its row, its accuracy is the same for every batch size and number of processes. Use it with
    ``pack: l3m_like.data.Stack`` and the metric ``l3m_like.losses.ChoiceAccuracy``.

    Writes ``<stream>_ids``, ``_targets``, ``_positions`` int64 [S] and ``_document_ids`` int32 [S] as packed text has them;
    ``_choice_bytes`` int64 [C], UTF-8 bytes of every choice (0: the question has no such choice); ``_answer`` int64 [].

    Args:
        tokenizer, vocab_size, end: as ``Tokenize``.
        length: S, tokens of a row: room for all choices of a question, each with its context.
        context: the text before a choice, with the record's fields in braces: ``"{ctx}"`` (HellaSwag),
            ``"Question: {question}\\nAnswer:"`` (ARC).
        choices: the field that lists the choices, with dots into nested fields: ``endings``, ``choices.text``.
        answer: the field of the right one: its number from 0, or with ``labels`` its label.
        labels: the field that lists the choices' labels: ``choices.label``.
        before: between context and choice.
        shots: records of ``shots_from`` that are shown, with their right choice, before each question: its first ones.
        shots_from: a JSON-lines file (see ``l3m_like.data.paths.resolve``).
        between: after each of them.
        max_choices: C.
        stream: prefix of the keys.

    Raises:
        UserError: settings that do not fit together; by a call: fields that the record lacks, more choices than
            ``max_choices``, a question that does not fit into the row.
    """

    unit = "questions"

    def __init__(
        self,
        tokenizer: str = "bytes",
        *,
        vocab_size: int,
        length: int,
        context: str = "{ctx}",
        choices: str = "endings",
        answer: str = "label",
        labels: str | None = None,
        before: str = " ",
        shots: int = 0,
        shots_from: str | None = None,
        between: str = "\n\n",
        max_choices: int = 4,
        end: str | None = None,
        stream: str = "text",
    ) -> None:
        if (shots > 0) != (shots_from is not None):
            raise UserError(f"MultipleChoice: shots is {shots} and shots_from {shots_from}; give both, or none.")
        if max_choices < 2 or length < 2:
            raise UserError(f"MultipleChoice: max_choices is {max_choices} and length {length}; both are at least 2.")
        self.tokenizer = TextTokenizer(tokenizer, vocab_size, end)
        self.length, self.max_choices, self.stream = length, max_choices, stream
        self.context, self.choices, self.answer, self.labels, self.before = context, choices, answer, labels, before
        self.shots, self.shots_from, self.between = shots, shots_from, between

    def keys(self) -> dict[str, KeySpec]:
        row, integer = (self.length,), torch.int64
        specs = {
            "ids": KeySpec(integer, row, 0, "tokens of the context with each choice"),
            "targets": KeySpec(integer, row, 0, "the next token where it belongs to a choice, -100: elsewhere"),
            "positions": KeySpec(integer, row, 0, "position in the document"),
            "document_ids": KeySpec(torch.int32, row, 0, "choice of the row, -1: padding"),
            "choice_bytes": KeySpec(integer, (self.max_choices,), None, "bytes of each choice, 0: there is none"),
            "answer": KeySpec(integer, (), None, "the right choice"),
        }
        return {f"{self.stream}_{name}": spec for name, spec in specs.items()}

    def check(self) -> None:
        """Read the tokenizer's file and the shots."""
        _ = self.tokenizer.end_id, self._prefix

    def __call__(self, sample: Mapping[str, Any], visit: Visit) -> dict[str, np.ndarray]:
        context, choices, answer = self.question(sample)
        context = self._prefix + context
        ids, targets = np.zeros(self.length, dtype=np.int64), np.full(self.length, IGNORED, dtype=np.int64)
        positions, documents = np.zeros(self.length, dtype=np.int64), np.full(self.length, PADDING, dtype=np.int32)
        at = 0
        pairs = [continuation(self.tokenizer, context, self.before + choice) for choice in choices]
        needed = sum(len(given) + len(new) - 1 for given, new in pairs)
        if needed > self.length:
            raise UserError(f"the choices with their contexts have {needed} tokens, a row {self.length}: raise process.length.")
        for number, (given, new) in enumerate(pairs):
            whole = np.concatenate((given, new))
            stop = at + len(whole) - 1  # what follows the last token is nobody's
            ids[at:stop], documents[at:stop] = whole[:-1], number
            positions[at:stop] = np.arange(len(whole) - 1)
            targets[stop - len(new) : stop] = new
            at = stop
        sizes = [len(choice.encode()) for choice in choices]
        arrays: dict[str, np.ndarray] = {
            "ids": ids,
            "targets": targets,
            "positions": positions,
            "document_ids": documents,
            "choice_bytes": np.array(sizes + [0] * (self.max_choices - len(sizes)), dtype=np.int64),
            "answer": np.array(answer, dtype=np.int64),
        }
        return {f"{self.stream}_{name}": array for name, array in arrays.items()}

    def question(self, sample: Mapping[str, Any]) -> tuple[str, list[str], int]:
        """``(context, choices, number of the right one)`` of a record."""
        try:
            context = self.context.format_map(sample)
        except KeyError as error:
            name = str(error.args[0])
            raise UserError(f"the record has no field '{name}' (key: context). {did_you_mean(name, sample)}") from None
        choices = [str(choice) for choice in _field(sample, self.choices, "choices")]
        if not 2 <= len(choices) <= self.max_choices:
            raise UserError(f"the question has {len(choices)} choices, and max_choices is {self.max_choices}.")
        if not all(choices):
            raise UserError("a choice of the question is empty.")
        answer = _field(sample, self.answer, "answer")
        if self.labels is not None:
            labels = [str(label) for label in _field(sample, self.labels, "labels")]
            if str(answer) not in labels:
                raise UserError(f"the answer '{answer}' is none of the labels {labels}.")
            return context, choices, labels.index(str(answer))
        if not str(answer).isdecimal() or not int(answer) < len(choices):
            raise UserError(f"the answer is {answer!r}; it is a number from 0 to {len(choices) - 1}, or set `labels`.")
        return context, choices, int(answer)

    @cached_property
    def _prefix(self) -> str:
        """The shown questions."""
        if self.shots_from is None:
            return ""
        lines: list[str] = []
        for path in resolve(self.shots_from):
            with path.open(encoding="utf-8") as file:
                lines += itertools.islice((line for line in file if line.strip()), self.shots - len(lines))
        if len(lines) < self.shots:
            raise UserError(f"shots is {self.shots}, but {self.shots_from} has {len(lines)} records.")
        shown = (self.question(json.loads(line)) for line in lines)
        return "".join(f"{context}{self.before}{choices[answer]}{self.between}" for context, choices, answer in shown)


def continuation(tokenizer: TextTokenizer, context: str, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of ``context`` and of ``text`` behind it, int64.

    They are encoded together, since a token may begin with the space before a word: what stands behind as many tokens as the
    context alone has belongs to the text, and so does whitespace at the context's end. An empty context is the end-of-document
    token. (lm-evaluation-harness does the same.)
    """
    stripped = context.rstrip()
    text = context[len(stripped) :] + text
    if not stripped:
        return np.array([tokenizer.end_id], dtype=np.int64), tokenizer.encode(text)
    whole, given = tokenizer.encode(stripped + text), len(tokenizer.encode(stripped))
    return whole[:given], whole[given:]


def _field(sample: Mapping[str, Any], path: str, key: str) -> Any:
    value: Any = sample
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            names: Sequence[str] = list(value) if isinstance(value, Mapping) else ()
            raise UserError(f"the record has no field '{path}' (key: {key}). {did_you_mean(name, names)}")
        value = value[name]
    return value
