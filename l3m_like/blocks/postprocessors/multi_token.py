"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): one more layer, trained on the token after the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.init import Init, Normal, Ones
from l3m_like.kernels.linear_cross_entropy import IGNORE, check_backend
from l3m_like.kernels.select import selected
from l3m_like.layers.masks import AttentionMask, LayerMasks, attended_pairs, counted_targets, counted_tokens
from l3m_like.layers.moe import RouterLoads
from l3m_like.layers.norm import RMSNorm
from l3m_like.layers.rope import Rope
from l3m_like.layers.vocabulary import vocabulary_nll

ROUTING = ("ahead_router_load", "ahead_router_probability", "ahead_router_z")


def targets_ahead(targets: Tensor, document_ids: Tensor | None) -> Tensor:
    """For each place the target of the next one, -100 at the end of a document: targets int64 [B, S], document_ids int [B, S]
    (None: one document per row) -> int64 [B, S]."""
    ahead = targets.roll(-1, dims=1)
    inside = torch.arange(targets.shape[1], device=targets.device) < targets.shape[1] - 1
    if document_ids is not None:
        inside = inside & (document_ids == document_ids.roll(-1, dims=1))
    return torch.where(inside, ahead, IGNORE)


class MultiTokenPrediction(ReadWriteBlock):
    """``layer(W [norm(e_{i+1}), norm(h_i)])`` predicts token i + 2 from the trunk's h_i and the embedding of token i + 1 (in this
    order, as in the published weights).

    h_i is the trunk's output *after the model's final norm*, so two norms follow each other. The paper says only "the
    representation given by the main model"; the published weights were fitted to this: the main model of the modeling file that
    comes with DeepSeek-R1's weights of such a layer ends with its norm and hands that tensor on, and so do vLLM and SGLang. It
    matters by the final norm's weight alone: the rescaling of the second norm undoes that of the first.

    It is left out at inference. Its vocabulary matrix and the final norm are to be the head's, ``tie: {postprocessor.head.weight:
    head.proj.weight, postprocessor.final_norm.weight: head.norm.weight}``, and embeddings are those that the trunk read. The last
    token of a document has no next one, and no target.

    Reads   hidden [B, S, D] of the trunk; tokens [B, S, D], the embeddings; targets [B, S] int64, -100 = none; positions,
            document_ids, cu_seqlens as ``Transformer`` reads them
    Writes  ahead_nll [B, S] at least float32, 0 where there is no target; if `writes` names them, what the layer's router did:
            ahead_router_load, ahead_router_probability [1, B, E], ahead_router_z [1, B]

    Args:
        vocab_size: V.
        dim: D.
        layer: ``layer(dim)`` makes it; its attention is causal.
        rope: as the trunk's.
        norm_eps: of the norms.
        training_only: leave it out at inference.
        ports: reads, writes, stream of ``ReadWriteBlock``.
    """

    outputs = ("ahead_nll", *ROUTING)
    optional_outputs = ROUTING
    shared = {"head.weight": "head.proj.weight", "final_norm.weight": "head.norm.weight"}

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        layer: Callable[[int], nn.Module],
        rope: Rope | None = None,
        norm_eps: float = 1e-6,
        *,
        training_only: bool = True,
        **ports: Any,
    ) -> None:
        super().__init__(training_only=training_only, **ports)
        self.dim, self.rope = dim, rope
        self.backend = check_backend(selected("linear_cross_entropy"))
        self.final_norm = RMSNorm(dim, eps=norm_eps)
        self.hidden_norm = RMSNorm(dim, eps=norm_eps)
        self.token_norm = RMSNorm(dim, eps=norm_eps)
        self.proj = nn.Linear(2 * dim, dim, bias=False)
        self.layer: Any = layer(dim)
        self.norm = RMSNorm(dim, eps=norm_eps)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.router_loads = RouterLoads([self.layer])

    def compute(
        self,
        hidden: Tensor,
        tokens: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        outputs: Sequence[str] = ("ahead_nll",),
    ) -> dict[str, Tensor]:
        length = tokens.shape[1]
        if positions is None:
            positions = torch.arange(length, device=tokens.device)
        # at a document's end this is another one's token; nothing attends to that place, and it has no target
        following = tokens.roll(-1, dims=1)
        joined = torch.cat((self.token_norm(following), self.hidden_norm(self.final_norm(hidden))), dim=-1)
        x = self.proj(joined.to(self.proj.weight.dtype))
        rope = self.rope(positions, x.dtype) if self.rope is not None else None
        mask = LayerMasks(AttentionMask("causal", document_ids, cu_seqlens=cu_seqlens), length, length, x).of(self.layer)
        out: dict[str, Tensor] = {}
        if getattr(self.layer, "routes", False):
            x, routing = self.layer(x, rope, mask, None, None if document_ids is None else document_ids >= 0)
            out |= {port: value.unsqueeze(0) for port, value in zip(ROUTING, routing, strict=True)}
            if self.training and torch.is_grad_enabled():
                self.router_loads.add(out[ROUTING[0]])
        else:
            x = self.layer(x, rope, mask)
        weight = self.head.weight  # never self.head(...): the matrix is another's
        ahead = targets_ahead(targets, document_ids)
        out["ahead_nll"] = vocabulary_nll(self.norm(x).to(weight.dtype), weight, ahead, backend=self.backend)
        return {port: out[port] for port in outputs}

    def after_step(self, mesh: Any, skipped: Tensor | None = None) -> None:
        self.router_loads.step(mesh.sum, skipped)

    def shard_units(self) -> Iterable[nn.Module]:
        return (self.layer,)

    def flops(
        self,
        hidden: Tensor,
        tokens: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> int:
        rows, length = tokens.shape[:2]
        window = getattr(self.layer.mixer, "window", None)
        pairs = attended_pairs(AttentionMask("causal", document_ids, window=window), rows, length, length)
        counted = counted_tokens((rows, length), document_ids)
        logits = 2 * counted_targets((rows, length), targets) * self.head.weight.numel()
        return 2 * counted * self.proj.weight.numel() + self.layer.flops(counted, pairs) + logits

    def tp_plan(self) -> dict[str, str]:
        whole = dict.fromkeys(("final_norm", "hidden_norm", "token_norm", "proj", "norm"), "replicated")
        return {**whole, "head": "vocab"}

    def optim_spec(self) -> dict[str, str | int]:
        return {"head.weight": "adamw"}

    def init_spec(self) -> dict[str, Init]:
        names = ("final_norm", "hidden_norm", "token_norm", "norm")
        norms: dict[str, Init] = {f"{name}.weight": Ones() for name in names}
        return norms | {"proj.weight": Normal(0.02), "head.weight": Normal(0.02)}
