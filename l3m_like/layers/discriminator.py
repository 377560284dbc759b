"""Discriminators: heads on the tokens of a frozen network, and a patch discriminator on pixels; spectrally normalised."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3m_like.core.errors import UserError
from l3m_like.core.init import Init, Ones, Uniform, Zeros

_SLOPE = 0.2  # of LeakyReLU below 0


class SpectralConv(nn.Module):
    """A convolution in one or two dimensions whose matrix [out, in * kernel] is divided by its largest singular value (Miyato et
    al., arXiv:1802.05957).

    The value is found by one step of power iteration from ``u``, in every forward the same; ``follow``, called once per optimizer
    step, moves ``u`` itself. So running a layer twice, or again for a checkpointed backward pass, changes nothing.

    Args:
        dim, out: channels.
        kernel, stride: along each dimension.
        dims: 1 for [B, C, L], 2 for [B, C, H, W].
        circular: the borders go on at the other end; else zeros.
        padding: places added at each border (None: (kernel - 1) / 2).
    """

    #: the start of the power iteration; any vector that is not orthogonal to the singular vector
    buffer_values = {"u": 1.0}
    u: Tensor

    def __init__(
        self,
        dim: int,
        out: int,
        kernel: int,
        *,
        stride: int = 1,
        dims: int = 1,
        circular: bool = False,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.dims = dims
        self.circular = circular
        self.padding = (kernel - 1) // 2 if padding is None else padding
        self.weight = nn.Parameter(torch.empty(out, dim, *[kernel] * dims))
        self.bias = nn.Parameter(torch.empty(out))
        self.register_buffer("u", torch.ones(out))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        matrix = weight.flatten(1)
        with torch.no_grad():
            left, right = _power_step(matrix, self.u.to(matrix.dtype))
        norm = left @ (matrix @ right)
        weight = (weight / norm).to(self.weight.dtype)
        x = x.to(weight.dtype)
        if self.circular and self.padding:
            x = F.pad(x, [self.padding] * 2 * self.dims, mode="circular")
        convolve = F.conv1d if self.dims == 1 else F.conv2d
        return convolve(x, weight, self.bias, self.stride, 0 if self.circular else self.padding)

    @torch.no_grad()
    def follow(self, weight: Tensor, skipped: Tensor | None = None) -> None:
        """Move ``u`` by one step of power iteration, but where the device scalar ``skipped`` is 1; ``weight``: the whole one."""
        moved = _power_step(weight.flatten(1).to(self.u.dtype), self.u)[0]
        self.u.copy_(moved if skipped is None else torch.where(skipped > 0, self.u, moved))

    def flops(self, places: int) -> int:
        """Forward FLOPs for ``places`` outputs."""
        return 2 * places * self.weight.numel()

    def init_spec(self) -> dict[str, Init]:
        bound = 1 / math.sqrt(math.prod(self.weight.shape[1:]))
        return {"weight": Uniform(bound), "bias": Uniform(bound)}


def _power_step(matrix: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(left, right) singular vectors after one step from ``u``."""
    right = F.normalize(matrix.mT @ u, dim=0, eps=1e-12)
    return F.normalize(matrix @ right, dim=0, eps=1e-12), right


class PlaceNorm(nn.Module):
    """[B, C, ...] with mean 0 and variance 1 over the places of each row and channel, then a weight and a bias per channel: batch
    norm whose batch is one row, so that no row depends on another."""

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        out = F.instance_norm(x.to(wide), weight=self.weight.to(wide), bias=self.bias.to(wide), eps=self.eps)
        return out.to(x.dtype)

    def init_spec(self) -> dict[str, Init]:
        return {"weight": Ones(), "bias": Zeros()}


class TokenHead(nn.Module):
    """Tokens [B, N, D] of one layer -> a logit per token [B, N] (StyleGAN-T, arXiv:2301.09515, section 3.2)."""

    def __init__(self, dim: int, *, kernel: int = 9) -> None:
        super().__init__()
        self.enter = SpectralConv(dim, dim, 1)
        self.norm_1 = PlaceNorm(dim)
        self.mix = SpectralConv(dim, dim, kernel, circular=True)
        self.norm_2 = PlaceNorm(dim)
        self.score = SpectralConv(dim, 1, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm_1(self.enter(tokens.mT)), _SLOPE)
        x = (x + F.leaky_relu(self.norm_2(self.mix(x)), _SLOPE)) / math.sqrt(2)
        return self.score(x).squeeze(1)


class TokenDiscriminator(nn.Module):
    """One ``TokenHead`` for each of the given layers' tokens: features [B, K, N, D] -> logits [B, heads * N].

    Args:
        dim: D.
        layers: for each head, which of the K features it looks at; one may be looked at twice.
        kernel: of the heads' convolution over tokens, odd.
    """

    def __init__(self, dim: int, *, layers: Sequence[int], kernel: int = 9) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise UserError(f"TokenDiscriminator: kernel is {kernel}; it must be odd.")
        if not layers or min(layers) < 0:
            raise UserError(f"TokenDiscriminator: layers is {list(layers)}; it lists places among the features, from 0.")
        self.layers = tuple(layers)
        self.heads = nn.ModuleList(TokenHead(dim, kernel=kernel) for _ in layers)

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([head(features[:, place]) for head, place in zip(self.heads, self.layers, strict=True)], dim=1)

    def flops(self, features: Tensor) -> int:
        places = features.shape[0] * features.shape[2]
        return sum(module.flops(places) for module in self.modules() if isinstance(module, SpectralConv))


class PatchDiscriminator(nn.Module):
    """Convolutions on pixels: image [B, C, H, W] -> a logit for each overlapping patch, [B, P] (PatchGAN, arXiv:1611.07004).

    Args:
        channels: C.
        width: of the first layer; each further one doubles it, up to eight times.
        downsamplings: how often the side is halved.
    """

    def __init__(self, channels: int, *, width: int = 64, downsamplings: int = 3) -> None:
        super().__init__()
        if width < 1 or downsamplings < 1:
            raise UserError(f"PatchDiscriminator: width is {width}, downsamplings {downsamplings}; both are at least 1.")
        widths = [channels, *(width * min(2**number, 8) for number in range(downsamplings + 1))]
        self.convolutions = nn.ModuleList(
            SpectralConv(before, after, 4, stride=2 if number < downsamplings else 1, dims=2, padding=1)
            for number, (before, after) in enumerate(zip(widths, widths[1:], strict=False))
        )
        self.score = SpectralConv(widths[-1], 1, 4, dims=2, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        for convolution in self.convolutions:
            image = F.leaky_relu(convolution(image), _SLOPE)
        return self.score(image).flatten(1)

    def flops(self, image: Tensor) -> int:
        total, (height, width) = 0, image.shape[-2:]
        for layer in (*self.convolutions, self.score):
            assert isinstance(layer, SpectralConv)
            height, width = ((side - 2) // layer.stride + 1 for side in (height, width))
            total += layer.flops(image.shape[0] * height * width)
        return total
