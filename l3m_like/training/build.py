"""The model that a config describes, on the meta device: what training, loading and checking start from."""

from __future__ import annotations

import torch
from torch import nn

from l3m_like.config.run_config import RunConfig
from l3m_like.core.meta_model import as_model
from l3m_like.training.lora import add_adapters
from l3m_like.training.mup import use_mup


def build_model(cfg: RunConfig) -> nn.Module:
    """The `model` section, with the factors of `mup` and the adapters of `lora`."""
    with torch.device("meta"):
        model = as_model(cfg.instantiate("model"))
    if cfg.mup is not None:
        use_mup(model, cfg.mup)
    if cfg.lora is not None:
        add_adapters(model, cfg.lora)
    return model
