"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): all heads read one narrow vector per token."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from l3m_like.core.errors import UserError
from l3m_like.core.init import Init, Normal, Ones
from l3m_like.kernels.attention import LoweredMask, attention, check_backend
from l3m_like.kernels.rope import qk_norm_rope
from l3m_like.kernels.select import selected
from l3m_like.layers.cache import LayerCache
from l3m_like.layers.lora import LoRALinear
from l3m_like.layers.norm import RMSNorm
from l3m_like.layers.rope import yarn_magnitude


class LatentAttention(nn.Module):
    """Attention [B, S, D] -> [B, S, D] over latents ``c = norm(x W_a)`` [B, S, R].

    Per head, a key is ``[c W_k, r]`` and a value ``c W_v``; r, rotated by the position, is one for all heads. A query likewise
    has a part that is rotated and one that is not; the two are scored together. A cache holds c and r alone.

    Args:
        dim: D.
        num_heads: H.
        kv_rank: R.
        nope_dim: width of the part of a query or key that is not rotated.
        rope_dim: width of the part that is; ``rope.head_dim`` of the trunk.
        v_dim: width of a value.
        q_rank: queries come from a latent of this width as well (None: from x).
        interleaved: rotated are the pairs of places (0, 1), (2, 3), ..., as DeepSeek's weights want it; False: the halves.
        norm_eps: of the norms of the latents.
        rope_scaling: of the trunk's ``Rope``: with YaRN's ``mscale_all_dim`` m, scores are multiplied by
            ``(0.1 m ln(factor) + 1)^2``.
        backend: as for ``Attention``.
    """

    #: no sliding window
    window = None

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        kv_rank: int,
        nope_dim: int,
        rope_dim: int,
        v_dim: int,
        q_rank: int | None = None,
        interleaved: bool = True,
        norm_eps: float = 1e-6,
        rope_scaling: Mapping[str, float | str] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, size in {"num_heads": num_heads, "kv_rank": kv_rank, "nope_dim": nope_dim, "v_dim": v_dim}.items():
            if size < 1:
                raise UserError(f"LatentAttention: {name} must be at least 1, got {size}.")
        if rope_dim < 2 or rope_dim % 2:
            raise UserError(f"LatentAttention: rope_dim must be even, got {rope_dim}.")
        if v_dim > nope_dim + rope_dim:
            raise UserError(f"LatentAttention: v_dim ({v_dim}) is above nope_dim + rope_dim ({nope_dim + rope_dim}).")
        self.dim, self.num_heads, self.kv_rank, self.q_rank = dim, num_heads, kv_rank, q_rank
        self.nope_dim, self.rope_dim, self.v_dim = nope_dim, rope_dim, v_dim
        #: of queries and keys
        self.head_dim = nope_dim + rope_dim
        self.interleaved, self.norm_eps = interleaved, norm_eps
        scaled = rope_scaling is not None and rope_scaling.get("type") == "yarn"
        #: on top of 1 / sqrt(head_dim)
        self.score_factor = yarn_magnitude(rope_scaling) ** 2 if rope_scaling is not None and scaled else 1.0
        self.backend = check_backend(selected("attention") if backend == "auto" else backend)
        self.rope_backend = selected("rope")
        if q_rank is None:
            self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=False)
        else:
            self.q_down = nn.Linear(dim, q_rank, bias=False)
            self.q_norm = RMSNorm(q_rank, eps=norm_eps)
            self.q_up = nn.Linear(q_rank, num_heads * self.head_dim, bias=False)
        self.kv_down = nn.Linear(dim, kv_rank + rope_dim, bias=False)
        self.kv_norm = RMSNorm(kv_rank, eps=norm_eps)
        self.kv_up = nn.Linear(kv_rank, num_heads * (nope_dim + v_dim), bias=False)
        #: where r goes to the heads: under tensor parallelism a rank has some of them
        self.to_heads = nn.Identity()
        self.out_proj = nn.Linear(num_heads * v_dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: LoweredMask | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """As ``Attention.forward``; rope [B or 1, S, rope_dim]."""
        if rope is None:
            raise UserError("LatentAttention needs rotary positions: give the trunk a rope with head_dim = rope_dim.")
        x = x.to(self.kv_down.weight.dtype)
        queries = self.q_proj(x) if self.q_rank is None else self.q_up(self.q_norm(self.q_down(x)))
        q, q_turned = queries.unflatten(-1, (-1, self.head_dim)).split([self.nope_dim, self.rope_dim], dim=-1)
        latent, r = self.kv_down(x).split([self.kv_rank, self.rope_dim], dim=-1)
        latent, r = self.kv_norm(latent), self.to_heads(r).unsqueeze(2)
        if self.interleaved:
            q_turned, r = (t.unflatten(-1, (-1, 2)).mT.flatten(-2) for t in (q_turned, r))
        q_turned, r = qk_norm_rope(q_turned, r, *rope, None, None, self.norm_eps, backend=self.rope_backend)
        if cache is None:
            out = self._expanded(q, q_turned, latent, r, mask)
        else:
            first = cache.first
            latents, rs = cache.append(latent.unsqueeze(2), r)
            # the first tokens are many: attention between heads costs less than between latents
            out = self._expanded(q, q_turned, latent, r, mask) if first else self._between_latents(q, q_turned, latents, rs, mask)
        return self.out_proj(out.flatten(2))

    def _expanded(self, q: Tensor, q_turned: Tensor, latent: Tensor, r: Tensor, mask: LoweredMask | None) -> Tensor:
        """Keys and values [B, S, H, .] are made, and attention is as always."""
        k, v = self.kv_up(latent).unflatten(-1, (-1, self.nope_dim + self.v_dim)).split([self.nope_dim, self.v_dim], dim=-1)
        queries = self._scaled(torch.cat((q, q_turned), dim=-1), 1.0)
        return attention(queries, torch.cat((k, r.expand(-1, -1, k.shape[2], -1)), dim=-1), v, mask)

    def _between_latents(self, q: Tensor, q_turned: Tensor, latents: Tensor, rs: Tensor, mask: LoweredMask | None) -> Tensor:
        """The same numbers without making keys and values: ``q . (c W_k) = (q W_k^T) . c``, one key head for all queries."""
        weight = self.kv_up.merged_weight() if isinstance(self.kv_up, LoRALinear) else self.kv_up.weight
        weight = weight.to_local() if isinstance(weight, DTensor) else weight
        keys, values = weight.unflatten(0, (-1, self.nope_dim + self.v_dim)).split([self.nope_dim, self.v_dim], dim=1)
        queries = torch.cat((torch.einsum("bshk,hkr->bshr", q, keys), q_turned), dim=-1)
        # attention divides by the root of the width that it sees
        queries = self._scaled(queries, math.sqrt(queries.shape[-1] / self.head_dim))
        mixed = attention(queries, torch.cat((latents, rs), dim=-1), latents, mask)
        return torch.einsum("bshr,hvr->bshv", mixed, values)

    def _scaled(self, queries: Tensor, factor: float) -> Tensor:
        factor *= self.score_factor
        return queries if factor == 1.0 else queries * factor

    def make_cache(self, max_len: int, dtype: torch.dtype | None = None) -> LayerCache:
        """An empty cache of latents and rotated keys, ``kv_rank + rope_dim`` numbers per token."""
        return LayerCache(max_len, dtype)

    def flops(self, tokens: int, pairs: int) -> int:
        """Forward FLOPs of ``tokens`` tokens among which ``pairs`` (query, key) pairs attend."""
        q_width, kv_width = self.num_heads * self.head_dim, self.num_heads * (self.nope_dim + self.v_dim)
        queries = self.dim * q_width if self.q_rank is None else self.q_rank * (self.dim + q_width)
        keys = self.dim * (self.kv_rank + self.rope_dim) + self.kv_rank * kv_width
        out = self.num_heads * self.v_dim * self.dim
        return 2 * tokens * (queries + keys + out) + 2 * pairs * self.num_heads * (self.head_dim + self.v_dim)

    def tp_plan(self) -> dict[str, str]:
        plan = {"q_proj": "colwise"}
        if self.q_rank is not None:
            plan = {"q_down": "replicated", "q_norm": "replicated", "q_up": "colwise"}
        return plan | {
            "kv_down": "replicated",
            "kv_norm": "replicated",
            "kv_up": "colwise",
            "to_heads": "divided",
            "out_proj": "rowwise",
        }

    def optim_spec(self) -> dict[str, str | int]:
        queries = "q_proj" if self.q_rank is None else "q_up"
        return {f"{queries}.weight": self.num_heads, "kv_up.weight": self.num_heads}

    def init_spec(self) -> dict[str, Init]:
        queries = ["q_proj"] if self.q_rank is None else ["q_down", "q_up"]
        spec: dict[str, Init] = {f"{name}.weight": Normal(0.02) for name in (*queries, "kv_down", "kv_up", "out_proj")}
        norms = ["kv_norm"] if self.q_rank is None else ["q_norm", "kv_norm"]
        return spec | {f"{name}.weight": Ones() for name in norms}
