"""What a checkpoint holds: one flat dict of tensors, keyed by parameter name, the same keys from step 0."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from l3m_like.core.meta_model import Frozen
from l3m_like.training.optim import EMA
from l3m_like.training.updates import Update


def state_tensors(model: nn.Module, updates: Sequence[Update], ema: EMA | None) -> dict[str, Tensor]:
    """``{name: tensor}`` of everything that training changes: the tensors themselves, which loading fills in place.

    ``model/<parameter>``, ``optim/<update>/<parameter>.<state>``, ``guard/<update>/...``, ``ema/<parameter>``. Frozen parts
    that came from a file are left out.
    """
    frozen = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, Frozen) and module.loaded_from)
    tensors: dict[str, Tensor] = {
        f"model/{name}": parameter.detach()
        for name, parameter in model.named_parameters()
        if not name.startswith(frozen or ("\0",))
    }
    tensors |= {f"model/{name}": buffer for name, buffer in model.named_buffers() if not name.startswith(frozen or ("\0",))}
    for update in updates:
        tensors |= {f"optim/{update.name}/{name}": value for name, value in update.optimizer.named_state().items()}
        tensors |= {f"guard/{update.name}/{name}": value for name, value in update.guard.named_state().items()}
    if ema is not None:
        tensors |= {f"ema/{name}": value for name, value in ema.average.items()}
    return tensors
