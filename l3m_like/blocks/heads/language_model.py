"""Language-model head: final norm and vocabulary projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError
from l3m_like.core.init import Init, Normal
from l3m_like.kernels.linear_cross_entropy import check_backend, linear_cross_entropy
from l3m_like.kernels.select import selected
from l3m_like.layers.norm import make_norm, norm_spec


class LanguageModelHead(ReadWriteBlock):
    """Final norm, then logits or, without ever holding all logits, the negative log-likelihood of the targets.

    Reads   hidden [B, S, D]; targets [B, S] int64, already shifted, -100 = no target (needed for nll)
    Writes  nll [B, S] at least float32, 0 where there is no target; logits [B, S, V] in the weight's dtype. `writes` says
            which; the inference graph writes the logits.

    Args:
        vocab_size: V.
        dim: D.
        norm_eps: of the final norm.
        norm: "rms", or "layer": LayerNorm with weight and bias.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("logits", "nll")
    optional_outputs = ("logits", "nll")
    inference_outputs = ("logits",)

    def __init__(self, vocab_size: int, dim: int, norm_eps: float = 1e-6, norm: str = "rms", **ports: Any) -> None:
        super().__init__(**ports)
        self.backend = check_backend(selected("linear_cross_entropy"))
        self.norm = make_norm(norm, dim, norm_eps)
        self.proj = nn.Linear(dim, vocab_size, bias=False)

    def compute(self, hidden: Tensor, targets: Tensor | None = None, *, outputs: Sequence[str]) -> dict[str, Tensor]:
        weight = self.proj.weight  # never self.proj(...): the matrix may be the embedding's
        hidden = self.norm(hidden).to(weight.dtype)
        out: dict[str, Tensor] = {}
        if "logits" in outputs:
            out["logits"] = F.linear(hidden, weight)
        if "nll" in outputs:
            if targets is None:
                raise UserError(f"LanguageModelHead writes nll, which needs the key '{self.reads['targets']}'.")
            out["nll"] = linear_cross_entropy(hidden, weight, targets, backend=self.backend)
        return out

    def flops(self, hidden: Tensor, targets: Tensor | None = None) -> int:
        return 2 * hidden.shape[0] * hidden.shape[1] * self.proj.in_features * self.proj.out_features

    def tp_plan(self) -> dict[str, str]:
        return {"norm": "replicated", "proj": "vocab"}

    def optim_spec(self) -> dict[str, str | int]:
        return {"proj.weight": "adamw"}

    def init_spec(self) -> dict[str, Init]:
        return norm_spec("norm", self.norm) | {"proj.weight": Normal(0.02)}
