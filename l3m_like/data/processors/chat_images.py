"""A conversation with images in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from l3m_like.core.errors import UserError
from l3m_like.core.keys import KeySpec
from l3m_like.data.processors.chat import Chat
from l3m_like.data.processors.pixels import Pixels, decode

if TYPE_CHECKING:
    from l3m_like.data.dataset import Visit


class ChatImages:
    """What ``chat`` makes, with ``tokens_per_image`` places for each image, and ``images`` float32 [I, C, size, size] in order.

    The sample has ``messages``, or ``json`` with them; a part ``{"type": "image", "image": NAME}`` is the picture in the
    sample's member NAME, e.g. ``1.jpg``. The places are never trained on.

    Args:
        chat: writes the conversation; its ``image`` holds the placeholder once.
        picture: makes the arrays.
        placeholder: the token that stands where an image is, by its text.
        tokens_per_image: how many of it the model wants for each.

    Raises:
        UserError: a placeholder that ``chat.image`` or the tokenizer does not have; an image that is not in the sample; a
            conversation that holds the placeholder otherwise than for its images.
    """

    def __init__(self, chat: Chat, picture: Pixels, placeholder: str, tokens_per_image: int) -> None:
        count = (chat.image or "").count(placeholder)
        if count != 1:
            raise UserError(f"chat: its image is {chat.image!r}, which holds '{placeholder}' {count} times; once is needed.")
        if tokens_per_image < 1:
            raise UserError(f"tokens_per_image is {tokens_per_image}; it is at least 1.")
        self.chat = chat
        self.picture = picture
        self.placeholder = placeholder
        self.tokens_per_image = tokens_per_image

    def keys(self) -> dict[str, KeySpec]:
        image = self.picture.image_keys()["image"]
        return self.chat.keys() | {"images": KeySpec(image.dtype, ("I", *image.dims), meaning=f"the images, {image.meaning}")}

    def check(self) -> None:
        """Read the files of tokenizer and template, and find the placeholder."""
        self.chat.check()
        _ = self._place_id

    def __call__(self, sample: Mapping[str, Any], visit: Visit) -> dict[str, np.ndarray]:
        record = json.loads(sample["json"]) if "json" in sample else sample
        made = self.chat(record, visit)
        contents = [message["content"] for message in record["messages"] if isinstance(message["content"], list)]
        parts = [part for content in contents for part in content if part["type"] == "image"]
        places = made["ids"] == self._place_id
        if places.sum() != len(parts):
            raise UserError(
                f"the conversation has {len(parts)} images, but {self.placeholder} stands {places.sum()} times in it. Take it "
                "out of the texts."
            )
        repeats = np.where(places, self.tokens_per_image, 1)
        # each with draws of its own
        visits = [replace(visit, reference=f"{visit.reference}/image {number}") for number in range(len(parts))]
        images = [self.picture.array(self._decode(part, sample), one) for part, one in zip(parts, visits, strict=True)]
        return {
            "ids": np.repeat(made["ids"], repeats),
            "trained": np.repeat(made["trained"] & ~places, repeats),
            "images": np.stack(images) if images else np.zeros((0, *self.picture.shape), dtype=np.float32),
        }

    def encode(self, text: str) -> list[int]:
        """See ``Chat.encode``."""
        return self.chat.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Chat.decode``."""
        return self.chat.decode(ids)

    @property
    def end_id(self) -> int:
        return self.chat.end_id

    def _decode(self, part: Mapping[str, Any], sample: Mapping[str, Any]) -> Any:
        name = part.get("image")
        if not isinstance(name, str):
            raise UserError(f"the part {part!r:.80} does not name its picture. Write {{type: image, image: NAME}}.")
        if name not in sample:
            raise UserError(f"the image '{name}' is not in the sample, which has {sorted(sample)}.")
        return decode(sample[name], self.picture.channels)

    @cached_property
    def _place_id(self) -> int:
        token = self.chat.tokenizer.id_of(self.placeholder)
        if token is None:
            raise UserError(f"placeholder: {self.chat.tokenizer.path} has no token '{self.placeholder}'.")
        return token
