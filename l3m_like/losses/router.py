"""What keeps the experts of a mixture evenly loaded, and how even they are. All read what a trunk's routers did:
``router_load``, ``router_probability`` [L, B, E], ``router_z`` [L, B] of L layers (``writes`` of the trunk names them)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l3m_like.losses.loss import Loss


class _OverRanks(Loss):
    """Loads of all ranks' batches are one. In an evaluation, which has no gradient, those of one rank's batch are taken by
    themselves: so the number of processes does not matter, and ``batch.micro`` does."""

    _mesh: Any = None

    def bind(self, mesh: Any) -> None:
        self._mesh = mesh

    def over_ranks(self, loads: Tensor) -> Tensor:
        return loads if self._mesh is None or not torch.is_grad_enabled() else self._mesh.sum(loads)


class LoadBalance(_OverRanks):
    """Load balance over the whole batch (Fedus et al., arXiv:2101.03961, eq. 4 to 6, as Qwen3-MoE takes it over all layers).

    ``E * sum_e f_e P_e``: f_e is how many times a token of a layer chose expert e, P_e the mean probability that the router gave
    it, both over the tokens of all rows and layers; k where all is even (k experts per token). It is no sum over rows, so the
    loads are summed over the mesh, and it refuses accumulation; ``RowLoadBalance`` does not.

    Reads   router_load, router_probability [L, B, E]
    Counts  tokens: document_ids [B, S] that are not padding
    """

    scope = "batch"

    def compute(self, router_load: Tensor, router_probability: Tensor) -> Tensor:
        probability = router_probability.sum((0, 1))
        load = router_load.sum((0, 1))
        # every token's probabilities sum to 1, so this is the number of (token, layer) pairs
        pairs = probability.detach().sum().unsqueeze(0)
        load, pairs = self.over_ranks(torch.cat((load, pairs))).split([load.numel(), 1])
        # a rank's part: P_e times the batch's tokens, of its own rows
        return load.numel() * (load / pairs.clamp(min=1) * probability).sum() / router_load.shape[0]

    def count(self, document_ids: Tensor) -> Tensor:
        return (document_ids >= 0).sum()


class RowLoadBalance(Loss):
    """Load balance within each row, summed over layers (DeepSeek-V3's sequence-wise loss, arXiv:2412.19437, eq. 17 to 20).

    ``sum_layers E / k * sum_e f_e P_e`` with f and P as in ``LoadBalance``, of one row and layer: 1 per layer where all is even.
    Mean over rows, so that it may be split into micro-batches.

    Reads   router_load, router_probability [L, B, E]
    Counts  rows that are not all padding, by document_ids [B, S]
    """

    def compute(self, router_load: Tensor, router_probability: Tensor) -> Tensor:
        tokens = router_probability.detach().sum(-1).clamp(min=1)
        share = router_load / router_load.sum(-1, keepdim=True).clamp(min=1)
        return router_load.shape[-1] * ((share * router_probability).sum(-1) / tokens).sum()

    def count(self, document_ids: Tensor) -> Tensor:
        return (document_ids >= 0).any(1).sum()


class ImageLoadBalance(RowLoadBalance):
    """``RowLoadBalance`` of rows that have no padding and no documents.

    Reads   router_load, router_probability [L, B, E]
    Counts  rows
    """

    def count(self, row: Tensor) -> Tensor:  # type: ignore[override]
        return torch.tensor(row.numel(), dtype=torch.int64)


class RouterZ(Loss):
    """``logsumexp(logits)^2`` of the routers, mean over tokens and layers: keeps their logits small (Zoph et al.,
    arXiv:2202.08906, eq. 5).

    Reads   router_z [L, B]
    Counts  tokens: document_ids [B, S] that are not padding
    """

    def compute(self, router_z: Tensor) -> Tensor:
        return router_z.mean(0).sum()

    def count(self, document_ids: Tensor) -> Tensor:
        return (document_ids >= 0).sum()


class LoadViolation(_OverRanks):
    """``max_e load_e / mean_e load_e - 1``, mean over layers: 0 where loads are even (Wang et al., arXiv:2408.15664, eq. 4).

    A metric. Loads are those of a micro-batch over all ranks, and micro-batches are averaged by their tokens.

    Reads   router_load [L, B, E]
    Counts  tokens: document_ids [B, S] that are not padding
    """

    def __init__(self, weight: None = None, **ports: Any) -> None:
        super().__init__(weight, **ports)

    def compute(self, router_load: Tensor, document_ids: Tensor) -> Tensor:
        load = self.over_ranks(router_load.detach().sum(1))
        violation = (load.amax(-1) / load.mean(-1).clamp(min=1e-20) - 1).mean()
        return violation * (document_ids >= 0).sum()

    def count(self, document_ids: Tensor) -> Tensor:
        return (document_ids >= 0).sum()
