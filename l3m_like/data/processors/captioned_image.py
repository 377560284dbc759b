"""A picture and what is said of it, as contrastive models take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from l3m_like.core.errors import UserError
from l3m_like.core.keys import KeySpec
from l3m_like.data.processors.pixels import Pixels
from l3m_like.data.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from l3m_like.data.dataset import Visit


class CaptionedImage(Pixels):
    """``png``/``jpg``/``jpeg``/``webp`` and ``txt`` -> ``image`` float32 [C, size, size], ``text_ids`` int64 [max_tokens],
    ``text_mask`` bool [max_tokens] (True: a token, False: padding, whose id is 0).

    A caption is its tokens and the end token, always: of one that is too long the last tokens are left out.

    Args:
        size: see ``Pixels``.
        tokenizer, vocab_size, end: see ``TextTokenizer``.
        max_tokens: places for the caption.
        start: a token before the caption, by its text.
        field: where the caption is: UTF-8 bytes or a text.
        picture: further arguments of ``Pixels``.

    Raises:
        UserError: a sample without picture or caption; an unknown ``start``; see ``Pixels`` and ``TextTokenizer``.
    """

    def __init__(
        self,
        size: int,
        tokenizer: str = "bytes",
        *,
        vocab_size: int,
        max_tokens: int,
        end: str | None = None,
        start: str | None = None,
        field: str = "txt",
        **picture: Any,
    ) -> None:
        super().__init__(size, **picture)
        self.tokenizer = TextTokenizer(tokenizer, vocab_size, end)
        if max_tokens < 2 + (start is not None):
            raise UserError(f"max_tokens is {max_tokens}; a caption has at least one token beside its start and end.")
        self.max_tokens = max_tokens
        self.start = start
        self.field = field

    def keys(self) -> dict[str, KeySpec]:
        return self.image_keys() | {
            "text_ids": KeySpec(torch.int64, (self.max_tokens,), sequence_dim=0, meaning="tokens of the caption"),
            "text_mask": KeySpec(torch.bool, (self.max_tokens,), sequence_dim=0, meaning="False: padding"),
        }

    def check(self) -> None:
        """Read the tokenizer's file, if it has one, and compare it with the arguments."""
        _ = self.tokenizer.end_id, self._start()

    def __call__(self, sample: Mapping[str, Any], visit: Visit) -> dict[str, np.ndarray]:
        caption = sample.get(self.field)
        if not isinstance(caption, (bytes, str)):
            raise UserError(f"the sample has {sorted(sample)}; it needs a text '{self.field}' (key: field).")
        text = caption.decode("utf-8") if isinstance(caption, bytes) else caption
        start = self._start()
        tokens = [*start, *self.tokenizer.encode(text)[: self.max_tokens - 1 - len(start)], self.tokenizer.end_id]
        ids = np.zeros(self.max_tokens, dtype=np.int64)
        ids[: len(tokens)] = tokens
        return {"image": self.image_of(sample, visit), "text_ids": ids, "text_mask": np.arange(self.max_tokens) < len(tokens)}

    def _start(self) -> list[int]:
        token = None if self.start is None else self.tokenizer.id_of(self.start)
        if self.start is not None and token is None:
            raise UserError(f"start: {self.tokenizer.path} has no token '{self.start}'.")
        return [] if token is None else [token]


class ClassCaption(CaptionedImage):
    """An image with a class as an image with a caption: ``cls`` is put into words. Writes ``image_label`` int64 [] as well.

    Args:
        names: of the classes, in the order of their numbers.
        templates: sentences with ``{}`` for the name, one drawn anew for every sample and epoch.
        caption: the arguments of ``CaptionedImage``.

    Raises:
        UserError: a template without ``{}``; a class without a name; see ``CaptionedImage``.
    """

    def __init__(self, names: Sequence[str], templates: Sequence[str] = ("{}",), **caption: Any) -> None:
        super().__init__(**caption)
        for template in templates:
            if template.count("{}") != 1:
                raise UserError(f"templates: '{template}' has {template.count('{}')} places for the name; write {{}} once.")
        self.names, self.templates = list(names), list(templates)

    def keys(self) -> dict[str, KeySpec]:
        return super().keys() | {"image_label": KeySpec(torch.int64, (), meaning="class number")}

    def __call__(self, sample: Mapping[str, Any], visit: Visit) -> dict[str, np.ndarray]:
        if "cls" not in sample:
            raise UserError(f"the sample has {sorted(sample)}; it needs 'cls'.")
        label = int(sample["cls"])
        if not 0 <= label < len(self.names):
            raise UserError(f"the sample is of class {label}, and there are names for {len(self.names)} classes.")
        template = self.templates[visit.draws("template").integer(len(self.templates))]
        captioned = super().__call__({**sample, self.field: template.format(self.names[label])}, visit)
        return captioned | {"image_label": np.array(label, dtype=np.int64)}
