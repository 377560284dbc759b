"""Factors of learning rates that follow from widths (muP, ``training/mup.py``)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from l3m_like.core.meta_model import MetaModel


def width_ratios(parts: Mapping[str, MetaModel]) -> dict[str, float]:
    """``{parameter: m}`` of the hidden matrices; none without muP."""
    found = {}
    for prefix, part in parts.items():
        for path, module in part.named_modules():
            for leaf, ratio in getattr(module, "width_ratios", {}).items():
                found[".".join(filter(None, (prefix, path, leaf)))] = ratio
    return found


def muon_factor(ratio: float, scale: str) -> float:
    """Of the learning rate of a matrix that Muon trains. An update of orthonormal rows changes what a matrix does to a vector by
    as much at every width, if it is scaled by sqrt(rows / cols) (``spectral``: arXiv:2310.17813); the factor of ``rms`` grows
    with the root of the width on top."""
    return 1.0 if scale == "spectral" else 1.0 / math.sqrt(ratio)
