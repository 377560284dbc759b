"""What a checkpoint holds: one flat dict of tensors, keyed by parameter name, the same keys from step 0."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from l3m_like.training.optim import EMA
from l3m_like.training.updates import Update


def state_tensors(model: nn.Module, updates: Sequence[Update], ema: EMA | None) -> dict[str, Tensor]:
    """``{name: tensor}`` of everything that a run goes on with: the tensors themselves, which loading fills in place.

    ``model/<parameter>``, ``optim/<update>/<parameter>.<state>``, ``guard/<update>/...``, ``ema/<parameter>``. Frozen parts
    are in it too: a checkpoint needs no other file.
    """
    tensors = {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    tensors |= {f"model/{name}": buffer for name, buffer in model.named_buffers()}
    for update in updates:
        tensors |= {f"optim/{update.name}/{name}": value for name, value in update.optimizer.named_state().items()}
        tensors |= {f"guard/{update.name}/{name}": value for name, value in update.guard.named_state().items()}
    if ema is not None:
        tensors |= {f"ema/{name}": value for name, value in ema.average.items()}
    return tensors
