"""Records of a prompt and a response, as conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.keys import KeySpec
from l3m_like.data.processors.chat import Chat

if TYPE_CHECKING:
    from l3m_like.data.dataset import Visit


class PromptResponse:
    """A flat record -> what ``process`` makes of a conversation of two messages.

    Args:
        process: takes the conversation.
        prompt: what the user says, with the record's fields in braces, e.g. ``"{instruction}\\n\\n{input}"``.
        response: the field that the assistant says.

    Raises:
        UserError: the record has not these fields.
    """

    def __init__(self, process: Chat, prompt: str = "{prompt}", response: str = "response") -> None:
        self.process = process
        self.prompt = prompt
        self.response = response

    def keys(self) -> dict[str, KeySpec]:
        return self.process.keys()

    def check(self) -> None:
        self.process.check()

    def __call__(self, sample: Mapping[str, Any], visit: Visit) -> dict[str, np.ndarray]:
        try:
            said = [("user", self.prompt.format_map(sample)), ("assistant", sample[self.response])]
        except KeyError as error:
            field = str(error.args[0])
            hint = did_you_mean(field, sample)
            raise UserError(f"the record has no field '{field}' (keys: prompt, response). {hint}") from None
        return self.process({"messages": [{"role": role, "content": content} for role, content in said]}, visit)

    def encode(self, text: str) -> list[int]:
        """See ``Chat.encode``."""
        return self.process.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Chat.decode``."""
        return self.process.decode(ids)

    @property
    def end_id(self) -> int:
        return self.process.end_id
