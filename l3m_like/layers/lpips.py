"""Learned perceptual image patch similarity (LPIPS; Zhang et al., arXiv:1801.03924), version 0.1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.core.init import Init, Ones
from l3m_like.layers.patch_embed import per_channel

#: mean and deviation of ImageNet's colours for images in [-1, 1], as the published weights expect them
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@dataclass(frozen=True)
class Stage:
    """Convolutions (each followed by ReLU) up to a tap: a pooling before them, then per convolution its width.

    Args:
        pool: (kernel, stride) of the max pooling ahead; None: none.
        widths: output channels.
        kernel, stride, padding: of each of the convolutions.
    """

    pool: tuple[int, int] | None
    widths: tuple[int, ...]
    kernel: int = 3
    stride: int = 1
    padding: int = 1


#: the feature networks, stage by stage; a distance is taken at the end of each stage
NETWORKS: dict[str, tuple[Stage, ...]] = {
    "vgg": (
        Stage(None, (64, 64)),
        Stage((2, 2), (128, 128)),
        Stage((2, 2), (256, 256, 256)),
        Stage((2, 2), (512, 512, 512)),
        Stage((2, 2), (512, 512, 512)),
    ),
    "alex": (
        Stage(None, (64,), 11, 4, 2),
        Stage((3, 2), (192,), 5, 1, 2),
        Stage((3, 2), (384,)),
        Stage(None, (256,)),
        Stage(None, (256,)),
    ),
}


class LPIPS(nn.Module):
    """Distance of images as the features of a classifier see it: [B, C, H, W] x 2 in [-1, 1] -> [B], at least float32.

    At five depths the features are scaled to unit length along the channels, their squared differences are weighted per channel,
    averaged over places and summed over depths.

    Args:
        net: "vgg" (VGG16, the usual loss) or "alex" (AlexNet, the usual metric).
        smallest: smaller images are enlarged to this side first (bilinear); None: never. AlexNet needs 63 pixels, VGG16 16.

    Raises:
        UserError: no such network; images with other than 1 (grey) or 3 channels, or that differ in shape.
    """

    def __init__(self, net: str = "vgg", *, smallest: int | None = None) -> None:
        super().__init__()
        if net not in NETWORKS:
            raise UserError(f"LPIPS: no network '{net}'. {did_you_mean(net, NETWORKS)}")
        self.net = net
        self.smallest = smallest
        channels = 3
        self.stages = nn.ModuleList()
        for stage in NETWORKS[net]:
            convolutions = nn.ModuleList()
            for width in stage.widths:
                convolutions.append(nn.Conv2d(channels, width, stage.kernel, stage.stride, stage.padding))
                channels = width
            self.stages.append(convolutions)
        #: weights of the channels, not negative
        self.weights = nn.ModuleList(nn.Linear(stage.widths[-1], 1, bias=False) for stage in NETWORKS[net])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape != y.shape or x.dim() != 4 or x.shape[1] not in (1, 3):
            raise UserError(
                f"LPIPS: images of shapes {tuple(x.shape)} and {tuple(y.shape)}; two equal [B, 1 or 3, H, W] are needed."
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        both = torch.cat((x.to(dtype), y.to(dtype)))
        if self.smallest is not None and min(both.shape[-2:]) < self.smallest:
            both = F.interpolate(both, size=(self.smallest, self.smallest), mode="bilinear", align_corners=False)
        shift, scale = (per_channel(both, numbers) for numbers in (SHIFT, SCALE))
        total = torch.zeros((), dtype=dtype, device=x.device)
        rows: list[Any] = list(self.weights)
        for features, row in zip(self.features((both - shift) / scale), rows, strict=True):
            features = features.to(dtype)
            # the clamp: the slope of a root is infinite at 0, where all features of a place are 0
            length = features.square().sum(1, keepdim=True).clamp(min=1e-20).sqrt()
            first, second = (features / (length + 1e-10)).chunk(2)
            squares = (first - second).square().mean((2, 3))
            total = total + F.linear(squares, row.weight.to(dtype)).squeeze(1)
        return total

    def features(self, image: Tensor) -> Sequence[Tensor]:
        """The features [B, widths, ...] at the end of each stage, of images with ImageNet's mean and deviation."""
        x, found = image.to(self.stages[0][0].weight.dtype), []  # type: ignore[index]
        for stage, convolutions in zip(NETWORKS[self.net], self.stages, strict=True):
            if stage.pool is not None:
                x = F.max_pool2d(x, *stage.pool)
            for convolution in convolutions:  # type: ignore[attr-defined]
                x = F.relu(convolution(x))
            found.append(x)
        return found

    def flops(self, rows: int, height: int, width: int) -> int:
        """Forward FLOPs of ``rows`` pairs of images."""
        if self.smallest is not None and min(height, width) < self.smallest:
            height = width = self.smallest
        total, channels = 0, 3
        for stage in NETWORKS[self.net]:
            if stage.pool is not None:
                kernel, stride = stage.pool
                height, width = ((side - kernel) // stride + 1 for side in (height, width))
            for out in stage.widths:
                height, width = ((side + 2 * stage.padding - stage.kernel) // stage.stride + 1 for side in (height, width))
                total += 2 * height * width * stage.kernel**2 * channels * out
                channels = out
        return 2 * rows * total

    def init_spec(self) -> dict[str, Init]:
        return {f"weights.{number}.weight": Ones() for number in range(len(self.weights))}  # all channels alike

    def tp_plan(self) -> dict[str, str]:
        return {"stages": "replicated", "weights": "replicated"}
