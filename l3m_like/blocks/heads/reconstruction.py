"""From a decoder's tokens to an image, and how far that is from the original to the eye."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from l3m_like.blocks.preprocessors.patches import check_patch
from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError
from l3m_like.core.init import Init, XavierUniform, Zeros
from l3m_like.layers.lpips import LPIPS
from l3m_like.layers.norm import make_norm, norm_spec
from l3m_like.layers.patch_embed import per_channel, unpatchify
from l3m_like.layers.timm_vit import IMAGENET


class PatchPixels(ReadWriteBlock):
    """Norm, a linear map to patches, and the colours' mean and deviation: the end of the decoders of MAE and RAE.

    Reads   hidden [B, extra + N, D], row by row; the first ``extra`` tokens are dropped
    Writes  reconstruction [B, channels, image_size, image_size] in at least float32; [-1, 1] if the image is

    Args:
        dim: D.
        image_size, patch: in pixels.
        channels: of the image.
        extra: class and register tokens.
        mean, std: of the colours in [0, 1], a number for each channel (None: ImageNet's, their averages for grey images).
        norm: "layer" or "rms".
        norm_eps: of the norm.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("reconstruction",)

    def __init__(
        self,
        dim: int,
        image_size: int,
        patch: int,
        channels: int = 3,
        extra: int = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        norm: str = "layer",
        norm_eps: float = 1e-12,
        **ports: Any,
    ) -> None:
        super().__init__(**ports)
        check_patch(image_size, patch)
        self.image_size = image_size
        self.patch = patch
        self.extra = extra
        self.mean, self.std = (
            _of_channels(given, default, channels) for given, default in zip((mean, std), IMAGENET, strict=True)
        )
        self.norm = make_norm(norm, dim, norm_eps)
        self.proj = nn.Linear(dim, patch * patch * channels)

    def compute(self, hidden: Tensor) -> Tensor:
        patches = self.proj(self.norm(hidden.to(self.proj.weight.dtype)))[:, self.extra :]
        image = unpatchify(patches, self.patch, self.image_size, self.image_size)
        image = image.to(torch.promote_types(image.dtype, torch.float32))
        mean, std = (per_channel(image, numbers) for numbers in (self.mean, self.std))
        return 2 * (image * std + mean) - 1

    def flops(self, hidden: Tensor) -> int:
        return 2 * hidden.shape[0] * hidden.shape[1] * self.proj.weight.numel()

    def tp_plan(self) -> dict[str, str]:
        return {"norm": "replicated", "proj": "replicated"}

    def optim_spec(self) -> dict[str, str | int]:
        return {"proj.weight": "adamw"}

    def init_spec(self) -> dict[str, Init]:
        return {"proj.weight": XavierUniform(), "proj.bias": Zeros()} | norm_spec("norm", self.norm)


def _of_channels(given: Sequence[float] | None, default: Sequence[float], channels: int) -> tuple[float, ...]:
    if given is None and channels != len(default):
        return (sum(default) / len(default),) * channels
    numbers = tuple(default if given is None else given)
    if len(numbers) != channels:
        raise UserError(f"PatchPixels: mean and std have {len(numbers)} numbers, but images have {channels} channels.")
    return numbers


class PerceptualDistance(ReadWriteBlock):
    """LPIPS of an image and its reconstruction. It belongs into a ``Frozen`` with ``passes_gradients: true``.

    Reads   reconstruction, image [B, 1 or 3, H, W] in [-1, 1]
    Writes  lpips [B], at least float32

    Args:
        net, smallest: of ``l3m_like.layers.LPIPS``.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("lpips",)

    def __init__(self, net: str = "vgg", smallest: int | None = None, **ports: Any) -> None:
        super().__init__(**ports)
        self.network = LPIPS(net, smallest=smallest)

    def compute(self, reconstruction: Tensor, image: Tensor) -> Tensor:
        return self.network(reconstruction, image.to(reconstruction.dtype))

    def flops(self, reconstruction: Tensor, image: Tensor) -> int:
        return self.network.flops(image.shape[0], *image.shape[-2:])
