"""Diffusion transformer trunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError
from l3m_like.layers.masks import AttentionMask, LayerMasks


class DiT(ReadWriteBlock):
    """Layers modulated by a condition vector; every token sees every other one (arXiv:2212.09748).

    Reads   tokens [B, N, D]; condition [B, D]
    Writes  hidden [B, N, D]

    Args:
        dim: D.
        num_layers: number of layers.
        layer: ``layer(dim)`` makes one, e.g. ``l3m_like.layers.DiTLayer``.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("hidden",)

    def __init__(self, dim: int, num_layers: int, layer: Callable[[int], nn.Module], **ports: Any) -> None:
        super().__init__(**ports)
        if num_layers < 1:
            raise UserError(f"DiT: num_layers must be at least 1, got {num_layers}.")
        self.layers = nn.ModuleList(layer(dim) for _ in range(num_layers))
        #: as ``Transformer.attention_used``
        self.attention_used: dict[str, str] = {}

    def compute(self, tokens: Tensor, condition: Tensor) -> Tensor:
        masks = LayerMasks(AttentionMask(), tokens.shape[1], tokens.shape[1], tokens, self.attention_used)
        layers: list[Any] = list(self.layers)
        if not all(hasattr(layer, "can_defer") and layer.can_defer(tokens, condition) for layer in layers):
            for layer in layers:
                tokens = layer(tokens, condition, None, masks.of(layer))
            return tokens
        deferred = layers[0].nothing_deferred(tokens, condition)
        for layer in layers:
            tokens, deferred = layer(tokens, condition, None, masks.of(layer), deferred)
        return layers[-1].add_deferred(tokens, deferred)

    def shard_units(self) -> Iterable[nn.Module]:
        return self.layers

    def flops(self, tokens: Tensor, condition: Tensor) -> int:
        batch, length = tokens.shape[:2]
        units: list[Any] = list(self.layers)
        return sum(unit.flops(batch, batch * length, batch * length * length) for unit in units)
