"""Maximal update parametrisation: settings found on a narrow model hold on a wide one (Yang et al., "Tensor Programs V",
arXiv:2203.03466, table 8).

With m = width / base_width, and everything equal at m = 1:

- hidden matrices are drawn with a standard deviation smaller by sqrt(m), and AdamW's learning rate of them is smaller by m;
- what a head hands to its output matrix is smaller by m, where embedding and output matrix are drawn and trained as at m = 1;
- attention divides scores by the head's width instead of its root, where heads get wider.

The weight decay of hidden matrices is larger by m, so that learning rate times decay, which is what a step takes off a weight,
stays. Muon's updates have a norm of their own: see ``optim/width.py``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from l3m_like.blocks import MultiTokenPrediction
from l3m_like.config.schema import Mup
from l3m_like.core.errors import UserError
from l3m_like.core.meta_model import Frozen
from l3m_like.core.wiring import parts_of
from l3m_like.layers import Router
from l3m_like.training.optim.routing import optim_specs


def use_mup(model: nn.Module, settings: Mup) -> None:
    """Note the ratio m at each hidden matrix (its layer's ``width_ratios``), and tell attention and heads. In place, before
    sharding; frozen parts stay as they are.

    Raises:
        UserError: the model has no head that knows its output's factor, or layers that this is not built for.
    """
    ratio = settings.width / settings.base_width
    frozen = {id(inner) for part in model.modules() if isinstance(part, Frozen) for inner in part.modules()}
    outputs, heads = 0, 0
    modules: list[Any] = list(model.modules())
    for module in modules:
        if id(module) in frozen:
            continue
        if isinstance(module, (Router, MultiTokenPrediction)):
            raise UserError(f"mup is not built for {type(module).__name__}: its logits would grow with the width.")
        if hasattr(module, "set_output_factor"):
            module.set_output_factor(1.0 / ratio)
            outputs += 1
        if settings.base_head_dim is not None and hasattr(module, "set_base_head_dim"):
            module.set_base_head_dim(settings.base_head_dim)
            heads += 1
    if not outputs:
        raise UserError("mup: this model has no head that scales its output with the width (LanguageModelHead does).")
    if settings.base_head_dim is not None and not heads:
        raise UserError("mup.base_head_dim: no attention of this model takes it (Attention does). Leave it out.")
    specs = optim_specs(parts_of(model))
    for path, module in model.named_modules():
        if id(module) in frozen:
            continue
        ratios = {
            leaf: ratio
            for leaf, parameter in module.named_parameters(recurse=False)
            if parameter.ndim > 1 and specs.get(f"{path}.{leaf}".strip("."), (None,))[0] != "adamw"
        }
        if ratios:
            module.width_ratios = ratios  # type: ignore[assignment]  # read by init.py and optim/width.py
