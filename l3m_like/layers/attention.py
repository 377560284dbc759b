"""Multi-head attention with grouped key/value heads."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from l3m_like.core.errors import UserError
from l3m_like.core.init import Init, Normal, Ones, XavierUniform, Zeros
from l3m_like.kernels.attention import LoweredMask, attention, check_backend, key_copies
from l3m_like.kernels.rope import joint_qk_norm_rope, norm_rope, qk_norm_rope
from l3m_like.kernels.select import selected
from l3m_like.kernels.short_attention import joint_short_attention
from l3m_like.layers.cache import LayerCache
from l3m_like.layers.linear import is_plain, joined_bias, joined_output, joins, joint_linear, linear
from l3m_like.layers.norm import RMSNorm


class Attention(nn.Module):
    """Attention [B, S, D] -> [B, S, D].

    Args:
        dim: D.
        num_heads: H, query heads.
        num_kv_heads: Hkv, key/value heads (None: H); query heads j*g .. j*g+g-1 share key head j.
        head_dim: K (None: D / H); it need not be D / H.
        qk_norm: RMSNorm over K of queries and keys, per head, before RoPE (Qwen3).
        bias: of the query, key and value projections.
        out_bias: of the output projection (None: as ``bias``; Qwen2 has the first and not the second).
        norm_eps: of the QK-norm.
        interleaved: rotary positions turn neighbouring channels (2 j, 2 j + 1) instead of (j, j + K / 2).
        window: sliding window: a query sees this many last keys, its own included (of a full mask: keys nearer than this).
        backend: "auto", which takes the fastest that is exact for the mask, or one of ``kernels/attention.py``.

    In a trunk with ``kv_every``, some layers hand their keys and values to those above (``gives_kv``), which have queries alone
    (``take_kv``).
    """

    #: has no keys and values of its own
    takes_kv = False
    #: ``forward`` returns (out, (k, v))
    gives_kv = False

    #: linear layers that are computed as one
    joint: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"),)
    #: its bias can be left to the caller
    last = "out_proj"

    k_proj: nn.Linear | None
    v_proj: nn.Linear | None
    k_norm: RMSNorm | None

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = False,
        bias: bool = False,
        out_bias: bool | None = None,
        norm_eps: float = 1e-6,
        interleaved: bool = False,
        window: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise UserError(f"Attention: num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads}).")
        if head_dim is None and dim % num_heads:
            raise UserError(f"Attention: dim ({dim}) is not a multiple of num_heads ({num_heads}); change one or give head_dim.")
        self.dim = dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.backend = check_backend(selected("attention") if backend == "auto" else backend)
        if window is not None and window < 1:
            raise UserError(f"Attention: window is {window}; it is a number of keys, at least 1 (null: all).")
        self.window = window
        self.norm_eps = norm_eps
        if interleaved and qk_norm:
            raise UserError("Attention: interleaved goes without qk_norm, whose weights are in the order of the other form.")
        self.interleaved = interleaved
        self.rope_backend = selected("rope")
        #: of queries, on top of 1 / sqrt(K); see ``set_base_head_dim``
        self.query_factor = 1.0
        #: of the four projections; a DiT layer sets Xavier here
        self.weight_init: Init = Normal(0.02)
        #: of the output projection (None: the same); see ``depth_scaled_init`` of the trunk
        self.out_init: Init | None = None
        width, kv_width = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(dim, width, bias=bias)
        self.k_proj = nn.Linear(dim, kv_width, bias=bias)
        self.v_proj = nn.Linear(dim, kv_width, bias=bias)
        self.out_proj = nn.Linear(width, dim, bias=bias if out_bias is None else out_bias)
        self.q_norm = RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: LoweredMask | None = None,
        cache: LayerCache | None = None,
        kv: tuple[Tensor, Tensor] | None = None,
        *,
        biased: bool = True,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, S, D]; rope (cos, sin) each [B or 1, S, K]; mask lowered for this layer (None: full, without a window); with a
        cache, the mask covers all keys in it; kv: what the layer gave that these queries share keys and values with. Not
        ``biased``: without the bias of ``out_proj``, which the caller adds (``bias_apart``)."""
        x = x.to(self.q_proj.weight.dtype)
        if mask is not None and mask.backend == "short" and rope is cache is None and self._joined_heads(x):
            assert self.k_proj is not None and self.v_proj is not None
            projections = self.q_proj, self.k_proj, self.v_proj
            bias = joined_bias(*projections)
            heads = joined_output(x, *projections, bias=bias).unflatten(-1, (3, -1, self.head_dim))
            return linear(joint_short_attention(heads, bias).flatten(2), self.out_proj, biased=biased)
        cos, sin = (None, None) if rope is None else rope
        q_weight, k_weight = (None if norm is None else norm.weight for norm in (self.q_norm, self.k_norm))
        # -1, not num_heads: under tensor parallelism a projection returns this rank's heads
        if self.k_proj is None or self.v_proj is None:
            if kv is None:
                raise UserError("Attention: no layer below gives these queries keys and values (kv_every of the trunk).")
            k, v = kv
            q = self._ordered(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))
            q = norm_rope(q, cos, sin, q_weight, self.norm_eps)
        elif joins(x, self.q_proj, self.k_proj, self.v_proj) and not self.interleaved:
            qkv = joined_output(x, self.q_proj, self.k_proj, self.v_proj).unflatten(-1, (-1, self.head_dim))
            kv_heads = self.k_proj.weight.shape[0] // self.head_dim
            # a cache and the layers above take them once
            copies = key_copies(qkv, kv_heads, mask) if cache is None and not self.gives_kv else 1
            q, k, v = joint_qk_norm_rope(
                qkv, kv_heads, cos, sin, q_weight, k_weight, self.norm_eps, copies=copies, backend=self.rope_backend
            )
        else:
            q, k, v = (out.unflatten(-1, (-1, self.head_dim)) for out in joint_linear(x, self.q_proj, self.k_proj, self.v_proj))
            q, k = self._ordered(q), self._ordered(k)
            q, k = qk_norm_rope(q, k, cos, sin, q_weight, k_weight, self.norm_eps, backend=self.rope_backend)
        if self.query_factor != 1:
            q = q * self.query_factor
        if cache is not None:
            k, v = cache.append(k, v)
        out = linear(attention(q, k, v, mask).flatten(2), self.out_proj, biased=biased)
        return (out, (k, v)) if self.gives_kv else out

    @property
    def may_copy_keys(self) -> bool:
        """Whether ``forward`` may give its attention copies of the keys (``key_copies``), without a cache."""
        if self.k_proj is None or self.v_proj is None or self.gives_kv or self.interleaved:
            return False
        return all(is_plain(layer) for layer in (self.q_proj, self.k_proj, self.v_proj))

    def _joined_heads(self, x: Tensor) -> bool:
        """Whether attention is of queries, keys and values as they come out of one product."""
        if self.k_proj is None or self.v_proj is None or self.gives_kv or self.q_norm is not None or self.query_factor != 1:
            return False
        return joins(x, self.q_proj, self.k_proj, self.v_proj)

    def _ordered(self, heads: Tensor) -> Tensor:
        """Queries or keys [B, S, H, K] in the order that the rotation takes: scores do not change when both are reordered."""
        return heads.unflatten(-1, (-1, 2)).mT.flatten(-2) if self.interleaved else heads

    def take_kv(self) -> None:
        """Have no keys and values, but use those that ``forward`` is given (arXiv:2405.12981)."""
        self.takes_kv = True
        self.k_proj = self.v_proj = self.k_norm = None

    def set_base_head_dim(self, base: int) -> None:
        """Divide scores by K instead of sqrt(K), with the scores of heads of width ``base`` as they were (muP)."""
        self.query_factor = math.sqrt(base / self.head_dim)

    def make_cache(self, max_len: int, dtype: torch.dtype | None = None) -> LayerCache | None:
        """An empty cache for ``max_len`` tokens per row; ``dtype`` None: that of the keys. None: it keeps nothing of its own."""
        return None if self.takes_kv else LayerCache(max_len, dtype)

    def flops(self, tokens: int, pairs: int) -> int:
        """Forward FLOPs of ``tokens`` tokens among which ``pairs`` (query, key) pairs attend."""
        width, kv_width = self.num_heads * self.head_dim, 0 if self.takes_kv else self.num_kv_heads * self.head_dim
        return 2 * tokens * self.dim * (2 * width + 2 * kv_width) + 4 * pairs * width

    def tp_plan(self) -> dict[str, str]:
        plan = dict.fromkeys(self._into_heads(), "colwise") | {"out_proj": "rowwise"}
        if self.out_proj.bias is not None:
            plan["out_proj.bias"] = "replicated"
        # each rank sees its own heads only, so its gradient is a part of the sum
        return plan | dict.fromkeys(self._norms(), "summed")

    def optim_spec(self) -> dict[str, str | int]:
        return {f"{name}.weight": self.num_heads if name == "q_proj" else self.num_kv_heads for name in self._into_heads()}

    def init_spec(self) -> dict[str, Init]:
        inner = self.weight_init
        if isinstance(inner, XavierUniform):
            # the reference draws query, key and value as one fused matrix
            inner = replace(inner, fan_in=self.dim, fan_out=(self.num_heads + 2 * self.num_kv_heads) * self.head_dim)
        spec: dict[str, Init] = {f"{name}.weight": inner for name in self._into_heads()}
        spec["out_proj.weight"] = self.out_init or self.weight_init
        for name in (*self._into_heads(), "out_proj"):
            if getattr(self, name).bias is not None:
                spec[f"{name}.bias"] = Zeros()
        return spec | {f"{name}.weight": Ones() for name in self._norms()}

    def _into_heads(self) -> tuple[str, ...]:
        return ("q_proj",) if self.takes_kv else ("q_proj", "k_proj", "v_proj")

    def _norms(self) -> list[str]:
        return [name for name in ("q_norm", "k_norm") if getattr(self, name) is not None]
