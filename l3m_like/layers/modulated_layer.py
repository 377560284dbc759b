"""A transformer layer with RMSNorms that a condition modulates, for all tokens alike or for each by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from l3m_like.core.init import Init, XavierUniform
from l3m_like.kernels.attention import LoweredMask
from l3m_like.layers.modulation import Modulation
from l3m_like.layers.norm import RMSNorm, norm_spec


class ModulatedLayer(nn.Module):
    """``x += gate * mixer(norm(x) (1 + scale) + shift)``, then the MLP likewise: the layer of DiT^DH (RAE, arXiv:2510.11690).

    It differs from ``DiTLayer`` in its norms, which have weights, in rotary positions, and in a condition that may differ from
    token to token.

    Args:
        dim: D.
        mixer, mlp: as in ``TransformerLayer``. Their matrices are drawn Xavier-uniform.
        norm_eps: of both norms.
    """

    mixer: Any
    mlp: Any

    def __init__(
        self, dim: int, *, mixer: Callable[[int], nn.Module], mlp: Callable[[int], nn.Module], norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.modulation = Modulation(dim, 6)
        self.norm_1 = RMSNorm(dim, eps=norm_eps)
        self.mixer = mixer(dim)
        self.norm_2 = RMSNorm(dim, eps=norm_eps)
        self.mlp = mlp(dim)
        for part in (self.mixer, self.mlp):
            if hasattr(part, "weight_init"):
                part.weight_init = XavierUniform()

    def forward(
        self, x: Tensor, condition: Tensor, rope: tuple[Tensor, Tensor] | None = None, mask: LoweredMask | None = None
    ) -> Tensor:
        """x [B, S, D], condition [B, D] or [B, S, D] -> [B, S, D]."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(condition)
        x = x + gate_1 * self.mixer(self.norm_1(x) * (1 + scale_1) + shift_1, rope, mask)
        return x + gate_2 * self.mlp(self.norm_2(x) * (1 + scale_2) + shift_2)

    def flops(self, conditions: int, tokens: int, pairs: int) -> int:
        """Forward FLOPs; ``conditions``: how many vectors modulate."""
        return self.modulation.flops(conditions) + self.mixer.flops(tokens, pairs) + self.mlp.flops(tokens)

    def tp_plan(self) -> dict[str, str]:
        return {"norm_1": "replicated", "norm_2": "replicated"}

    def init_spec(self) -> dict[str, Init]:
        return norm_spec("norm_1", self.norm_1) | norm_spec("norm_2", self.norm_2)
