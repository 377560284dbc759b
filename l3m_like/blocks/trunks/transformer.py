"""A stack of transformer layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.init import Normal
from l3m_like.core.random import uniform
from l3m_like.layers.attention import Attention
from l3m_like.layers.cache import StaticCache
from l3m_like.layers.masks import AttentionMask, LayerMasks, attended_pairs, check_kind, counted_tokens
from l3m_like.layers.moe import RouterLoads
from l3m_like.layers.rope import Rope
from l3m_like.layers.transformer import TransformerLayer

Layer = Callable[[int], nn.Module]

#: of the routers of layers with experts; in the order of ``Routing``
ROUTING = ("router_load", "router_probability", "router_z")


class Transformer(ReadWriteBlock):
    """Transformer layers in series, without a final norm (heads own it).

    Reads   tokens [B, S, D]; positions [B, S] int64 (without: 0, 1, 2, ...); document_ids [B, S] int (-1 = padding; without:
            one document per row); cu_seqlens [N + 1] int32, the borders of the documents (without: attention over documents
            takes a slower way); prefix_lengths [B] int64 (mask "prefix"); stages [B, S] int64 (mask "staged"); cache
            (generation only; with a staged mask, tokens see all that is in it); row [B] int64 (``drop_path`` in training)
    Writes  hidden [B, S, D]; if `writes` names them, what the routers of the L layers with experts did with every row, without
            padding and without clean copies (mask "staged"): router_load [L, B, E], tokens per expert; router_probability
            [L, B, E], their summed scores; router_z [L, B]

    Args:
        dim: D.
        num_layers: number of layers.
        layer: ``layer(dim)`` makes one; or a named dict of such, with ``pattern``.
        rope: rotary positions, or None.
        mask: "causal", "full", "prefix" or "staged" (see ``layers/masks.py``).
        pattern: names of ``layer``, one per layer; a shorter pattern that divides ``num_layers`` is repeated. Or
            ``{name: how many}``, one kind after the other; null is what is left: ``{dense: 3, experts: null}``.
        depth_scaled_init: draw the matrices that write to the residual stream with a deviation smaller by sqrt(2 num_layers), so
            that it does not grow with the depth (Radford et al., "Language Models are Unsupervised Multitask Learners", 2.3).
        kv_every: of the layers, the first and every so manieth after it has keys and values; those between have queries alone,
            and use the keys and values of the nearest layer below (cross-layer attention, Brandon et al., arXiv:2405.12981). A
            cache is smaller by as much.
        drop_path: stochastic depth (Huang et al., arXiv:1603.09382): in training, the last layer's branches are left out of a row
            with this chance, those of earlier layers with less, linearly from 0; what stays is scaled up.
        seed: of the run, for ``drop_path``; what is left out is a function of (seed, stream, row).
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("hidden", *ROUTING)
    optional_outputs = ROUTING
    inference_outputs = ("hidden",)

    def __init__(
        self,
        dim: int,
        num_layers: int,
        layer: Layer | Mapping[str, Layer],
        rope: Rope | None = None,
        mask: str = "causal",
        pattern: Sequence[str] | Mapping[str, int | None] | None = None,
        depth_scaled_init: bool = False,
        kv_every: int = 1,
        drop_path: float = 0.0,
        seed: int | None = None,
        **ports: Any,
    ) -> None:
        super().__init__(**ports)
        if num_layers < 1:
            raise UserError(f"Transformer: num_layers must be at least 1, got {num_layers}.")
        check_kind(mask)
        if not 0 <= drop_path < 1 or (drop_path > 0 and seed is None):
            raise UserError(f"Transformer: drop_path is {drop_path}, at least 0 and below 1; above 0 it needs seed: ${{seed}}.")
        self.drop_path, self.seed = drop_path, seed
        for port, used in {"row": drop_path > 0, "prefix_lengths": mask == "prefix", "stages": mask == "staged"}.items():
            self.read_if(port, used)
        self.dim = dim
        self.rope = rope
        self.mask = mask
        #: what attention ran, by the kind of its mask; a run prints it once
        self.attention_used: dict[str, str] = {}
        self.layers = nn.ModuleList(make(dim) for make in _layer_makers(layer, num_layers, pattern))
        units: list[Any] = list(self.layers)
        #: how many residual streams go through the layers
        self.streams = getattr(units[0], "streams", 1)
        if any(getattr(unit, "streams", 1) != self.streams for unit in units):
            raise UserError("Transformer: layers of one and of two residual streams (LadderLayer) do not go together.")
        self.router_loads = RouterLoads(units)
        if not self.router_loads.routers and any(port in self.writes for port in ROUTING):
            raise UserError("Transformer: `writes` names what routers did, but no layer has experts (mlp: l3m_like.layers.MoE).")
        mixers = [unit.mixer for unit in units]
        self.kv_every = kv_every
        _share_kv(units, kv_every)
        for branch in (branch for unit in units if depth_scaled_init for branch in (unit.mixer, unit.mlp)):
            drawn = getattr(branch, "weight_init", None)
            if not isinstance(drawn, Normal) or not hasattr(branch, "out_init"):
                raise UserError(f"Transformer: depth_scaled_init is not built for {type(branch).__name__}; leave it out.")
            branch.out_init = Normal(drawn.std / math.sqrt(2 * num_layers))
        for mixer in mixers:
            name = "rope_dim" if hasattr(mixer, "rope_dim") else "head_dim"  # of those that rotate a part of a head
            width = getattr(mixer, name, None)
            if rope is not None and width is not None and width != rope.head_dim:
                raise UserError(
                    f"Transformer: rope.head_dim is {rope.head_dim} but the attention's {name} is {width}; make them equal."
                )

    def compute(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        cache: StaticCache | None = None,
        stages: Tensor | None = None,
        row: Tensor | None = None,
        *,
        outputs: Sequence[str] = (),
    ) -> Tensor | dict[str, Tensor]:
        """hidden; called with ``outputs``, a dict of them."""
        length = tokens.shape[1]
        start: int | Tensor = 0
        kv_ids, kv_length, kind = None, length, self.mask
        if cache is not None:
            start, kv_length = cache.begin(tokens)
            kv_ids = cache.write_documents(document_ids)
        if positions is None:
            positions = torch.arange(length, device=tokens.device) + start
        rope = self.rope(positions, tokens.dtype) if self.rope is not None else None
        if kind == "staged" and not isinstance(start, int):  # one more block behind finished clean ones: it sees them all
            kind, stages = "full", None
        mask = AttentionMask(kind, document_ids, kv_ids, prefix_lengths, start, cu_seqlens, stages=stages)
        masks = LayerMasks(mask, length, kv_length, tokens, self.attention_used if cache is None else None)
        valid = None if document_ids is None else document_ids >= 0
        if stages is not None:  # every token comes noisy and clean; losses divide by the number of noisy ones
            valid = stages % 2 == 0 if valid is None else valid & (stages % 2 == 0)
        entered = tokens
        if self.streams > 1:
            tokens = torch.stack([tokens] * self.streams)
        keep = self._kept(row, tokens) if self.drop_path and self.training else None
        routings = []
        kv = None
        units: list[Any] = list(self.layers)
        defers = cache is None and all(hasattr(layer, "can_defer") and layer.can_defer(tokens) for layer in units)
        deferred = units[0].nothing_deferred(tokens) if defers else None
        for index, layer in enumerate(units):
            layer_cache = cache.layers[index] if cache is not None else None
            more: dict[str, Any] = {"valid": valid} if getattr(layer, "routes", False) else {}
            if index % self.kv_every:
                more["kv"] = kv
            if keep is not None:
                more["keep"] = keep[index]
            if deferred is not None:
                more["deferred"] = deferred
            out = layer(tokens, rope, masks.of(layer), layer_cache, **more)
            tokens, *rest = out if isinstance(out, tuple) else (out,)
            if deferred is not None:
                deferred = rest.pop(0)
            if "valid" in more:
                routings.append(rest.pop(0))
            if rest:
                (kv,) = rest
        if cache is not None:
            cache.end(entered)
        if deferred is not None:
            tokens = units[-1].add_deferred(tokens, deferred)
        written = {"hidden": tokens if self.streams == 1 else tokens[0]}
        if routings:
            written |= zip(ROUTING, (torch.stack(values) for values in zip(*routings, strict=True)), strict=True)
            if self.training and torch.is_grad_enabled():
                self.router_loads.add(written["router_load"])
        return {port: written[port] for port in outputs} if outputs else written["hidden"]

    def _kept(self, row: Tensor | None, tokens: Tensor) -> Tensor:
        """[L, 2, B]: 0 for a branch that is left out of a row, else 1 / probability that it stays."""
        if row is None or self.seed is None:
            raise UserError("Transformer: drop_path draws for each row; the data has no key 'row'.")
        layers = len(self.layers)
        drawn = uniform(row, (layers, 2), seed=self.seed, purpose=f"drop_path/{self.stream or ''}").permute(1, 2, 0)
        stays = 1 - self.drop_path * torch.arange(layers, device=row.device) / max(layers - 1, 1)
        return ((drawn < stays.view(-1, 1, 1)) / stays.view(-1, 1, 1)).to(tokens.dtype)

    def after_step(self, mesh: Any, skipped: Tensor | None = None) -> None:
        self.router_loads.step(mesh.sum, skipped)

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
        stages: Tensor | None = None,
        row: Tensor | None = None,
    ) -> int:
        batch, length = tokens.shape[:2]
        start = cache.length if cache is not None else 0
        # the extra pairs of a prefix are not known without reading the lengths
        kind = "full" if self.mask == "full" else "causal"
        # a staged row is two copies of a text, of which every place sees the clean one up to its own block
        half = 2 if self.mask == "staged" else 1
        units: list[Any] = list(self.layers)
        pairs = {
            window: attended_pairs(
                AttentionMask(kind, document_ids if start == 0 else None, window=window), batch, length, start + length
            )
            // half
            for window in {getattr(unit.mixer, "window", None) for unit in units}
        }
        counted = counted_tokens((batch, length), document_ids)
        return sum(unit.flops(counted, pairs[getattr(unit.mixer, "window", None)]) for unit in units)


def _share_kv(units: Sequence[Any], kv_every: int) -> None:
    """Take keys and values from all mixers but every ``kv_every``-th."""
    if kv_every < 1:
        raise UserError(f"Transformer: kv_every is {kv_every}; 1: every layer has keys and values, 2: every second, ...")
    for index, unit in enumerate(units if kv_every > 1 else ()):
        if not (isinstance(unit, TransformerLayer) and isinstance(unit.mixer, Attention)):
            kind = f"{type(unit).__name__} of {type(unit.mixer).__name__}"
            raise UserError(f"Transformer: kv_every is {kv_every}; that is built for TransformerLayers of Attention, not {kind}.")
        giver = units[index - index % kv_every].mixer
        if any(getattr(unit.mixer, name) != getattr(giver, name) for name in ("num_kv_heads", "head_dim", "interleaved")):
            raise UserError(
                f"Transformer: kv_every is {kv_every}, but layer {index} has other key heads (num_kv_heads, head_dim, "
                "interleaved) than the layer below whose keys and values it would use; make them equal."
            )
        if index % kv_every:
            unit.mixer.take_kv()
            giver.gives_kv = True


def _layer_makers(
    layer: Layer | Mapping[str, Layer], num_layers: int, pattern: Sequence[str] | Mapping[str, int | None] | None
) -> list[Layer]:
    if isinstance(pattern, Mapping):
        pattern = _counted(pattern, num_layers)
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


def _counted(pattern: Mapping[str, int | None], num_layers: int) -> list[str]:
    """``{a: 1, b: null}`` and 3 layers -> ``[a, b, b]``."""
    left = num_layers - sum(count or 0 for count in pattern.values())
    open_ones = [name for name, count in pattern.items() if count is None]
    if len(open_ones) > 1 or left < 0 or (left > 0 and not open_ones):
        raise UserError(
            f"Transformer: the pattern {dict(pattern)} does not make num_layers ({num_layers}) layers; the counts must add up to "
            "it, or one of them be null, which takes what is left."
        )
    return [name for name, count in pattern.items() for _ in range(left if count is None else count)]
