"""DiT^DH: a diffusion transformer with a shallow, wide head (RAE, arXiv:2510.11690, section 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.errors import UserError
from l3m_like.core.init import Init, Normal, XavierUniform, Zeros
from l3m_like.layers.embedding import FourierTimeEmbed
from l3m_like.layers.masks import AttentionMask, LayerMasks
from l3m_like.layers.modulation import Modulation
from l3m_like.layers.norm import RMSNorm, norm_spec
from l3m_like.layers.patch_embed import PatchProjection, unpatchify
from l3m_like.layers.rope import MultiAxisRope

Layer = Callable[[int], nn.Module]


class NoiseLevelEmbed(ReadWriteBlock):
    """Embeddings of the noise level 1 - t and of a class, as DiT^DH wants them.

    Reads   time [B] float (0 is noise); class_id [B] int64 in 0 .. classes (``classes`` is the null class)
    Writes  level [B, D], of the noise level alone; condition [B, D] = SiLU(level + class)

    Args:
        classes: number of real classes.
        dim: D.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("level", "condition")

    def __init__(self, classes: int, dim: int, **ports: Any) -> None:
        super().__init__(**ports)
        if classes < 1:
            raise UserError(f"NoiseLevelEmbed: classes must be at least 1, got {classes}.")
        self.level = FourierTimeEmbed(dim)
        self.label = nn.Embedding(classes + 1, dim)

    def compute(self, time: Tensor, class_id: Tensor) -> tuple[Tensor, Tensor]:
        level = self.level(1 - time)
        return level, F.silu(level + self.label(class_id))

    def flops(self, time: Tensor, class_id: Tensor) -> int:
        return self.level.flops(time.shape[0])

    def limits(self, time: Tensor, class_id: Tensor) -> dict[str, int]:
        return {"class_id": self.label.num_embeddings}

    def tp_plan(self) -> dict[str, str]:
        return {"label": "replicated"}

    def init_spec(self) -> dict[str, Init]:
        return {"label.weight": Normal(0.02)}


class DiTDH(ReadWriteBlock):
    """A deep, narrow trunk that all tokens share a condition in, and a wide head in which every token is conditioned on what the
    trunk says of it. The head sees the noised latent itself.

    Reads   tokens [B, N, D] of a square grid; level, condition [B, D]; noised [B, channels, h, w], h = w
    Writes  hidden [B, N, W]; token_condition [B, N, W]

    Args:
        dim: D, the trunk's width.
        num_layers: of the trunk.
        layer: ``layer(dim)`` makes one of the trunk: ``l3m_like.layers.DiTLayer`` with ``norm: rms``.
        head_dim: W, the head's width.
        head_layers: of the head.
        head_layer: likewise of the head.
        channels, patch: of the latent.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("hidden", "token_condition")

    def __init__(
        self,
        dim: int,
        num_layers: int,
        layer: Layer,
        head_dim: int,
        head_layers: int,
        head_layer: Layer,
        channels: int,
        patch: int = 1,
        **ports: Any,
    ) -> None:
        super().__init__(**ports)
        if min(num_layers, head_layers) < 1:
            raise UserError(f"DiTDH: num_layers ({num_layers}) and head_layers ({head_layers}) must be at least 1.")
        self.layers = nn.ModuleList(layer(dim) for _ in range(num_layers))
        self.project = nn.Linear(dim, head_dim)
        self.embed = PatchProjection(head_dim, patch=patch, channels=channels)
        self.head_layers = nn.ModuleList(head_layer(head_dim) for _ in range(head_layers))
        #: half of every head turns with the row, half with the column
        self.ropes = _rope(self.layers), _rope(self.head_layers)
        #: as ``Transformer.attention_used``
        self.attention_used: dict[str, str] = {}

    def compute(self, tokens: Tensor, level: Tensor, condition: Tensor, noised: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = (side // self.embed.patch for side in noised.shape[-2:])
        place = torch.arange(rows * columns, device=tokens.device)
        places = torch.stack((place // columns, place % columns)).unsqueeze(1)
        tokens = self._run(self.layers, tokens, condition, self.ropes[0](places, tokens.dtype))
        said = self.project(F.silu(level.unsqueeze(1) + tokens).to(self.project.weight.dtype))
        return self._run(self.head_layers, self.embed(noised), said, self.ropes[1](places, tokens.dtype)), said

    def _run(self, layers: nn.ModuleList, x: Tensor, condition: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        masks = LayerMasks(AttentionMask(), x.shape[1], x.shape[1], x, self.attention_used)
        for layer in layers:
            x = layer(x, condition, rope, masks.of(layer))
        return x

    def shard_units(self) -> Iterable[nn.Module]:
        yield from self.layers
        yield from self.head_layers

    def flops(self, tokens: Tensor, level: Tensor, condition: Tensor, noised: Tensor) -> int:
        batch, length = tokens.shape[:2]
        sizes = batch * length, batch * length * length
        trunk: list[Any] = list(self.layers)
        head: list[Any] = list(self.head_layers)
        return (
            sum(layer.flops(batch, *sizes) for layer in trunk)
            + sum(layer.flops(batch * length, *sizes) for layer in head)
            + self.embed.flops(batch * length)
            + 2 * batch * length * self.project.weight.numel()
        )

    def tp_plan(self) -> dict[str, str]:
        return {"project": "replicated"}

    def init_spec(self) -> dict[str, Init]:
        return {"project.weight": XavierUniform(), "project.bias": Zeros()}


def _rope(layers: nn.ModuleList) -> MultiAxisRope:
    layer: Any = layers[0]
    width = layer.mixer.head_dim
    if width % 4:
        raise UserError(f"DiTDH: heads are {width} wide; rotary positions of rows and columns need a multiple of 4.")
    return MultiAxisRope(width, 10000.0, [width // 4, width // 4], "axial")


class TokenPatchDecode(ReadWriteBlock):
    """The end of DiT^DH: RMSNorm, a modulation per token, a linear map to patches (zero-initialised). The published ones predict
    noise - data; here the sign is turned, so that the velocity goes from noise to data as everywhere.

    Reads   hidden, token_condition [B, N, W]
    Writes  image [B, channels, image_size, image_size] in the weight's dtype

    Args:
        dim: W.
        image_size, patch, channels: of the latent.
        norm_eps: of the norm.
        ports: reads, writes, stream, training_only of ``ReadWriteBlock``.
    """

    outputs = ("image",)

    def __init__(
        self, dim: int, image_size: int, channels: int, patch: int = 1, norm_eps: float = 1e-6, **ports: Any
    ) -> None:
        super().__init__(**ports)
        self.image_size = image_size
        self.patch = patch
        self.norm = RMSNorm(dim, eps=norm_eps)
        self.modulation = Modulation(dim, 2)
        self.proj = nn.Linear(dim, patch * patch * channels)

    def compute(self, hidden: Tensor, token_condition: Tensor) -> Tensor:
        shift, scale = self.modulation(token_condition)
        patches = self.proj(self.norm.modulated(hidden.to(self.proj.weight.dtype), shift, scale))
        return -unpatchify(patches, self.patch, self.image_size, self.image_size)

    def flops(self, hidden: Tensor, token_condition: Tensor) -> int:
        tokens = hidden.shape[0] * hidden.shape[1]
        return self.modulation.flops(tokens) + 2 * tokens * self.proj.weight.numel()

    def tp_plan(self) -> dict[str, str]:
        return {"norm": "replicated", "proj": "replicated"}

    def optim_spec(self) -> dict[str, str | int]:
        return {"proj.weight": "adamw"}

    def init_spec(self) -> dict[str, Init]:
        return {"proj.weight": Zeros(), "proj.bias": Zeros()} | norm_spec("norm", self.norm)
