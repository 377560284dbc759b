"""Transformer layers: residual streams around a sequence mixer and an MLP, both given as constructors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from l3m_like.core.errors import UserError
from l3m_like.core.init import Init, XavierUniform
from l3m_like.kernels.attention import LoweredMask
from l3m_like.kernels.modulated_norm import adds_bias, gated_residual
from l3m_like.kernels.select import selected
from l3m_like.layers.cache import LayerCache
from l3m_like.layers.linear import bias_apart, last_linear
from l3m_like.layers.modulation import Modulation
from l3m_like.layers.moe import MoE
from l3m_like.layers.norm import LayerNorm, RMSNorm, make_norm, norm_spec


class TransformerLayer(nn.Module):
    """Pre-norm layer: ``x += mixer(norm_1(x)); x += mlp(norm_2(x))``, x [B, S, D].

    Args:
        dim: D.
        mixer: ``mixer(dim)`` mixes along the sequence: called with (x, rope, mask, cache), has ``flops(tokens, pairs)``.
        mlp: ``mlp(dim)``, called with x, has ``flops(tokens)``. A mixture of experts (``MoE``) is called with ``valid`` as well;
            the layer then returns (x, ``Routing``).

    Where the mixer gives its keys and values to layers above (``kv_every`` of the trunk), they come last of what is returned.
        norm_eps: of both norms.
        norm: "rms", or "layer": LayerNorm with weight and bias.
    """

    #: it runs again in the backward pass: activation checkpointing says so
    recomputed = False

    mixer: Any
    mlp: Any

    def __init__(
        self,
        dim: int,
        *,
        mixer: Callable[[int], nn.Module],
        mlp: Callable[[int], nn.Module],
        norm_eps: float = 1e-6,
        norm: str = "rms",
    ) -> None:
        super().__init__()
        self.norm_1 = make_norm(norm, dim, norm_eps)
        self.mixer = mixer(dim)
        self.norm_2 = make_norm(norm, dim, norm_eps)
        self.mlp = mlp(dim)
        #: it takes ``valid``, and returns what its router did
        self.routes = isinstance(self.mlp, MoE)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: LoweredMask | None = None,
        cache: LayerCache | None = None,
        valid: Tensor | None = None,
        kv: tuple[Tensor, Tensor] | None = None,
        keep: Tensor | None = None,
        deferred: Tensor | None = None,
    ) -> Any:
        """x; with experts (x, ``Routing``); and ``kv`` behind them if the mixer gives it.

        ``keep`` [2, B]: factors on what the mixer and the MLP add to each row (stochastic depth). With what the layer before has
        ``deferred`` [B, S, D], which the first norm adds in its own pass, what this one's MLP gives comes behind x, not in it.
        """
        normed, x = self.norm_1.with_residual(x) if deferred is None else self.norm_1(deferred, residual=x)
        mixed = self.mixer(normed, rope, mask, cache, *(() if kv is None else (kv,)))
        mixed, *given = mixed if isinstance(mixed, tuple) else (mixed,)
        normed, x = self.norm_2(mixed if keep is None else mixed * keep[0].view(-1, 1, 1), residual=x)
        out, *routing = self.mlp(normed, valid) if self.routes else (self.mlp(normed),)
        out = out if keep is None else out * keep[1].view(-1, 1, 1)
        if deferred is not None:
            return x, out, *routing, *given
        return (x + out, *routing, *given) if routing or given else x + out

    def can_defer(self, x: Tensor) -> bool:
        """Whether the next layer's norm had better add what this one's MLP gives: one pass over x less. Not where the layer is
        recomputed, which keeps what it is given: one tensor, not two."""
        return isinstance(self.norm_1, RMSNorm) and self.norm_1.adds_residual(x) and not self.recomputed

    def nothing_deferred(self, x: Tensor) -> Tensor:
        """For the first layer: zeros. They require gradients where x does, so that it shares the others' graph."""
        return _Zeros.apply(x)

    def add_deferred(self, x: Tensor, deferred: Tensor) -> Tensor:
        """What the last layer left."""
        return x + deferred

    def flops(self, tokens: int, pairs: int) -> int:
        return self.mixer.flops(tokens, pairs) + self.mlp.flops(tokens)

    def tp_plan(self) -> dict[str, str]:
        return {"norm_1": "replicated", "norm_2": "replicated"}

    def init_spec(self) -> dict[str, Init]:
        return norm_spec("norm_1", self.norm_1) | norm_spec("norm_2", self.norm_2)


class _Zeros(torch.autograd.Function):
    """In the shape of x, to which they give no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


class ParallelLayer(nn.Module):
    """Attention and MLP side by side (PaLM, arXiv:2204.02311, section 2): ``x + mixer(norm(x)) + mlp(norm(x))``, x [B, S, D].

    Args:
        dim: D.
        mixer, mlp: as in ``TransformerLayer``.
        norm_eps: of the norm.
        norm: as in ``TransformerLayer``.
    """

    mixer: Any
    mlp: Any

    def __init__(
        self,
        dim: int,
        *,
        mixer: Callable[[int], nn.Module],
        mlp: Callable[[int], nn.Module],
        norm_eps: float = 1e-6,
        norm: str = "rms",
    ) -> None:
        super().__init__()
        self.norm = make_norm(norm, dim, norm_eps)
        self.mixer = mixer(dim)
        self.mlp = mlp(dim)
        if isinstance(self.mlp, MoE):
            raise UserError("ParallelLayer takes no experts; use TransformerLayer for them.")

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: LoweredMask | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        normed, x = self.norm.with_residual(x)
        return x + self.mixer(normed, rope, mask, cache) + self.mlp(normed)

    def flops(self, tokens: int, pairs: int) -> int:
        return self.mixer.flops(tokens, pairs) + self.mlp.flops(tokens)

    def tp_plan(self) -> dict[str, str]:
        return {"norm": "replicated"}

    def init_spec(self) -> dict[str, Init]:
        return norm_spec("norm", self.norm)


class LadderLayer(nn.Module):
    """Ladder residual (arXiv:2501.06589, eq. 2): a module reads the stream as it was before the module ahead of it added its
    output, ``x_i = x_{i-1} + h_i(x_{i-2})``, attention and MLP by turns.

    So that module's sum over tensor-parallel ranks may be under way while the next one computes. The trunk carries two streams,
    [2, B, S, D]: x_i and x_{i-1}.

    Args:
        dim: D.
        mixer, mlp: as in ``TransformerLayer``.
        norm_eps: of both norms.
        norm: as in ``TransformerLayer``.
    """

    #: of the trunk, that go through a layer
    streams = 2

    mixer: Any
    mlp: Any

    def __init__(
        self,
        dim: int,
        *,
        mixer: Callable[[int], nn.Module],
        mlp: Callable[[int], nn.Module],
        norm_eps: float = 1e-6,
        norm: str = "rms",
    ) -> None:
        super().__init__()
        self.norm_1 = make_norm(norm, dim, norm_eps)
        self.mixer = mixer(dim)
        self.norm_2 = make_norm(norm, dim, norm_eps)
        self.mlp = mlp(dim)
        if isinstance(self.mlp, MoE):
            raise UserError("LadderLayer takes no experts; use TransformerLayer for them.")

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: LoweredMask | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x [2, B, S, D] -> [2, B, S, D]."""
        now, before = x.unbind()
        mixed = self.mixer(self.norm_1(before), rope, mask, cache)
        out = self.mlp(self.norm_2(now))  # ahead of the first use of `mixed`, which waits for its sum
        now = now + mixed
        return torch.stack((now + out, now))

    def flops(self, tokens: int, pairs: int) -> int:
        return self.mixer.flops(tokens, pairs) + self.mlp.flops(tokens)

    def tp_plan(self) -> dict[str, str]:
        return {"norm_1": "replicated", "norm_2": "replicated"}

    def init_spec(self) -> dict[str, Init]:
        return norm_spec("norm_1", self.norm_1) | norm_spec("norm_2", self.norm_2)


class DeferredResidual(NamedTuple):
    """What a ``DiTLayer`` has not yet added to its x: ``gate * (branch + bias)``; gate [B, D], branch [B, S, D], bias [D]."""

    gate: Tensor
    branch: Tensor
    bias: Tensor


class DiTLayer(nn.Module):
    """adaLN-Zero layer (arXiv:2212.09748): ``x += gate * mixer(norm(x) (1 + scale) + shift)``, then the MLP likewise; shift,
    scale and gate of both branches come from the condition. DiT^DH (RAE, arXiv:2510.11690) has RMSNorms, rotary positions, and in
    its head a condition for each token.

    Args:
        dim: D.
        mixer, mlp: as in ``TransformerLayer``. Their matrices are drawn Xavier-uniform, as DiT and SiT do.
        norm_eps: of both norms.
        norm: "layer": LayerNorm without weights, or "rms".
    """

    #: it runs again in the backward pass: activation checkpointing says so
    recomputed = False

    mixer: Any
    mlp: Any

    def __init__(
        self,
        dim: int,
        *,
        mixer: Callable[[int], nn.Module],
        mlp: Callable[[int], nn.Module],
        norm_eps: float = 1e-6,
        norm: str = "layer",
    ) -> None:
        super().__init__()
        self.modulation = Modulation(dim, 6)
        self.norm_1 = make_norm(norm, dim, norm_eps, modulated=True)
        self.mixer = mixer(dim)
        self.norm_2 = make_norm(norm, dim, norm_eps, modulated=True)
        self.mlp = mlp(dim)
        self.backend = selected("modulated_norm")
        for part in (self.mixer, self.mlp):
            if hasattr(part, "weight_init"):
                part.weight_init = XavierUniform()

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: LoweredMask | None = None,
        deferred: DeferredResidual | None = None,
    ) -> Any:
        """x [B, S, D], condition [B, D] or [B, S, D], rope and mask as ``Attention.forward`` takes them -> [B, S, D].

        With what the layer before has ``deferred``, which the first norm adds in its own pass, it returns (x, what it defers).
        """
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(condition)
        if deferred is None:
            normed, x = self.norm_1.with_residual(x, shift_1, scale_1)
        else:
            normed, x = self.norm_1.of_sum(x, deferred.gate.unsqueeze(1), deferred.branch, shift_1, scale_1, deferred.bias)
        fused = adds_bias(x, gate_1, backend=self.backend)
        # an RMSNorm has no kernel for the sum before it
        apart = fused and isinstance(self.norm_2, LayerNorm)
        mixed, bias = bias_apart(self.mixer, normed, rope, mask) if apart else (self.mixer(normed, rope, mask), None)
        normed, x = self.norm_2.of_sum(x, gate_1, mixed, shift_2, scale_2, bias)
        out, bias = bias_apart(self.mlp, normed) if fused else (self.mlp(normed), None)
        if deferred is None:
            return gated_residual(x, gate_2, out, bias, backend=self.backend)
        # FSDP's hooks take no views, and it frees this layer's own bias
        gate = gate_2.squeeze(1).clone()
        return x, DeferredResidual(gate, out, 0 * gate.sum(0) if bias is None else bias.clone())

    def can_defer(self, x: Tensor, condition: Tensor) -> bool:
        """Whether the next layer's norm had better add what this one's MLP gives: one pass over x less, forward and backward. Not
        where the layer is recomputed, which keeps what it is given: one tensor, not two."""
        fused = condition.dim() == 2 and adds_bias(x, x[:, :1], backend=self.backend)
        return fused and isinstance(self.norm_1, LayerNorm) and not self.recomputed

    def nothing_deferred(self, x: Tensor, condition: Tensor) -> DeferredResidual:
        """For the first layer: 0 times x. It requires gradients if what all others are given does, so that they share a graph."""
        weights = list(self.modulation.parameters())
        trained = torch.is_grad_enabled() and (condition.requires_grad or any(weight.requires_grad for weight in weights))
        gate = x.new_zeros(x.shape[0], x.shape[-1]).requires_grad_(trained)
        last = last_linear(self.mlp)
        biased = torch.is_grad_enabled() and last.bias.requires_grad if last is not None and last.bias is not None else trained
        return DeferredResidual(gate, x.view_as(x), x.new_zeros(x.shape[-1]).requires_grad_(biased))

    def add_deferred(self, x: Tensor, deferred: DeferredResidual) -> Tensor:
        """What the last layer left."""
        return gated_residual(x, deferred.gate.unsqueeze(1), deferred.branch, deferred.bias, backend=self.backend)

    def flops(self, conditions: int, tokens: int, pairs: int) -> int:
        """Forward FLOPs; ``conditions``: how many vectors modulate."""
        return self.modulation.flops(conditions) + self.mixer.flops(tokens, pairs) + self.mlp.flops(tokens)

    def tp_plan(self) -> dict[str, str]:
        return {"norm_1": "replicated", "norm_2": "replicated"}

    def init_spec(self) -> dict[str, Init]:
        return norm_spec("norm_1", self.norm_1) | norm_spec("norm_2", self.norm_2)
