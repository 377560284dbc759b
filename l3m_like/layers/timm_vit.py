"""Vision transformers of the timm library as feature extractors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3m_like.core.errors import UserError
from l3m_like.core.init import Init, Normal, Ones, Zeros
from l3m_like.layers.patch_embed import Colours

#: mean and deviation of ImageNet's colours in [0, 1]
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TimmViT(nn.Module):
    """A ``VisionTransformer`` of timm (DINO, DINOv2 with and without registers, SigLIP 2, MAE ...): images to patch tokens.

    Images [B, 1 or 3, H, W] in [-1, 1] are resized, get the colours' mean and deviation, and pass the model. Class and register
    tokens are dropped. Parameters have timm's names, below ``model.``, but for the affine part of the last norm, which is left
    out (RAE, arXiv:2510.11690).

    Args:
        name: of the model in timm.
        arguments: of its class, where they differ from the name's (``{depth: 2, embed_dim: 64}``).
        image_size: side that images are resized to (None: as they come).
        resize: "bicubic" or "bilinear".
        mean, std: of the three colours, in [0, 1].

    Raises:
        UserError: timm has no such model, or it is no vision transformer.
    """

    def __init__(
        self,
        name: str,
        *,
        arguments: Mapping[str, Any] | None = None,
        image_size: int | None = None,
        resize: str = "bicubic",
        mean: Sequence[float] = IMAGENET[0],
        std: Sequence[float] = IMAGENET[1],
    ) -> None:
        super().__init__()
        self.name = name
        self.image_size = image_size
        self.resize = resize
        self.colours = Colours(mean, std)
        # the head is not used; positions are resampled where images have another size
        self.model = create(name, {"num_classes": 0, "global_pool": "", "dynamic_img_size": True} | dict(arguments or {}))
        self.dim: int = self.model.embed_dim
        self.patch: int = self.model.patch_embed.patch_size[0]
        self.model.norm = nn.LayerNorm(self.dim, eps=self.model.norm.eps, elementwise_affine=False)

    def prepare(self, image: Tensor) -> Tensor:
        """The image as the model expects it, in the weights' dtype."""
        if self.image_size is not None and image.shape[-2:] != (self.image_size, self.image_size):
            image = F.interpolate(image, size=(self.image_size, self.image_size), mode=self.resize, align_corners=False)
        return self.colours(image).to(self.model.patch_embed.proj.weight.dtype)

    def grid(self, image: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of ``image`` [B, C, H, W]."""
        height, width = image.shape[-2:] if self.image_size is None else (self.image_size, self.image_size)
        return height // self.patch, width // self.patch

    def forward(self, image: Tensor) -> Tensor:
        """image [B, C, H, W] -> tokens [B, N, D] after the last norm, row by row."""
        return self.model.forward_features(self.prepare(image))[:, self.model.num_prefix_tokens :]

    def hidden(self, image: Tensor, layers: Sequence[int]) -> Tensor:
        """What the layers ``layers`` (from 0, ascending) put out, without the last norm: [B, len(layers), N, D]."""
        found = self.model.forward_intermediates(
            self.prepare(image), indices=list(layers), norm=False, stop_early=True, output_fmt="NLC", intermediates_only=True
        )
        return torch.stack(found, dim=1)

    def flops(self, image: Tensor, layers: int | None = None) -> int:
        """Forward FLOPs for images [B, C, H, W] of the first ``layers`` layers (None: of all)."""
        rows, columns = self.grid(image)
        patches = image.shape[0] * rows * columns
        length = rows * columns + self.model.num_prefix_tokens
        matrices = sum(p.numel() for p in self.model.blocks[0].parameters() if p.dim() == 2)
        per_layer = 2 * image.shape[0] * length * matrices + 4 * image.shape[0] * length**2 * self.dim
        return 2 * patches * self.model.patch_embed.proj.weight.numel() + per_layer * (layers or len(self.model.blocks))

    def init_spec(self) -> dict[str, Init]:
        """Features of a random network: matrices keep the scale of their input."""
        spec: dict[str, Init] = {}
        for name, parameter in self.model.named_parameters():
            if name.endswith("bias"):
                init: Init = Zeros()
            elif name.endswith(("_token", "pos_embed")):
                init = Normal(0.2)
            else:
                init = Ones() if parameter.dim() < 2 else Normal(1 / math.sqrt(math.prod(parameter.shape[1:])))
            spec[f"model.{name}"] = init
        return spec


def create(name: str, arguments: Mapping[str, Any]) -> Any:
    """The ``VisionTransformer`` that timm calls ``name``.

    Raises:
        UserError: timm is not installed, has no such model, or it is no vision transformer.
    """
    from l3m_like.core.torchvision_ops import allow_torchvision

    allow_torchvision()
    try:
        import timm
    except ImportError as error:
        raise UserError(f"'{name}' needs the package timm: pip install 'l3m-like[vision]'.") from error
    from timm.models.vision_transformer import VisionTransformer

    try:
        model = timm.create_model(name, **arguments)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"timm cannot make '{name}' with {dict(arguments)}: {error}") from error
    if not isinstance(model, VisionTransformer):
        raise UserError(f"'{name}' is a {type(model).__name__} of timm, not a VisionTransformer.")
    return model
