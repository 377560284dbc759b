"""Language-model head: final norm and vocabulary projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError
from l3m_like.core.init import Init, Normal
from l3m_like.kernels.linear_cross_entropy import check_backend
from l3m_like.kernels.select import selected
from l3m_like.layers.masks import counted_targets
from l3m_like.layers.norm import make_norm, norm_spec
from l3m_like.layers.vocabulary import vocabulary_logits, vocabulary_nll


class LanguageModelHead(ReadWriteBlock):
    """Final norm, then logits or, without ever holding all logits, the negative log-likelihood of the targets.

    Reads   hidden [B, S, D]; targets [B, S] int64, already shifted, -100 = no target (needed for nll); weights [B, S] float
            (needed for weighted_nll); places [P] int64, those of S whose logits are written (without: all), which a sampler says
    Writes  nll [B, S] at least float32, 0 where there is no target; weighted_nll [B, S], the same times the weights (a plain
            sum of it costs one pass over the vocabulary, as one of nll does); logits [B, S or P, V] in the weight's dtype.
            `writes` says which; the inference graph writes the logits.

    Args:
        vocab_size: V.
        dim: D.
        norm_eps: of the final norm.
        norm: "rms", or "layer": LayerNorm with weight and bias.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs: tuple[str, ...] = ("logits", "nll", "weighted_nll")
    optional_outputs: tuple[str, ...] = ("logits", "nll", "weighted_nll")
    inference_outputs: tuple[str, ...] | None = ("logits",)

    def __init__(self, vocab_size: int, dim: int, norm_eps: float = 1e-6, norm: str = "rms", **ports: Any) -> None:
        super().__init__(**ports)
        self.backend = check_backend(selected("linear_cross_entropy"))
        #: of what the output matrix is multiplied with; see ``set_output_factor``
        self.output_factor = 1.0
        self.norm = make_norm(norm, dim, norm_eps)
        self.proj = nn.Linear(dim, vocab_size, bias=False)

    def compute(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        places: Tensor | None = None,
        *,
        outputs: Sequence[str],
    ) -> dict[str, Tensor]:
        weight = self.proj.weight  # never self.proj(...): the matrix may be the embedding's
        out: dict[str, Tensor] = {}
        if "logits" in outputs:
            asked = hidden if places is None else hidden.index_select(1, places)
            out["logits"] = vocabulary_logits(self.normed(asked), weight)
        if len(outputs) > len(out):
            hidden = self.normed(hidden)
        for port, factors in {"nll": None, "weighted_nll": weights}.items():
            if port not in outputs:
                continue
            if targets is None:
                raise UserError(f"LanguageModelHead writes {port}, which needs the key '{self.reads['targets']}'.")
            if port == "weighted_nll" and weights is None:
                raise UserError(f"LanguageModelHead writes weighted_nll, which needs the key '{self.reads['weights']}'.")
            out[port] = vocabulary_nll(hidden, weight, targets, weights=factors, backend=self.backend)
        return out

    def normed(self, hidden: Tensor) -> Tensor:
        """What the output matrix is multiplied with, in its dtype."""
        hidden = self.norm(hidden).to(self.proj.weight.dtype)
        return hidden if self.output_factor == 1 else hidden * self.output_factor

    def set_output_factor(self, factor: float) -> None:
        """Multiply logits by ``factor`` (muP)."""
        self.output_factor = factor

    def flops(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        places: Tensor | None = None,
    ) -> int:
        """Of the tokens that have a target, where the targets are the loader's."""
        shape = hidden.shape[0], hidden.shape[1] if places is None else places.numel()
        return 2 * counted_targets(shape, targets) * self.proj.in_features * self.proj.out_features

    def tp_plan(self) -> dict[str, str]:
        return {"norm": "replicated", "proj": "vocab"}

    def optim_spec(self) -> dict[str, str | int]:
        return {"proj.weight": "adamw"}

    def init_spec(self) -> dict[str, Init]:
        return norm_spec("norm", self.norm) | {"proj.weight": Normal(0.02)}
