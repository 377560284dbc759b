"""Feed-forward layers [B, S, D] -> [B, S, D]."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.init import Init, Normal, Zeros
from l3m_like.kernels.gelu import linear_gelu
from l3m_like.kernels.select import selected
from l3m_like.kernels.swiglu import swiglu
from l3m_like.layers.linear import is_ordinary, joined_output, joins, linear


def quick_gelu(x: Tensor) -> Tensor:
    """``x sigmoid(1.702 x)`` (Hendrycks and Gimpel, arXiv:1606.08415, section 2), as OpenAI's CLIP has it."""
    return x * (1.702 * x).sigmoid()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (Shazeer, arXiv:2002.05202), with a ``bias`` in all three maps if asked for."""

    #: linear layers that are computed as one
    joint = (("gate", "up"),)
    #: its bias can be left to the caller
    last = "down"

    def __init__(self, dim: int, *, hidden_dim: int, bias: bool = False) -> None:
        super().__init__()
        if hidden_dim < 1:
            raise UserError(f"SwiGLU: hidden_dim must be at least 1, got {hidden_dim}.")
        self.dim = dim
        self.hidden_dim = hidden_dim
        self.backend = selected("swiglu")
        self.weight_init: Init = Normal(0.02)
        self.out_init: Init | None = None  # of `down` (None: the same)
        self.gate = nn.Linear(dim, hidden_dim, bias=bias)
        self.up = nn.Linear(dim, hidden_dim, bias=bias)
        self.down = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor, *, biased: bool = True) -> Tensor:
        """``biased=False``: as ``MLP.forward``."""
        x = x.to(self.up.weight.dtype)
        if joins(x, self.gate, self.up):
            hidden = swiglu(joined_output(x, self.gate, self.up), backend=self.backend)
        else:
            hidden = swiglu(self.gate(x), self.up(x), backend=self.backend)
        return linear(hidden, self.down, biased=biased)

    def flops(self, tokens: int) -> int:
        return 6 * tokens * self.dim * self.hidden_dim

    def tp_plan(self) -> dict[str, str]:
        plan = {"gate": "colwise", "up": "colwise", "down": "rowwise"}
        return plan if self.down.bias is None else plan | {"down.bias": "replicated"}

    def init_spec(self) -> dict[str, Init]:
        inner = self.weight_init
        spec: dict[str, Init] = {"gate.weight": inner, "up.weight": inner, "down.weight": self.out_init or inner}
        return spec if self.down.bias is None else spec | {f"{name}.bias": Zeros() for name in ("gate", "up", "down")}


class MLP(nn.Module):
    """``down(activation(up(x)))``.

    Args:
        dim: D.
        ratio: hidden width / D, used when ``hidden_dim`` is None.
        hidden_dim: hidden width.
        activation: "gelu_tanh", "gelu" (exact), "quick_gelu", "relu" or "silu".
        bias: of both projections.
    """

    #: its bias can be left to the caller
    last = "down"

    def __init__(
        self, dim: int, *, ratio: float = 4.0, hidden_dim: int | None = None, activation: str = "gelu_tanh", bias: bool = True
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UserError(f"MLP: no activation '{activation}'. {did_you_mean(activation, ACTIVATIONS)}")
        self.dim = dim
        self.hidden_dim = int(dim * ratio) if hidden_dim is None else hidden_dim
        if self.hidden_dim < 1:
            raise UserError(f"MLP: the hidden width must be at least 1, got {self.hidden_dim} (dim {dim}, ratio {ratio}).")
        self.activation = activation
        self.backend = selected("gelu")
        self.weight_init: Init = Normal(0.02)
        self.out_init: Init | None = None  # of `down` (None: the same)
        self.up = nn.Linear(dim, self.hidden_dim, bias=bias)
        self.down = nn.Linear(self.hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor, *, biased: bool = True) -> Tensor:
        """``biased=False``: without the bias of ``down``, which the caller adds (``bias_apart``)."""
        x = x.to(self.up.weight.dtype)
        if self.activation in ("gelu", "gelu_tanh") and self.up.bias is not None and is_ordinary(self.up):
            tanh = self.activation == "gelu_tanh"
            hidden = linear_gelu(x, self.up.weight, self.up.bias, tanh=tanh, backend=self.backend)
        else:
            hidden = ACTIVATIONS[self.activation](self.up(x))
        return linear(hidden, self.down, biased=biased)

    def flops(self, tokens: int) -> int:
        return 4 * tokens * self.dim * self.hidden_dim

    def tp_plan(self) -> dict[str, str]:
        plan = {"up": "colwise", "down": "rowwise"}
        return plan if self.down.bias is None else plan | {"down.bias": "replicated"}

    def init_spec(self) -> dict[str, Init]:
        spec: dict[str, Init] = {"up.weight": self.weight_init, "down.weight": self.out_init or self.weight_init}
        return spec if self.up.bias is None else spec | {"up.bias": Zeros(), "down.bias": Zeros()}
