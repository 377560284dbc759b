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
    ``text_mask`` bool [max_tokens] (True: a token, False: padding, whose id is ``pad``).

    A caption is its tokens and the end token, always: of one that is too long the last tokens are left out. With ``names``, the
    caption is that of the sample's class ``cls``, and ``image_label`` int64 [] is written as well.

    Args:
        size: see ``Pixels``.
        tokenizer, vocab_size, end: see ``TextTokenizer``.
        max_tokens: places for the caption.
        start: a token before the caption, by its text.
        field: where the caption is: UTF-8 bytes or a text (not with ``names``).
        names: of the classes, in the order of their numbers.
        pad: id of the padding, which a text tower without a causal mask sees (1: published SigLIP).
        templates: sentences with ``{}`` for the name, one drawn anew for every sample and epoch (None: the name alone).
        picture: further arguments of ``Pixels``.

    Raises:
        UserError: a sample without picture or caption; a class without a name; a template without ``{}``; an unknown
            ``start``; see ``Pixels`` and ``TextTokenizer``.
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
        pad: int = 0,
        field: str = "txt",
        names: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
        **picture: Any,
    ) -> None:
        super().__init__(size, **picture)
        self.tokenizer = TextTokenizer(tokenizer, vocab_size, end)
        if max_tokens < 2 + (start is not None):
            raise UserError(f"max_tokens is {max_tokens}; a caption has at least one token beside its start and end.")
        self.max_tokens = max_tokens
        self.start = start
        if not 0 <= pad < vocab_size:
            raise UserError(f"pad is {pad}; it is the id of a token, from 0 to {vocab_size - 1}.")
        self.pad = pad
        self.field = field
        if templates is not None and names is None:
            raise UserError("templates are for the names of classes; give names as well, or remove them.")
        for template in templates or ():
            if template.count("{}") != 1:
                raise UserError(f"templates: '{template}' has {template.count('{}')} places for the name; write {{}} once.")
        self.names = names
        self.templates = list(templates or ["{}"])

    def keys(self) -> dict[str, KeySpec]:
        label = {} if self.names is None else {"image_label": KeySpec(torch.int64, (), meaning="class number")}
        return (
            self.image_keys()
            | label
            | {
                "text_ids": KeySpec(torch.int64, (self.max_tokens,), sequence_dim=0, meaning="tokens"),
                "text_mask": KeySpec(torch.bool, (self.max_tokens,), sequence_dim=0, meaning="False: padding"),
            }
        )

    def check(self) -> None:
        """Read the tokenizer's file, if it has one, and compare it with the arguments."""
        _ = self.tokenizer.end_id, self._start()

    def __call__(self, sample: Mapping[str, Any], visit: Visit) -> dict[str, np.ndarray]:
        text, label = self._caption(sample, visit)
        return {"image": self.image_of(sample, visit), **self.padded(self.tokens(text)), **label}

    def padded(self, tokens: Sequence[int]) -> dict[str, np.ndarray]:
        """The keys of a caption with these tokens."""
        ids = np.full(self.max_tokens, self.pad, dtype=np.int64)
        ids[: len(tokens)] = tokens
        return {"text_ids": ids, "text_mask": np.arange(self.max_tokens) < len(tokens)}

    def tokens(self, text: str) -> list[int]:
        """The start, the text as far as there is room, the end."""
        start = self._start()
        return [*start, *self.tokenizer.encode(text)[: self.max_tokens - 1 - len(start)], self.tokenizer.end_id]

    def _caption(self, sample: Mapping[str, Any], visit: Visit) -> tuple[str, dict[str, np.ndarray]]:
        """The caption, and the sample's class if that is where it comes from."""
        if self.names is None:
            caption = sample.get(self.field)
            if not isinstance(caption, (bytes, str)):
                raise UserError(f"the sample has {sorted(sample)}; it needs a text '{self.field}' (key: field).")
            return caption.decode("utf-8") if isinstance(caption, bytes) else caption, {}
        if "cls" not in sample:
            raise UserError(f"the sample has {sorted(sample)}; it needs 'cls' (key: names).")
        label = int(sample["cls"])
        if not 0 <= label < len(self.names):
            raise UserError(f"the sample is of class {label}, and there are names for {len(self.names)} classes.")
        template = self.templates[visit.draws("template").integer(len(self.templates))]
        return template.format(self.names[label]), {"image_label": np.array(label, dtype=np.int64)}

    def _start(self) -> list[int]:
        token = None if self.start is None else self.tokenizer.id_of(self.start)
        if self.start is not None and token is None:
            raise UserError(f"start: {self.tokenizer.path} has no token '{self.start}'.")
        return [] if token is None else [token]
