"""Matrices with a row for every token, which tensor parallelism may cut: a rank then has an equal part of the rows."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from l3m_like.kernels.embedding import embedding
from l3m_like.kernels.linear_cross_entropy import linear_cross_entropy
from l3m_like.kernels.select import selected


class TokenEmbedding(nn.Embedding):
    """A vector for every token: ids int64 [...] -> [..., D]; weight [V, D]. ``kernels.embedding`` chooses the backward pass; a
    matrix that tensor parallelism has cut has torch's. Its owner names the weight in ``init_spec``."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__(vocab_size, dim)
        self.backend = selected("embedding")

    def forward(self, ids: Tensor) -> Tensor:
        if isinstance(self.weight, DTensor):  # cut by tensor parallelism, which looks up in the parts
            return super().forward(ids)
        return embedding(ids, self.weight, backend=self.backend)


def vocabulary_nll(hidden: Tensor, weight: Tensor, targets: Tensor, *, backend: str, weights: Tensor | None = None) -> Tensor:
    """``linear_cross_entropy`` of ``hidden`` [..., D] with ``weight`` [V, D], whole or cut."""
    if not isinstance(weight, DTensor) or backend == "reference":  # which knows no cut vocabulary
        return linear_cross_entropy(hidden, whole(weight), targets, weights=weights, backend=backend)
    group = weight.device_mesh.get_group()
    return linear_cross_entropy(hidden, weight.to_local(), targets, weights=weights, group=group, backend=backend)


def vocabulary_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """``hidden`` [..., D] times ``weight`` [V, D], whole or cut: all logits [..., V], on every rank."""
    if not isinstance(weight, DTensor):
        return F.linear(hidden, weight)
    # as a product of distributed tensors, whose backward pass sums what the ranks' rows say of `hidden`
    same = DTensor.from_local(hidden, weight.device_mesh, [Replicate()], run_check=False)
    logits: Any = F.linear(same, weight)
    return logits.full_tensor()


def whole(weight: Tensor) -> Tensor:
    """The whole matrix, gathered where it is cut; each rank's part of the gradient goes back to its rows."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
