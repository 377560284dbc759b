"""A stack of transformer layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.layers.cache import StaticCache
from l3m_like.layers.masks import AttentionMask, LayerMasks, attended_pairs, check_kind
from l3m_like.layers.rope import Rope

Layer = Callable[[int], nn.Module]


class Transformer(ReadWriteBlock):
    """Transformer layers in series, without a final norm (heads own it).

    Reads   tokens [B, S, D]; positions [B, S] int64 (without: 0, 1, 2, ...); document_ids [B, S] int (-1 = padding; without:
            one document per row); cu_seqlens [N + 1] int32, the borders of the documents (without: attention over documents
            takes a slower way); prefix_lengths [B] int64 (mask "prefix"); cache (generation only)
    Writes  hidden [B, S, D]

    Args:
        dim: D.
        num_layers: number of layers.
        layer: ``layer(dim)`` makes one; or a named dict of such, with ``pattern``.
        rope: rotary positions, or None.
        mask: "causal", "full" or "prefix".
        pattern: names of ``layer``, one per layer; a shorter pattern that divides ``num_layers`` is repeated.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("hidden",)

    def __init__(
        self,
        dim: int,
        num_layers: int,
        layer: Layer | Mapping[str, Layer],
        rope: Rope | None = None,
        mask: str = "causal",
        pattern: Sequence[str] | None = None,
        **ports: Any,
    ) -> None:
        super().__init__(**ports)
        if num_layers < 1:
            raise UserError(f"Transformer: num_layers must be at least 1, got {num_layers}.")
        check_kind(mask)
        self.dim = dim
        self.rope = rope
        self.mask = mask
        #: what attention ran, by the kind of its mask; a run prints it once
        self.attention_used: dict[str, str] = {}
        self.layers = nn.ModuleList(make(dim) for make in _layer_makers(layer, num_layers, pattern))
        units: list[Any] = list(self.layers)
        mixers = [unit.mixer for unit in units]
        for mixer in mixers:
            width = getattr(mixer, "head_dim", None)
            if rope is not None and width is not None and width != rope.head_dim:
                raise UserError(
                    f"Transformer: rope.head_dim is {rope.head_dim} but the attention's head_dim is {width}; make them equal."
                )

    def compute(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        cache: StaticCache | None = None,
    ) -> Tensor:
        length = tokens.shape[1]
        start: int | Tensor = 0
        kv_ids, kv_length = None, length
        if cache is not None:
            start, kv_length = cache.begin(tokens)
            kv_ids = cache.write_documents(document_ids)
        if positions is None:
            positions = torch.arange(length, device=tokens.device) + start
        rope = self.rope(positions, tokens.dtype) if self.rope is not None else None
        mask = AttentionMask(self.mask, document_ids, kv_ids, prefix_lengths, start, cu_seqlens)
        masks = LayerMasks(mask, length, kv_length, tokens, self.attention_used if cache is None else None)
        for index, layer in enumerate(self.layers):
            layer_cache = cache.layers[index] if cache is not None else None
            tokens = layer(tokens, rope, masks.of(layer), layer_cache)
        if cache is not None:
            cache.end(tokens)
        return tokens

    def make_cache(
        self, batch: int, max_len: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> StaticCache:
        """An empty cache for generation: ``batch`` rows of at most ``max_len`` tokens; ``dtype`` None: that of the keys."""
        units: list[Any] = list(self.layers)
        return StaticCache([unit.mixer.make_cache(max_len, dtype) for unit in units], batch, max_len, device)

    def shard_units(self) -> Iterable[nn.Module]:
        return self.layers

    def flops(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        cache: StaticCache | None = None,
    ) -> int:
        batch, length = tokens.shape[:2]
        start = cache.length if cache is not None else 0
        # the extra pairs of a prefix are not known without reading the lengths
        kind = "full" if self.mask == "full" else "causal"
        units: list[Any] = list(self.layers)
        pairs = {
            window: attended_pairs(
                AttentionMask(kind, document_ids if start == 0 else None, window=window), batch, length, start + length
            )
            for window in {getattr(unit.mixer, "window", None) for unit in units}
        }
        return sum(unit.flops(batch * length, pairs[getattr(unit.mixer, "window", None)]) for unit in units)


def _layer_makers(layer: Layer | Mapping[str, Layer], num_layers: int, pattern: Sequence[str] | None) -> list[Layer]:
    if not isinstance(layer, Mapping):
        if pattern is not None:
            raise UserError("Transformer: pattern names layers, so `layer` must be a named dict of them.")
        return [layer] * num_layers
    if not pattern or num_layers % len(pattern):
        raise UserError(
            f"Transformer: with named layers, give `pattern`: a list of their names whose length divides num_layers "
            f"({num_layers}); got {list(pattern or [])}."
        )
    for name in pattern:
        if name not in layer:
            raise UserError(f"Transformer: pattern names no layer '{name}'. {did_you_mean(name, layer)}")
    for name in layer:
        if name not in pattern:
            raise UserError(f"Transformer: layer '{name}' is not in the pattern {list(pattern)}; delete it or use it.")
    return [layer[name] for name in list(pattern) * (num_layers // len(pattern))]
