"""How a conversation is written as text, and which of its characters the assistant says.

A template gives *segments*, ``(text, said)`` in order: their texts together are the conversation, and ``said`` marks what the
assistant says, its end-of-turn token included, the header of its turn not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.data.paths import resolve

if TYPE_CHECKING:
    from jinja2 import Template as JinjaProgram

ROLES = ("system", "user", "assistant", "tool")
Message = Mapping[str, Any]
Segments = list[tuple[str, bool]]
#: around what a template's own {% generation %} blocks write: two characters that Unicode keeps out of every text
OPEN, CLOSE = "\ufdd0", "\ufdd1"


class Template(Protocol):
    @property
    def stop(self) -> str | None:
        """The token at which the assistant's turn ends, by its text; None: the template does not say."""

    def segments(self, messages: Sequence[Message], tools: Any = None, last: bool = False) -> Segments:
        """The conversation. ``last``: of the assistant's turns only the last counts as said."""

    def prompt(self, messages: Sequence[Message]) -> str:
        """The conversation up to where the assistant's next words begin."""


@dataclass(frozen=True)
class Turns:
    """Every message the same way: ``header``, with the role in it, the content and ``end``; ``said`` from content to ``end``.

    Args:
        header: before the content; ``{role}`` is the role, ``{Role}`` the same with a capital letter.
        end: ends a turn, and is said. after: follows it, and is not.
        start: before the first message.
        before: between header and content, and said: a space that tokenizers join with the word after it.
        strip: take spaces around the content away.
        stop: see ``Template``.
    """

    header: str
    end: str
    after: str = ""
    start: str = ""
    before: str = ""
    strip: bool = False
    stop: str | None = None

    def segments(self, messages: Sequence[Message], tools: Any = None, last: bool = False) -> Segments:
        if tools:
            raise UserError("the sample has tools, and this template has no place for them. Give the model's own template.")
        final = max((place for place, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
        parts: Segments = [(self.start, False)]
        for place, message in enumerate(messages):
            if message["role"] not in ROLES:
                raise UserError(f"message {place} has the role '{message['role']}'. {did_you_mean(message['role'], ROLES)}")
            if not isinstance(message["content"], str):
                raise UserError(f"message {place} has no text, and this template writes nothing else.")
            content = message["content"].strip() if self.strip else message["content"]
            said = message["role"] == "assistant" and (place == final or not last)
            parts += [(self._header(message["role"]), False), (self.before + content + self.end, said), (self.after, False)]
        return [part for part in parts if part[0]]

    def prompt(self, messages: Sequence[Message]) -> str:
        return "".join(text for text, _ in self.segments(messages)) + self._header("assistant")

    def _header(self, role: str) -> str:
        return self.header.format(role=role, Role=role.capitalize())


TEMPLATES = {
    # Qwen and others; without a default system message
    "chatml": Turns("<|im_start|>{role}\n", "<|im_end|>", after="\n", stop="<|im_end|>"),
    # Llama 3.0
    "llama3": Turns(
        "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", start="<|begin_of_text|>", strip=True, stop="<|eot_id|>"
    ),
    "plain": Turns("{Role}:", "\n", before=" "),
}


class JinjaTemplate:
    """A published model's template: a Jinja file, or a ``tokenizer_config.json`` with a ``chat_template``. Read at first use.

    It runs as in transformers: sandboxed, with the special tokens of the ``tokenizer_config.json`` (of a Jinja file: of the
    one beside it); but without today's date (``strftime_now``), since a sample must be the same tomorrow.

    What the assistant says is what ``{% generation %}`` blocks write (``last``: the last of them). A template without them is
    rendered up to each of the assistant's turns and after it: each must be the beginning of the whole.

    Raises (by ``segments``):
        DataMissing: no such file. UserError: no template in it; the template refuses the conversation; it writes a turn
        differently when others follow.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    @property
    def stop(self) -> str | None:
        return self._special.get("eos_token")

    def segments(self, messages: Sequence[Message], tools: Any = None, last: bool = False) -> Segments:
        whole = self._render(messages, tools)
        borders = self._marked(whole) if OPEN in whole else self._by_turns(whole, messages, tools, last)
        whole = whole.replace(OPEN, "").replace(CLOSE, "")
        if last:
            borders = borders[-2:]
        places = [0, *borders, len(whole)]
        return [(whole[a:b], number % 2 == 1) for number, (a, b) in enumerate(pairwise(places)) if b > a]

    def prompt(self, messages: Sequence[Message]) -> str:
        return self._render(messages, None, prompt=True).replace(OPEN, "").replace(CLOSE, "")

    def _marked(self, whole: str) -> list[int]:
        """Where {% generation %} blocks begin and end, in the text without the marks."""
        places = [place for place, letter in enumerate(whole) if letter in (OPEN, CLOSE)]
        return [place - number for number, place in enumerate(places)]

    def _by_turns(self, whole: str, messages: Sequence[Message], tools: Any, last: bool) -> list[int]:
        """Where the assistant's words begin and end, found by rendering beginnings of the conversation."""
        turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        borders = []
        for place in turns[-1:] if last else turns:
            before = self._render(messages[:place], tools, prompt=True)
            after = whole if place + 1 == len(messages) else self._render(messages[: place + 1], tools)
            if not (after.startswith(before) and whole.startswith(after)):
                raise UserError(
                    f"template: {self.path} writes the conversation up to message {place} differently when more follows, so what "
                    "the assistant says there is not known. Mark it in the template with {% generation %} .. {% endgeneration %}"
                    " (or train on the last turn alone, train_on: last)."
                )
            said, content = after[len(before) :], str(messages[place]["content"] or "").strip()
            has_header = before != self._render(messages[:place], tools)
            if not (content in said if has_header else said.lstrip().startswith(content)):
                raise UserError(
                    f"template: {self.path} writes message {place} as {said[:80]!r}, which is not its content alone. Mark what "
                    "the assistant says in the template with {% generation %} .. {% endgeneration %}."
                )
            # spaces after an end-of-turn token are not said; where nothing else ends the turn, they are its end
            trimmed = said.rstrip()
            bare = trimmed.endswith(content) if content else not trimmed
            borders += [len(before), len(before) + len(said if bare else trimmed)]
        return borders

    def _render(self, messages: Sequence[Message], tools: Any, prompt: bool = False) -> str:
        from jinja2 import TemplateError

        if any(mark in json.dumps([messages, tools], ensure_ascii=False) for mark in (OPEN, CLOSE)):
            raise UserError("the conversation has a character U+FDD0 or U+FDD1, which no text may have. Remove it.")
        try:
            return self._program.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **self._special
            )
        except (TemplateError, TypeError) as error:
            raise UserError(f"template: {self.path} refuses {len(messages)} messages: {error}") from error

    @cached_property
    def _file(self) -> Path:
        (path,) = resolve(self.path)
        return path

    @cached_property
    def _config(self) -> dict[str, Any]:
        """The tokenizer_config.json, {} if there is none beside a Jinja file."""
        path = self._file if self._file.suffix == ".json" else self._file.with_name("tokenizer_config.json")
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @cached_property
    def _special(self) -> dict[str, str]:
        """``bos_token``, ``eos_token`` and the like, by their texts."""
        named = {name: value for name, value in self._config.items() if name.endswith("_token")}
        texts = {name: value["content"] if isinstance(value, dict) else value for name, value in named.items()}
        return {name: text for name, text in texts.items() if isinstance(text, str)}

    @cached_property
    def _program(self) -> JinjaProgram:
        from jinja2 import TemplateError, meta

        source: Any = self._file.read_text(encoding="utf-8")
        if self._file.suffix == ".json":
            source = self._config.get("chat_template")
        if isinstance(source, list):  # several by name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if not isinstance(source, str):
            raise UserError(f"template: {self._file} has no `chat_template`. Give the Jinja file that the model comes with.")
        environment = _environment()
        try:
            wanted = {"bos_token", "eos_token"} & meta.find_undeclared_variables(environment.parse(source)) - set(self._special)
            if wanted and not self._config:
                raise UserError(f"template: {self._file} writes {sorted(wanted)}; put its tokenizer_config.json beside it.")
            return environment.from_string(source)
        except TemplateError as error:
            raise UserError(f"template: {self._file} is not a Jinja template: {error}") from error


def _environment() -> Any:
    """The Jinja environment that transformers gives to chat templates."""
    from jinja2 import TemplateError, ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """``{% generation %} .. {% endgeneration %}``: its content between OPEN and CLOSE."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            opened, closed = (nodes.Output([nodes.TemplateData(mark)]) for mark in (OPEN, CLOSE))
            return nodes.Scope([opened, *body, closed]).set_lineno(line)

    def tojson(value: Any, **how: Any) -> str:
        return json.dumps(value, **({"ensure_ascii": False} | how))  # Jinja's own escapes HTML

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment
