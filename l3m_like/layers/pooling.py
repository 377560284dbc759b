"""From a sequence of features to one vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.init import Init, Normal, Zeros
from l3m_like.kernels.attention import attention
from l3m_like.layers.mlp import MLP
from l3m_like.layers.norm import make_norm, norm_spec

POOLS = ("first", "last", "end", "mean")


class Pool(nn.Module):
    """features [B, S, D] -> [B, D].

    Args:
        kind: "first" (a class token); "last", padding or not; "end": the last that ``mask`` has; "mean" of those that it has.
        skip: tokens in front that the mean leaves out (a class token).
    """

    def __init__(self, kind: str, *, skip: int = 0) -> None:
        super().__init__()
        if kind not in POOLS:
            raise UserError(f"no pool '{kind}'. {did_you_mean(kind, POOLS)} Or give a layer, such as AttentionPool.")
        if skip and kind != "mean":
            raise UserError(f"Pool: skip belongs to the kind mean, not to {kind}.")
        self.kind, self.skip = kind, skip

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """``mask`` [B, S] bool: True for tokens, False for padding behind them; None: all are tokens."""
        if self.kind == "first":
            return features[:, 0]
        if self.kind == "last" or (self.kind == "end" and mask is None):
            return features[:, -1]
        if self.kind == "end" and mask is not None:
            place = (mask.sum(1) - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, features.shape[-1])
            return features.gather(1, place).squeeze(1)
        if mask is None:
            return features[:, self.skip :].mean(1)
        kept = mask[:, self.skip :, None].to(features.dtype)
        return (features[:, self.skip :] * kept).sum(1) / kept.sum(1).clamp(min=1)

    def flops(self, rows: int, tokens: int) -> int:
        return 0


class AttentionPool(nn.Module):
    """One learned query attends to all tokens; an MLP with a residual follows (the "MAP" head of SigLIP and of Zhai et al.,
    arXiv:2106.04560): features [B, S, D] -> [B, D].

    Args:
        dim: D.
        num_heads: of the attention.
        hidden_dim: of the MLP.
        norm_eps: of the LayerNorm before it.
        activation: of the MLP.
    """

    def __init__(
        self, dim: int, *, num_heads: int, hidden_dim: int, norm_eps: float = 1e-6, activation: str = "gelu_tanh"
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise UserError(f"AttentionPool: dim ({dim}) is not a multiple of num_heads ({num_heads}).")
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(dim))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))
        self.norm = make_norm("layer", dim, norm_eps)
        self.mlp = MLP(dim, hidden_dim=hidden_dim, activation=activation)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            raise UserError("AttentionPool takes no mask: it is for images, whose tokens are all there.")
        features = features.to(self.q_proj.weight.dtype)
        query = self.query.to(features.dtype).expand(features.shape[0], 1, -1)
        projected = self.q_proj(query), self.k_proj(features), self.v_proj(features)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in projected)
        pooled = self.out_proj(attention(q, k, v).flatten(2)).squeeze(1)
        return pooled + self.mlp(self.norm(pooled))

    def flops(self, rows: int, tokens: int) -> int:
        dim = self.q_proj.in_features
        return 4 * tokens * dim * dim + 4 * rows * dim * dim + 4 * tokens * dim + self.mlp.flops(rows)

    def tp_plan(self) -> dict[str, str]:
        whole = ("query", "q_proj", "k_proj", "v_proj", "out_proj", "norm")
        return dict.fromkeys(whole, "replicated")

    def init_spec(self) -> dict[str, Init]:
        spec: dict[str, Init] = {"query": Normal(0.02)} | norm_spec("norm", self.norm)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            spec |= {f"{name}.weight": Normal(0.02), f"{name}.bias": Zeros()}
        return spec
