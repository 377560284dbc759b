"""Chats in JSON: turns of text, images, video and audio."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.data.columns import load_media
from l3m_like.data.paths import resolve_folder
from l3m_like.data.sources.json_lines import JsonLines

MEDIA = ("image", "video", "audio")
#: ShareGPT's names of who speaks
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


class ChatJson:
    """``{"messages": [{"role": .., "content": [part, ..]}, ..]}`` of each record of a ``.jsonl`` or ``.json``.

    A part is ``{"type": "text", "text": ..}`` or ``{"type": "image" | "video" | "audio", "bytes": .., "name": ..}``: the file's
    content, and its path as the record gives it. Other fields of a message (``tool_calls``) stay as they are.

    A record has one of:

    - ``messages``, as OpenAI's API takes them; the path or ``data:`` URL of a medium may stand in any of the usual places.
    - ``conversations``: ``[{from, value}]``, as in ShareGPT and LLaVA.
    - the fields ``prompt`` and ``response``, if those arguments are given.

    In text, ``<image>``, ``<video>`` and ``<audio>`` stand for the files of the record's ``image`` or ``images`` (``video``, ..),
    in order, if it has these fields; so does a part ``{"type": "image"}`` without a path.

    Args:
        path, where: see ``JsonLines``.
        data_folder: where relative paths of media begin. None: the working directory.
        prompt, response: fields that hold one question and its answer.

    Raises (by ``len``):
        DataMissing: no such file or folder. UserError: as ``JsonLines``.
    """

    def __init__(
        self,
        path: str,
        where: Mapping[str, Any] | None = None,
        data_folder: str | None = None,
        *,
        prompt: str | None = None,
        response: str | None = None,
    ) -> None:
        if (prompt is None) != (response is None):
            raise UserError(f"prompt is {prompt} and response is {response}; give both fields or neither.")
        self.path = path
        self.where = dict(where or {})
        self.data_folder = data_folder
        self.prompt = prompt
        self.response = response

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> dict[str, Any]:
        """The messages of record ``index``, with the bytes of their media.

        Raises:
            UserError: it is no chat; a media file is not there; placeholders and media differ in number.
        """
        record = self._records.read(index)
        media = _Media(record, self.data_folder)
        messages = [{**message, "content": list(media.parts(message["content"]))} for message in self._messages(record)]
        media.check_all_used()
        return {"messages": messages}

    def reference(self, index: int) -> str:
        """``FILE#LINE``, see ``JsonLines``."""
        return self._records.reference(index)

    @cached_property
    def _records(self) -> JsonLines:
        if self.data_folder is not None:
            resolve_folder(self.data_folder)
        return JsonLines(self.path, self.where)

    def _messages(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """``[{role, content, ..}]``, contents as they are in the record."""
        if self.prompt is not None and self.response is not None:
            for argument, field in (("prompt", self.prompt), ("response", self.response)):
                if field not in record:
                    raise UserError(f"the record has no field '{field}' ({argument}). {did_you_mean(field, record)}")
            return [
                {"role": "user", "content": record[self.prompt]},
                {"role": "assistant", "content": record[self.response]},
            ]
        name = next((name for name in ("messages", "conversations") if name in record), None)
        if name is None:
            raise UserError(
                f"the record has {sorted(record)}; it needs 'messages' or 'conversations', or set prompt and response to the "
                "names of its fields."
            )
        turns = record[name]
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
            raise UserError(f"'{name}' is not a list of turns.")
        return [_message(turn) for turn in turns]


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    if "from" in turn:
        if turn["from"] not in ROLES:
            raise UserError(f"'from' is '{turn['from']}', which is no known speaker. {did_you_mean(str(turn['from']), ROLES)}")
        return {"role": ROLES[turn["from"]], "content": turn.get("value")}
    if not isinstance(turn.get("role"), str):
        raise UserError(f"a turn has {sorted(turn)}; it needs 'role' and 'content', or 'from' and 'value'.")
    return {**turn, "content": turn.get("content")}


class _Media:
    """The media of one record: those that its fields list, taken in order, and those that its parts name."""

    def __init__(self, record: Mapping[str, Any], folder: str | None) -> None:
        self._folder = folder
        self._listed: dict[str, list[str]] = {}
        for kind in MEDIA:
            for field in (kind, f"{kind}s"):
                names = [record[field]] if isinstance(record.get(field), str) else record.get(field)
                if names:
                    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                        raise UserError(f"field '{field}' is not the path of a file, nor a list of paths.")
                    self._listed[kind] = list(names)
        self._placeholder = re.compile("|".join(f"<{kind}>" for kind in self._listed) or r"(?!)")

    def parts(self, content: Any) -> Iterator[dict[str, Any]]:
        """The parts of a message's content: text, a list of parts, or None."""
        if content is None:
            return
        if isinstance(content, str):
            yield from self._text(content)
        elif isinstance(content, list):
            for part in content:
                yield from self._part(part)
        else:
            raise UserError(f"the content of a turn is {type(content).__name__}; it is text or a list of parts.")

    def check_all_used(self) -> None:
        for kind, names in self._listed.items():
            if names:
                raise UserError(f"the record lists {len(names)} more {kind} file(s) than its text has <{kind}>: {names[:3]}.")

    def _text(self, text: str) -> Iterator[dict[str, Any]]:
        at = 0
        for match in self._placeholder.finditer(text):
            if match.start() > at:
                yield {"type": "text", "text": text[at : match.start()]}
            yield self._next(match[0][1:-1])
            at = match.end()
        if at < len(text):
            yield {"type": "text", "text": text[at:]}

    def _part(self, part: Any) -> Iterator[dict[str, Any]]:
        if isinstance(part, str):
            yield from self._text(part)
            return
        said = part.get("type") if isinstance(part, dict) else None
        if said == "text":
            if not isinstance(part.get("text"), str):
                raise UserError(f"a part of the type 'text' has {type(part.get('text')).__name__} for its text.")
            yield from self._text(part["text"])
            return
        kind = next((kind for kind in MEDIA if said in (kind, f"{kind}_url", f"input_{kind}")), None)
        if kind is None:
            types = ["text", *MEDIA, *(f"{kind}_url" for kind in MEDIA), "input_audio"]
            raise UserError(f"a part of a turn has the type '{said}'. {did_you_mean(str(said), types, most=20)}")
        name = _name_in(part, kind)
        yield self._next(kind) if name is None else self._load(kind, name)

    def _next(self, kind: str) -> dict[str, Any]:
        if not self._listed.get(kind):
            raise UserError(f"a turn has one more <{kind}> than the record lists {kind} files.")
        return self._load(kind, self._listed[kind].pop(0))

    def _load(self, kind: str, name: str) -> dict[str, Any]:
        shown = name.partition(",")[0] if name.startswith("data:") else name
        return {"type": kind, "bytes": load_media(name, self._folder), "name": shown}


def _name_in(part: Mapping[str, Any], kind: str) -> str | None:
    """The path or URL of a medium, wherever it stands in its part; None: nowhere."""
    for field in (part["type"], kind, f"{kind}_url", "path", "url", "file"):
        value = part.get(field)
        if isinstance(value, dict):
            if isinstance(value.get("data"), str):  # input_audio: {data: base64, format: wav}
                return f"data:{kind}/{value.get('format', kind)};base64,{value['data']}"
            value = value.get("url") or value.get("path")
        if isinstance(value, str) and value:
            return value
    return None
