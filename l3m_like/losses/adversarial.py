"""Losses of a generator and its discriminator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.losses.loss import Loss

#: of the discriminator, for logits of reconstructions and of images
DISCRIMINATOR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": lambda fake, real: F.relu(1 + fake) + F.relu(1 - real),
    "non_saturating": lambda fake, real: F.softplus(fake) + F.softplus(-real),
}
#: of the generator
GENERATOR: dict[str, Callable[[Tensor], Tensor]] = {
    "hinge": lambda fake: -fake,
    "non_saturating": lambda fake: F.softplus(-fake),
}


def _checked(owner: str, form: str) -> str:
    if form not in GENERATOR:
        raise UserError(f"{owner}: no form '{form}'. {did_you_mean(form, GENERATOR)}")
    return form


class FoolDiscriminator(Loss):
    """What a generator loses to its discriminator, a mean over rows and logits: ``-logit`` (hinge, arXiv:1705.02894) or
    ``softplus(-logit)`` (non-saturating, arXiv:1406.2661).

    Reads   fake_logits [B, L]
    Counts  rows of the loader's image [B, C, H, W]

    Args:
        form: "hinge" or "non_saturating".
        settings: weight, start, reads, stream of ``Loss``.
    """

    def __init__(self, form: str = "hinge", **settings: Any) -> None:
        super().__init__(**settings)
        self.form = _checked("FoolDiscriminator", form)

    def compute(self, fake_logits: Tensor) -> Tensor:
        return GENERATOR[self.form](fake_logits).flatten(1).mean(1).sum()

    def count(self, image: Tensor) -> Tensor:
        return torch.tensor(len(image), dtype=torch.int64)


class TellApart(Loss):
    """What a discriminator loses, half of it on reconstructions and half on images: the mean over rows and logits of
    ``relu(1 + fake) + relu(1 - real)`` (hinge) or ``softplus(fake) + softplus(-real)`` (non-saturating), halved.

    Reads   fake_logits, real_logits [B, L]
    Counts  rows of the loader's image [B, C, H, W]

    Args:
        form, settings: as in ``FoolDiscriminator``.
    """

    def __init__(self, form: str = "hinge", **settings: Any) -> None:
        super().__init__(**settings)
        self.form = _checked("TellApart", form)

    def compute(self, fake_logits: Tensor, real_logits: Tensor) -> Tensor:
        return 0.5 * DISCRIMINATOR[self.form](fake_logits, real_logits).flatten(1).mean(1).sum()

    def count(self, image: Tensor) -> Tensor:
        return torch.tensor(len(image), dtype=torch.int64)
