"""From tokens back to pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.blocks.preprocessors.patches import check_patch
from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError
from l3m_like.core.init import Init, Normal, Zeros
from l3m_like.layers.mlp import MLP
from l3m_like.layers.modulation import Modulation
from l3m_like.layers.norm import LayerNorm, make_norm, norm_spec
from l3m_like.layers.patch_embed import sincos_positions, unpatchify


class PatchDecode(ReadWriteBlock):
    """adaLN final layer of DiT and SiT: norm, modulation, linear map to patches (zero-initialised), image.

    Reads   hidden [B, N, D]; condition [B, D]
    Writes  image [B, channels, image_size, image_size] in the weight's dtype

    Args:
        dim: D.
        image_size, patch: as in ``PatchEmbed``.
        channels: of the written image.
        out_channels: that the linear map computes (None: ``channels``). SiT's published models compute twice as many
            (a learned variance) and use the first half.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("image",)

    def __init__(
        self, dim: int, image_size: int, patch: int, channels: int, out_channels: int | None = None, **ports: Any
    ) -> None:
        super().__init__(**ports)
        check_patch(image_size, patch)
        out_channels = channels if out_channels is None else out_channels
        if out_channels < channels:
            raise UserError(f"PatchDecode: out_channels ({out_channels}) must be at least channels ({channels}).")
        self.image_size = image_size
        self.patch = patch
        self.channels = channels
        self.norm = LayerNorm(dim)
        self.modulation = Modulation(dim, 2)
        self.proj = nn.Linear(dim, patch * patch * out_channels)

    def compute(self, hidden: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition)
        patches = self.proj(self.norm.modulated(hidden.to(self.proj.weight.dtype), shift, scale))
        return unpatchify(patches, self.patch, self.image_size, self.image_size)[:, : self.channels]

    def flops(self, hidden: Tensor, condition: Tensor) -> int:
        tokens = hidden.shape[0] * hidden.shape[1]
        return self.modulation.flops(hidden.shape[0]) + 2 * tokens * self.proj.in_features * self.proj.out_features

    def tp_plan(self) -> dict[str, str]:
        return {"proj": "replicated"}

    def optim_spec(self) -> dict[str, str | int]:
        return {"proj.weight": "adamw"}

    def init_spec(self) -> dict[str, Init]:
        return {"proj.weight": Zeros(), "proj.bias": Zeros()}


class PatchHead(ReadWriteBlock):
    """Final norm and a linear map to the pixels of a patch, for each token; optionally through layers of MLPs (AIM,
    arXiv:2401.08541, section 3.2).

    Reads   hidden [B, S, D]
    Writes  patches [B, S, p p C], inside a patch in the order (row, column, channel), or [B, S - 1, p p C]

    Args:
        dim: D.
        patch, channels: p and C.
        norm: "rms", or "layer": LayerNorm with weight and bias.
        norm_eps: its epsilon, and that of the layers' norms.
        drop: "first": leave out the first token (a class token); "last": the last one (which predicts what is not there).
        layers: how many MLPs, each with a norm before it and a residual around it.
        width: of these (None: D); a linear map brings tokens to it. The MLPs are four times as wide.
        bias, mlp_bias: of the map to pixels, of the MLPs.
        positions: "sincos": add fixed 2-D sinusoids before these layers, of the square of patches; or None.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("patches",)

    def __init__(
        self,
        dim: int,
        patch: int,
        channels: int,
        norm: str = "layer",
        norm_eps: float = 1e-6,
        drop: str | None = None,
        layers: int = 0,
        width: int | None = None,
        bias: bool = True,
        mlp_bias: bool = True,
        positions: str | None = None,
        **ports: Any,
    ) -> None:
        super().__init__(**ports)
        if positions not in (None, "sincos") or (positions and (not layers or (width or dim) % 4)):
            raise UserError(
                f"PatchHead: positions is '{positions}'; it is null, or sincos, with layers of a width that 4 divides."
            )
        if drop not in (None, "first", "last"):
            raise UserError(f"PatchHead: drop is '{drop}'; it is first, last or null.")
        if width is not None and not layers:
            raise UserError(f"PatchHead: width {width} is that of layers, and there are none; remove it.")
        self.drop = drop
        width = dim if width is None else width
        self.inner = nn.Linear(dim, width) if layers else None
        self.positions = positions
        self.layers = nn.ModuleList(_TokenMLP(width, norm, norm_eps, mlp_bias) for _ in range(layers))
        self.norm = make_norm(norm, width, norm_eps)
        self.proj = nn.Linear(width, patch * patch * channels, bias=bias)

    def compute(self, hidden: Tensor) -> Tensor:
        if self.drop is not None:
            hidden = hidden[:, 1:] if self.drop == "first" else hidden[:, :-1]
        if self.inner is not None:
            hidden = self.inner(hidden.to(self.inner.weight.dtype))
        if self.positions is not None:
            side = math.isqrt(hidden.shape[1] + (self.drop == "last"))
            wide = torch.promote_types(hidden.dtype, torch.float32)
            places = sincos_positions(side, side, hidden.shape[-1], wide, hidden.device)
            hidden = (hidden + places[: hidden.shape[1]]).to(hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.proj(self.norm(hidden).to(self.proj.weight.dtype))

    def shard_units(self) -> Iterable[nn.Module]:
        return self.layers

    def flops(self, hidden: Tensor) -> int:
        tokens = hidden.shape[0] * (hidden.shape[1] - (self.drop is not None))
        matrices = self.proj.weight.numel() + (0 if self.inner is None else self.inner.weight.numel())
        units: list[Any] = list(self.layers)
        return 2 * tokens * matrices + sum(unit.mlp.flops(tokens) for unit in units)

    def tp_plan(self) -> dict[str, str]:
        plan = {"norm": "replicated", "proj": "replicated"}
        return plan if self.inner is None else plan | {"inner": "replicated"}

    def optim_spec(self) -> dict[str, str | int]:
        return {"proj.weight": "adamw"}

    def init_spec(self) -> dict[str, Init]:
        spec: dict[str, Init] = {"proj.weight": Normal(0.02)} | norm_spec("norm", self.norm)
        spec |= {} if self.proj.bias is None else {"proj.bias": Zeros()}
        return spec if self.inner is None else spec | {"inner.weight": Normal(0.02), "inner.bias": Zeros()}


class _TokenMLP(nn.Module):
    """``x + mlp(norm(x))``."""

    def __init__(self, dim: int, norm: str, norm_eps: float, bias: bool = True) -> None:
        super().__init__()
        self.norm = make_norm(norm, dim, norm_eps)
        self.mlp = MLP(dim, ratio=4.0, activation="gelu", bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))

    def tp_plan(self) -> dict[str, str]:
        return {"norm": "replicated"}

    def init_spec(self) -> dict[str, Init]:
        return norm_spec("norm", self.norm)
