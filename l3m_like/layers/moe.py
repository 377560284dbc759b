"""Mixtures of experts: of many SwiGLU layers, a router picks a few for each token.

No shape depends on the routing: the B*S*k pairs (token, expert) are sorted by expert, and the sizes of the groups stay on the
device. No token is dropped. Tokens of padding are routed like others, for fixed shapes, and count in no statistic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.init import Init, Normal
from l3m_like.kernels.grouped_linear import grouped_linear
from l3m_like.kernels.select import selected
from l3m_like.kernels.swiglu import swiglu
from l3m_like.layers.mlp import SwiGLU

SCORES = ("softmax", "sigmoid")


class Routing(NamedTuple):
    """What a router did with each row of a batch, without padding; at least float32.

    ``load`` [B, E]: tokens that went to each expert (no gradient); ``probability`` [B, E]: the sum over tokens of the scores,
    normalised to 1 per token; ``z`` [B]: the sum over tokens of ``logsumexp(logits)^2``.
    """

    load: Tensor
    probability: Tensor
    z: Tensor


class Router(nn.Module):
    """Picks ``top_k`` of E experts for each token, and their weights.

    Scores are the softmax over experts (Qwen3-MoE, DeepSeek-V2) or sigmoids (DeepSeek-V3, arXiv:2412.19437, eq. 12 to 16),
    computed in at least float32. A bias is added to them for the choice alone; ``move`` balances loads by it, without a loss
    (Wang et al., arXiv:2408.15664).

    Args:
        dim: D.
        experts: E.
        top_k: experts per token.
        score: "softmax" or "sigmoid".
        normalize: divide a token's weights by their sum.
        scale: factor on the weights, after that.
        groups: of experts, equally large; a token picks from its best ``kept_groups`` of them (node-limited routing).
        kept_groups: of these.
        group_top: a group's score is the sum of so many of its best experts (DeepSeek-V3: 2, DeepSeek-V2: 1).
        bias_rate: how far a step moves the bias (DeepSeek-V3: 1e-3); 0: it stays as it is; None: there is none.
    """

    bias: Tensor | None
    #: what meta initialisation puts into the buffers
    buffer_values = {"bias": 0.0}

    def __init__(
        self,
        dim: int,
        experts: int,
        top_k: int,
        *,
        score: str = "softmax",
        normalize: bool = True,
        scale: float = 1.0,
        groups: int = 1,
        kept_groups: int = 1,
        group_top: int = 2,
        bias_rate: float | None = None,
    ) -> None:
        super().__init__()
        if score not in SCORES:
            raise UserError(f"Router: no score '{score}'. {did_you_mean(score, SCORES)}")
        if groups < 1 or experts % groups or not 1 <= kept_groups <= groups:
            raise UserError(
                f"Router: {experts} experts in groups: {groups}, kept_groups: {kept_groups}; groups must divide the experts, and "
                "kept_groups is from 1 to groups."
            )
        reachable = experts // groups * kept_groups
        if not 1 <= top_k <= reachable:
            raise UserError(f"Router: top_k is {top_k}; it is from 1 to {reachable}, the experts that a token can pick from.")
        if groups > 1 and not 1 <= group_top <= experts // groups:
            raise UserError(f"Router: group_top is {group_top}; a group has {experts // groups} experts.")
        self.experts, self.top_k = experts, top_k
        self.score, self.normalize, self.scale = score, normalize, scale
        self.groups, self.kept_groups, self.group_top = groups, kept_groups, group_top
        self.bias_rate = bias_rate
        self.weight = nn.Parameter(torch.empty(experts, dim))
        self.register_buffer("bias", None if bias_rate is None else torch.zeros(experts, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """The bias keeps at least float32 when the module is cast: it moves by small steps, and near ties choose experts."""
        before = self.bias
        super()._apply(fn, recurse)
        if before is not None and self.bias is not None and self.bias.dtype.itemsize < 4:
            self.bias = self.bias.float() if before.is_meta else before.to(self.bias.device)
        return self

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor, Routing]:
        """x [B, S, D], valid bool [B, S] (None: all) -> weights [B, S, k] in at least float32, experts int64 [B, S, k], and
        what was done."""
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), self.weight.to(wide))
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        indices = self._choose(scores.detach())
        weights = scores.gather(-1, indices)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
        return weights * self.scale, indices, self._routing(logits, scores, indices, valid)

    def _choose(self, scores: Tensor) -> Tensor:
        choice = scores if self.bias is None else scores + self.bias
        if self.groups > 1:
            grouped = choice.unflatten(-1, (self.groups, -1))
            best = grouped.topk(self.group_top, dim=-1).values.sum(-1).topk(self.kept_groups, dim=-1).indices
            kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
            choice = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
        return choice.topk(self.top_k, dim=-1).indices

    def _routing(self, logits: Tensor, scores: Tensor, indices: Tensor, valid: Tensor | None) -> Routing:
        chosen = torch.zeros_like(scores).scatter(-1, indices, 1.0)
        probability = scores if self.score == "softmax" else scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)
        z = logits.logsumexp(-1).square()
        if valid is not None:
            counted = valid.to(scores.dtype)
            chosen, probability, z = chosen * counted.unsqueeze(-1), probability * counted.unsqueeze(-1), z * counted
        return Routing(chosen.sum(1), probability.sum(1), z.sum(1))

    @torch.no_grad()
    def move(self, load: Tensor) -> None:
        """Move the bias towards even loads; ``load`` [E]: tokens of a whole step that went to each expert.

        ``d = rate * sign(mean(load) - load); bias += d - mean(d)``: the mean of the biases stays.
        """
        if self.bias is not None and self.bias_rate:
            change = self.bias_rate * torch.sign(load.mean() - load)
            self.bias += (change - change.mean()).to(self.bias.dtype)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.weight.shape[0] * self.weight.shape[1]

    def init_spec(self) -> dict[str, Init]:
        return {"weight": Normal(0.02)}

    def optim_spec(self) -> dict[str, str | int]:
        return {"weight": "adamw"}  # its rows are classifiers, as those of a vocabulary


class Experts(nn.Module):
    """E SwiGLU layers of width F as three stacked parameters: ``gate``, ``up`` [E, F, D] and ``down`` [E, D, F]."""

    #: tensor parallelism cuts F: the dimension of each parameter
    expert_cuts = {"gate": 1, "up": 1, "down": 2}

    def __init__(self, dim: int, hidden_dim: int, experts: int) -> None:
        super().__init__()
        self.backend = selected("swiglu")
        self.gate = nn.Parameter(torch.empty(experts, hidden_dim, dim))
        self.up = nn.Parameter(torch.empty(experts, hidden_dim, dim))
        self.down = nn.Parameter(torch.empty(experts, dim, hidden_dim))

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """``sum_j weights[n, j] * expert_{indices[n, j]}(x[n])``: x [N, D], weights and indices [N, k] -> [N, D]."""
        # under tensor parallelism a parameter is a distributed tensor, and a rank computes with its part
        gate, up, down = (w.to_local() if isinstance(w, DTensor) else w for w in (self.gate, self.up, self.down))
        expert, order = indices.flatten().sort(stable=True)
        place = torch.empty_like(order).scatter(0, order, torch.arange(order.numel(), device=order.device))
        numbers = torch.arange(gate.shape[0], device=order.device)
        ends = torch.searchsorted(expert, numbers, right=True, out_int32=True)
        top_k = indices.shape[1]
        rows = _Take.apply(x.to(gate.dtype), order, place, top_k)
        weight = _Take.apply(weights.reshape(-1, 1), order, place, 1)
        hidden = swiglu(grouped_linear(rows, gate, ends), grouped_linear(rows, up, ends), backend=self.backend)
        # weighted here, where rows are shortest
        out = grouped_linear(hidden * weight.to(hidden.dtype), down, ends)
        return _Take.apply(out, place, order, 1).unflatten(0, (-1, top_k)).sum(1)

    def flops(self, rows: int) -> int:
        return 6 * rows * self.gate.shape[1] * self.gate.shape[2]

    def init_spec(self) -> dict[str, Init]:
        return {name: Normal(0.02) for name in ("gate", "up", "down")}

    def optim_spec(self) -> dict[str, str | int]:
        return dict.fromkeys(("gate", "up", "down"), self.gate.shape[0])


class _Take(torch.autograd.Function):
    """``x[order // k]``, [N, C] -> [N*k, C], where ``order`` is a permutation of N*k places and ``place`` its inverse. The
    gradient is gathered by the inverse, where that of an indexing would be added by atomics, in any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.k = k
        return x[order if k == 1 else order // k]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        grad = grad[place]
        return grad if ctx.k == 1 else grad.unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class MoE(nn.Module):
    """A mixture of SwiGLU experts [B, S, D] -> [B, S, D]: ``sum_j w_j expert_j(x)`` over a token's experts, and ``shared(x)``.

    As the ``mlp`` of a layer it is called with the tokens that count, and returns what its router did as well.

    Args:
        dim: D.
        hidden_dim: width of each expert.
        experts: E.
        top_k: experts per token.
        router: ``router(dim, experts, top_k)``; default: the softmax of all experts, normalised over the chosen (Qwen3-MoE).
        shared_hidden_dim: width of a SwiGLU that every token passes as well (DeepSeek: expert width times shared experts).
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden_dim: int,
        experts: int,
        top_k: int,
        router: Callable[[int, int, int], Router] = Router,
        shared_hidden_dim: int | None = None,
    ) -> None:
        super().__init__()
        if hidden_dim < 1 or experts < 1:
            raise UserError(f"MoE: hidden_dim ({hidden_dim}) and experts ({experts}) must be at least 1.")
        self.router = router(dim, experts, top_k)
        self.experts = Experts(dim, hidden_dim, experts)
        self.shared = None if shared_hidden_dim is None else SwiGLU(dim, hidden_dim=shared_hidden_dim)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x [B, S, D]; valid bool [B, S]: tokens that are no padding (None: all)."""
        weights, indices, routing = self.router(x, valid)
        out = self.experts(x.flatten(0, 1), weights.flatten(0, 1), indices.flatten(0, 1)).view(x.shape)
        return out if self.shared is None else out + self.shared(x), routing

    def flops(self, tokens: int) -> int:
        """Of the experts that tokens go to."""
        shared = 0 if self.shared is None else self.shared.flops(tokens)
        return self.router.flops(tokens) + self.experts.flops(tokens * self.router.top_k) + shared

    def tp_plan(self) -> dict[str, str]:
        return {"router": "replicated", "experts": "experts"}


class RouterLoads:
    """Counts the loads of routers over the micro-batches of a step, and moves their biases after it.

    It is filled from outputs of the layers, not inside of them: a layer that is computed again in the backward pass counts once.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.routers = [router for module in modules for router in module.modules() if isinstance(router, Router)]
        self._load: Tensor | None = None

    def add(self, loads: Tensor) -> None:
        """``loads`` [L, B, E] of one micro-batch, a row of layers in the order of the modules."""
        if any(router.bias_rate and router.weight.requires_grad for router in self.routers) and not loads.is_meta:
            load = loads.detach().sum(1)
            self._load = load if self._load is None else self._load + load

    def step(self, total: Callable[[Tensor], Tensor], skipped: Tensor | None = None) -> None:
        """Move the biases, but where the device scalar ``skipped`` is 1; ``total`` sums loads over all rows of the batch."""
        if self._load is not None:
            loads = total(self._load)
            loads = loads if skipped is None else loads * (1 - skipped).to(loads.dtype)  # even ones move nothing
            for router, load in zip(self.routers, loads, strict=True):
                if router.weight.requires_grad:  # a frozen one stays as it is
                    router.move(load)
            self._load = None
