"""What contrastive losses read: embeddings of length 1, and the scale of their cosines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError
from l3m_like.core.init import Constant, Init, Normal, Zeros
from l3m_like.layers.pooling import Pool


class EmbeddingHead(ReadWriteBlock):
    """Pool the features, project them, and make their length 1.

    Reads   features [B, S, D]; mask [B, S] bool, False: padding (optional)
    Writes  embedding [B, E], at least float32

    Args:
        dim: D.
        embed_dim: E (None: D, without a projection).
        pool: a kind of ``layers.Pool``, or ``pool(dim)`` that makes a layer, such as ``AttentionPool``.
        bias: of the projection.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("embedding",)

    def __init__(
        self,
        dim: int,
        embed_dim: int | None,
        pool: str | Callable[[int], nn.Module] = "first",
        bias: bool = False,
        **ports: Any,
    ) -> None:
        super().__init__(**ports)
        if embed_dim is None and bias:
            raise UserError("EmbeddingHead: bias is that of the projection; give embed_dim, or leave it out.")
        self.pool: Any = Pool(pool) if isinstance(pool, str) else pool(dim)
        self.proj = None if embed_dim is None else nn.Linear(dim, embed_dim, bias=bias)

    def compute(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        pooled = self.pool(features, mask)
        out = pooled if self.proj is None else self.proj(pooled.to(self.proj.weight.dtype))
        return F.normalize(out.to(torch.promote_types(out.dtype, torch.float32)), dim=-1)

    def flops(self, features: Tensor, mask: Tensor | None = None) -> int:
        rows, tokens = features.shape[0], features.shape[0] * features.shape[1]
        return self.pool.flops(rows, tokens) + (0 if self.proj is None else 2 * rows * self.proj.weight.numel())

    def tp_plan(self) -> dict[str, str]:
        return {} if self.proj is None else {"proj": "replicated"}

    def optim_spec(self) -> dict[str, str | int]:
        return {} if self.proj is None else {"proj.weight": "adamw"}

    def init_spec(self) -> dict[str, Init]:
        if self.proj is None:
            return {}
        spec: dict[str, Init] = {"proj.weight": Normal(self.proj.in_features**-0.5)}
        return spec if self.proj.bias is None else spec | {"proj.bias": Zeros()}


class LogitScale(ReadWriteBlock):
    """The learned factor on cosines (CLIP), and the learned bias (SigLIP). No matrix, so neither decays.

    Writes  scale [], positive; bias [] if ``writes`` names it; both at least float32

    Args:
        start: of the scale.
        most: it is set back to this after a step that brought it above (None: no bound).
        bias: where the bias starts (None: there is none).
        ports: writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("scale", "bias")
    optional_outputs = ("bias",)
    full_precision = True

    def __init__(self, start: float, most: float | None = None, bias: float | None = None, **ports: Any) -> None:
        super().__init__(**ports)
        if not start > 0 or (most is not None and most < start):
            raise UserError(f"LogitScale: it starts at {start}, which must be above 0 and at most `most` ({most}).")
        if (bias is None) == ("bias" in self.writes):
            raise UserError("LogitScale: `bias` says where a bias starts that `writes` names; give both or neither.")
        self.start, self.most, self.bias_start = start, most, bias
        # of one element: FSDP cuts no scalars
        self.log_scale = nn.Parameter(torch.empty(1))
        self.bias = None if bias is None else nn.Parameter(torch.empty(1))

    def compute(self, *, outputs: Sequence[str]) -> dict[str, Tensor]:
        out = {"scale": self.log_scale.squeeze(0).exp()}
        # a copy, no view: FSDP frees what it gathered
        return out if self.bias is None else out | {"bias": self.bias.squeeze(0).clone()}

    def after_step(self, mesh: Any, skipped: Tensor | None = None) -> None:
        if self.most is not None:
            with torch.no_grad():
                self.get_parameter("log_scale").clamp_(max=math.log(self.most))

    def flops(self) -> int:
        return 0

    def tp_plan(self) -> dict[str, str]:
        return {name: "replicated" for name, _ in self.named_parameters()}

    def init_spec(self) -> dict[str, Init]:
        spec: dict[str, Init] = {"log_scale": Constant(math.log(self.start))}
        return spec if self.bias_start is None else spec | {"bias": Constant(self.bias_start)}
